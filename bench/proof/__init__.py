"""Kernels as code for cards that are not there."""
