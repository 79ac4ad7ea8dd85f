"""Paths of small checkpoints and reference values."""

from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA3 = GOLDEN / "llama3"
