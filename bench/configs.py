"""Looks up model configurations by name. Importing this file does not import JAX."""

from collections.abc import Iterable
from pathlib import Path

from jfa_models.checkpoints.locate import PACKAGED
from jfa_models.checkpoints.presets import PRESETS
from jfa_models.model.config import DecoderConfig

from . import names


def unknown(models: Iterable[str]) -> str | None:
    """An error message about the first name that is not a preset, package or path; None if all are known."""
    for name in models:
        if name not in PRESETS and name not in PACKAGED and not Path(name).exists():
            known = ", ".join(dict.fromkeys((*PRESETS, *PACKAGED)))
            return f"unknown model {name!r}; use one of {known}, a folder or a .gguf file"
    return None


def decoded_tokens(samples: int) -> int:
    """The number of consecutive tokens that `decode` generates for this many samples.

    These are the first one, one each for the step that measures the host time and for the trial run, and those of the
    warm-up and of the timed steps.
    """
    return 3 + names.WARM_UP_CALLS + samples


def config_of(name: str, num_layers: int | None = None) -> DecoderConfig:
    """The configuration of a preset or of a checkpoint on disk, reduced to its first num_layers layers if given.

    Raises:
      ValueError: the model has fewer layers.
    """
    if name in PRESETS:
        config = PRESETS[name]
    else:
        from jfa_models.checkpoints.reader import open_checkpoint  # slow to import, and only needed for files

        config = open_checkpoint(name).config
    return config if num_layers is None else config.with_layers(num_layers)


def load(name: str, dtype: str | None, quantization: str | None = None, tensor_parallel: int | None = None):
    """The LanguageModel of a package, path or Hugging Face repository; of a preset, with random weights."""
    from jfa_models import LanguageModel, from_pretrained  # imports JAX
    from jfa_models.model.partition import mesh_of

    mesh = mesh_of(None, tensor_parallel)
    if name in PRESETS and name not in PACKAGED and not Path(name).exists():
        return LanguageModel.random(name, dtype=dtype, quantization=quantization, mesh=mesh)
    return from_pretrained(name, dtype=dtype, quantization=quantization, mesh=mesh)
