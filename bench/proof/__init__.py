"""Compiles, proves and tunes kernels without a GPU."""
