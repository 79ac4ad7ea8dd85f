"""Where small checkpoints and reference values lie."""

from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA3 = GOLDEN / "llama3"
