"""The only import of Pallas' TPU backend, Mosaic."""

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["pl", "pltpu"]
