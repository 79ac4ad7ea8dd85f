"""The only import of Pallas' Triton backend.

That lowering is the only way from Pallas to an AMD GPU, and JAX has deprecated it without a replacement (jax 0.11.0).
When it is removed, replace this folder by one with the same public functions; nothing else changes.
"""

from jax.experimental import pallas as pl
from jax.experimental.pallas.triton import CompilerParams, dot, load, store

__all__ = ["CompilerParams", "dot", "load", "pl", "store"]
