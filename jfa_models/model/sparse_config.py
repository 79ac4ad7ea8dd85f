"""Which tiles of scores a layer with sparse attention computes."""

import dataclasses
import math
from typing import Literal, get_args

Pattern = Literal["vertical-slash", "top-k", "window"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Which tiles of 128 by 128 scores are computed where all tokens of a text are there from the first one on.

    Hashable. Written as "top-k:0.25".

    Attributes:
      pattern: "top-k": for each head and tile of queries, the tiles with the best pooled scores, chosen by the 128
        queries up to the tile's first one (arXiv:2502.13189; there, each query chooses for itself). "window": the last
        tiles. "vertical-slash": for each head, columns and diagonals of tiles, those with the largest weights in the
        rows of the last 64 queries (arXiv:2407.02490, section 3.2; there, lines of single tokens). All see the tile of
        their own and the first one, vertical-slash the latter as far as the fraction allows.
      fraction: of the tiles that a causal mask leaves, those that are computed: at most by vertical-slash; by the
        others for each tile of queries by itself, at least two, and the first one besides. 1: all, the exact result.

    Raises:
      ValueError: an unknown pattern, or a fraction that is not above 0 and up to 1.
    """

    pattern: Pattern
    fraction: float

    def __post_init__(self) -> None:
        if self.pattern not in get_args(Pattern):
            raise ValueError(
                f"the pattern of sparse attention must be one of {', '.join(get_args(Pattern))}, got {self.pattern!r}"
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"the fraction of sparse attention must be above 0 and at most 1, got {self.fraction:g}; 0.1 computes "
                "a tenth of the scores"
            )

    @classmethod
    def of(cls, text: "str | SparseConfig") -> "SparseConfig":
        """Reads PATTERN:FRACTION, such as "top-k:0.25".

        Raises:
          ValueError: it has another form, or see the class.
        """
        if isinstance(text, cls):
            return text
        pattern, colon, number = str(text).partition(":")
        try:
            fraction = float(number)
        except ValueError:
            fraction = math.nan
        if not colon or math.isnan(fraction):
            raise ValueError(f"sparse attention must be PATTERN:FRACTION, such as top-k:0.25, got {text!r}")
        return cls(pattern=pattern, fraction=fraction)  # type: ignore[arg-type]  # checked there

    @property
    def is_exact(self) -> bool:
        """Whether it computes all scores."""
        return self.fraction == 1

    @property
    def is_causal(self) -> bool:
        """Whether what a token computes depends on no later one, not even the choice of its tiles."""
        return self.is_exact or self.pattern != "vertical-slash"

    def __str__(self) -> str:
        return f"{self.pattern}:{self.fraction!r}"
