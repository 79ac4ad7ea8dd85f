"""The curve of a run's loss as a picture. matplotlib is an optional dependency, imported when it is needed."""

import importlib.util
import json
import os
from pathlib import Path

from jfa_models.training.run import LOG_FILE

FORMATS = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raises ValueError if a picture cannot be written there: before an hour of training, not after."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--plot must be a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, got {str(path)!r}")
    if not os.access(path.resolve().parent, os.W_OK):
        raise ValueError(f"the folder {path.resolve().parent} does not exist or is not writable")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'jfa[plot]', or pip install matplotlib")


def save(output: Path, path: Path) -> None:
    """Plots the losses in a run's log.jsonl."""
    from matplotlib.figure import Figure

    steps = [json.loads(line) for line in (output / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([one["step"] for one in steps], [one["loss"] for one in steps], color="#0072B2", label="training")
    held_out = [one for one in steps if "eval_loss" in one]
    if held_out:
        found = [one["step"] for one in held_out], [one["eval_loss"] for one in held_out]
        axes.plot(*found, "o--", color="#D55E00", label="evaluation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
