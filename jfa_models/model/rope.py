"""Rotary position embedding: the frequency of each pair of a head, and the scalings that extend a trained context.

Plain numbers: nothing here imports an array library. Source: arXiv:2104.09864.
"""

import dataclasses
import math
from collections.abc import Sequence

Frequencies = Sequence[float]  # one for each rotated pair of a head


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Divides every frequency by the same factor. Source: arXiv:2306.15595."""

    factor: float

    def __post_init__(self) -> None:
        check_positive("rope scaling", factor=self.factor)

    def divisors(self, exact: Frequencies, context_length: int) -> Frequencies:
        """The divisor of each inverse frequency."""
        return [self.factor] * len(exact)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Divides slow frequencies by `factor` and keeps fast ones, with a linear blend between. Source: arXiv:2407.21783.

    A pair is slow if it makes fewer than `low_freq_factor` rotations within `original_context_length` positions, and
    fast if it makes more than `high_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int

    def __post_init__(self) -> None:
        check_positive("rope scaling", **dataclasses.asdict(self))
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope scaling: high_freq_factor must be larger than low_freq_factor, "
                f"got {self.high_freq_factor} and {self.low_freq_factor}"
            )

    def divisors(self, exact: Frequencies, context_length: int) -> Frequencies:
        """The divisor of each inverse frequency: from 1 (fast) to `factor` (slow)."""
        turns = [self.original_context_length * frequency / (2 * math.pi) for frequency in exact]
        span = self.high_freq_factor - self.low_freq_factor
        return [_blend((each - self.low_freq_factor) / span, self.factor) for each in turns]


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Divides slow frequencies by `factor` and keeps fast ones, with a ramp between. Source: arXiv:2309.00071.

    A pair is fast if it makes at least `beta_fast` rotations within `original_context_length` positions, and slow if it
    makes at most `beta_slow`.
    """

    factor: float
    original_context_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1, as in the paper

    def __post_init__(self) -> None:
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        check_positive("rope scaling", **given)

    def divisors(self, exact: Frequencies, context_length: int) -> Frequencies:
        """The divisor of each inverse frequency: from 1 (fast) to `factor` (slow)."""
        pairs = len(exact)
        # exact[i] is theta ** -(i / pairs): solved for the (fractional) index of the pair with that many rotations
        log_step = -math.log(exact[1]) if pairs > 1 else 1.0
        first, last = (
            math.log(self.original_context_length / (turns * 2 * math.pi)) / log_step
            for turns in (self.beta_fast, self.beta_slow)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * pairs - 1)
        span = last - first if last != first else 1e-3
        return [_blend(1.0 - (pair - first) / span, self.factor) for pair in range(pairs)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """One divisor per pair, from one list for contexts up to the original length, from another for longer ones.

    The model's context_length decides once for all its texts: a cache with keys rotated by both lists would be wrong.
    Source: arXiv:2402.13753.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context_length: int
    attention_factor: float

    def __post_init__(self) -> None:
        check_positive(
            "rope scaling",
            smallest_divisor=min((*self.short, *self.long), default=0.0),
            original_context_length=self.original_context_length,
            attention_factor=self.attention_factor,
        )
        if len(self.short) != len(self.long):
            raise ValueError(
                f"rope scaling: the lists for short and long contexts must have the same length, got {len(self.short)} "
                f"and {len(self.long)}"
            )

    def divisors(self, exact: Frequencies, context_length: int) -> Frequencies:
        """The divisor of each inverse frequency."""
        return self.long if self.is_long(context_length) else self.short

    def is_long(self, context_length: int) -> bool:
        """Whether a context of this length uses the list for longer ones."""
        return context_length > self.original_context_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedScaling:
    """One divisor per pair, as a GGUF file stores the result of Llama 3's scaling."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        check_positive("rope scaling", smallest_divisor=min(self.values, default=0.0))

    def divisors(self, exact: Frequencies, context_length: int) -> Frequencies:
        """The divisor of each inverse frequency."""
        return self.values


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | ListedScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: rotates pair `i` of a head by `position * inverse_frequencies[i]` radians.

    rotary_dim: number of elements at the start of a head that are rotated. None: the whole head.
    """

    theta: float
    scaling: Scaling | None = None
    rotary_dim: int | None = None

    def __post_init__(self) -> None:
        check_positive("rope", theta=self.theta)

    def check(self, head_dim: int) -> None:
        """Raises ValueError unless heads of this size can be rotated."""
        rotated = head_dim if self.rotary_dim is None else self.rotary_dim
        if rotated % 2:
            raise ValueError(
                f"{'head_dim' if self.rotary_dim is None else 'rotary_dim'} must be even, because rope rotates pairs "
                f"of elements, got {rotated}"
            )
        if not 2 <= rotated <= head_dim:
            raise ValueError(f"rotary_dim must be 2 to head_dim ({head_dim}), got {rotated}")
        listed = {ListedScaling: "values", LongRopeScaling: "short"}.get(type(self.scaling))
        if listed is not None and len(getattr(self.scaling, listed)) != rotated // 2:
            raise ValueError(
                f"rope scaling must list a divisor for each of {rotated // 2} pairs, got "
                f"{len(getattr(self.scaling, listed))}"
            )

    def inverse_frequencies(self, head_dim: int, context_length: int) -> tuple[float, ...]:
        """Radians per position of each rotated pair, including scaling."""
        size = head_dim if self.rotary_dim is None else self.rotary_dim
        exact = tuple(self.theta ** -(i / size) for i in range(0, size, 2))
        if self.scaling is None:
            return exact
        divisors = self.scaling.divisors(exact, context_length)
        return tuple(frequency / divisor for frequency, divisor in zip(exact, divisors, strict=True))

    @property
    def attention_factor(self) -> float:
        """The factor that rotated queries and keys are multiplied by."""
        match self.scaling:
            case YarnScaling(attention_factor=None, factor=factor):
                return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
            case YarnScaling(attention_factor=float(given)) | LongRopeScaling(attention_factor=given):
                return given
        return 1.0


def check_positive(where: str, **values: float) -> None:
    """Raises ValueError that names the value, unless all are finite numbers above 0."""
    for name, value in values.items():
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{where}: {name} must be a finite number > 0, got {value!r}")


def _blend(kept: float, factor: float) -> float:
    """The divisor if the fraction `kept` of a frequency, clipped to [0, 1], is not divided by `factor`."""
    kept = min(max(kept, 0.0), 1.0)
    return 1.0 / (kept + (1.0 - kept) / factor)
