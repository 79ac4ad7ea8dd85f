"""Where models are, and what is on disk."""
