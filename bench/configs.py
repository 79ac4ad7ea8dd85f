"""The shape of a model by name. Nothing here imports JAX."""

from collections.abc import Iterable
from pathlib import Path

from jfa_models.checkpoints.locate import PACKAGED
from jfa_models.checkpoints.presets import PRESETS
from jfa_models.model.config import DecoderConfig

from . import names


def unknown(models: Iterable[str]) -> str | None:
    """A sentence about the first name that is neither a preset, nor a package, nor a path; None if there is none."""
    for name in models:
        if name not in PRESETS and name not in PACKAGED and not Path(name).exists():
            known = ", ".join(dict.fromkeys((*PRESETS, *PACKAGED)))
            return f"there is no model {name!r}; known: {known}; or a folder, or a .gguf file"
    return None


def decoded_tokens(samples: int) -> int:
    """Tokens that `decode` takes of a row for so many samples.

    Those are the first one, that of a step which shows what a step costs the host, the one that is tried, those that
    warm up, and those that are timed.
    """
    return 3 + names.WARM_UP_CALLS + samples


def config_of(name: str, num_layers: int | None = None) -> DecoderConfig:
    """Of a preset, or of a checkpoint on disk; with its first layers alone where a number is given.

    Raises:
      ValueError: it has not as many.
    """
    if name in PRESETS:
        config = PRESETS[name]
    else:
        from jfa_models.checkpoints.reader import open_checkpoint  # with what reads files

        config = open_checkpoint(name).config
    return config if num_layers is None else config.with_layers(num_layers)
