"""Decoders on Flax NNX, and everything that makes them write text.

The public names are listed in __init__.pyi and imported when they are first used: the command line shows its help
without waiting for JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
