"""Decoder models in Flax NNX, and everything needed to generate text with them.

The public names are listed in __init__.pyi and imported on first use, so that the command line can show its help
without importing JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
