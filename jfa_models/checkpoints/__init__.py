"""Locates, reads and writes checkpoints."""
