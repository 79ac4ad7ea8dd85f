"""The only import of Pallas' Triton dialect.

That lowering is Pallas' one way to an AMD GPU, and JAX has deprecated it without naming another (jax 0.11.0). When it
goes, this folder is replaced by one with the same public functions, and nothing else changes.
"""

from jax.experimental import pallas as pl
from jax.experimental.pallas.triton import CompilerParams, dot, load, store

__all__ = ["CompilerParams", "dot", "load", "pl", "store"]
