"""Checkpoints: locating, reading and writing them."""
