"""What is timed, and with what."""
