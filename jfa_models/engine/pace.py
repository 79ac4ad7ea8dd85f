"""How many drafted tokens a step verifies: those that give the most tokens per second, by measured times. No jax."""

import heapq
from collections.abc import Sequence

LOOK_EVERY = 8  # steps between two looks at the drafts while they do not pay
PLAIN_EVERY = 64  # steps with drafts between two without, which are timed to compare
FIRST_GUESS = 0.02  # of a step's time, per drafted token, until a step of that size was timed
STAKE = 2.0  # steps that drafts may lose at first
MOST_STAKE = 4.0  # steps that they may lose after they won as many
ALLOWANCE = 0.04  # steps that they may lose for each step without
MARGIN = 1.1  # how many times as many tokens per second must be expected of drafts as without: odds are guesses
FADING = 0.8  # weight of a timing after each later one


class Pace:
    """Times of steps by their shape, and the sizes of drafts that follow from them.

    Odds can be wrong, so what drafts may lose is bounded: they play for a stake, in steps, to which each step without
    drafts adds a little.
    """

    def __init__(self, *, adaptive: bool):
        self._adaptive = adaptive
        self._seconds: dict[tuple[int, int], float] = {}  # of a step, by its numbers of rows and tokens
        self._compiled: set[tuple[int, int]] = set()
        self._steps_without = self._steps_with = 0
        self._stake = STAKE

    def time(
        self, rows: int, tokens: int, seconds: float, *, plain: tuple[int, int] | None = None, won: float = 0.0
    ) -> None:
        """Records the seconds of a step of this shape; the first one, which may have compiled, does not count.

        plain: of a step with drafts: the shape that it would have without. won: accepted tokens of each row, a mean.
        """
        shape = rows, tokens
        if shape not in self._compiled:
            self._compiled.add(shape)
            return
        before = self._seconds.get(shape, seconds)
        # a step that something else delayed must not look slow for long
        self._seconds[shape] = min(before * FADING + seconds * (1 - FADING), 2 * before)
        gain = ALLOWANCE
        if plain is not None and plain in self._seconds:
            gain = 1 + won - self._seconds[shape] / self._seconds[plain]
        self._stake = min(self._stake + gain, MOST_STAKE)

    def looks(self) -> bool:
        """Whether the next step should be planned with drafts, for which the last results are needed first."""
        self._steps_without += 1
        return not self._adaptive or self._steps_without <= LOOK_EVERY or self._steps_without % LOOK_EVERY == 0

    def lengths(self, gains: Sequence[Sequence[float]], shapes: Sequence[tuple[int, int]]) -> list[int]:
        """How many tokens of each draft to verify.

        Args:
          gains: for each row, the probability that each drafted token is accepted, the likeliest first.
          shapes: the shapes that a step of these rows can have: the first without drafts.
        """
        chosen = self._best(gains, shapes) if self._adaptive else [len(one) for one in gains]
        if any(chosen):
            self._steps_without = 0
            self._steps_with += 1
        return chosen

    def _best(self, gains: Sequence[Sequence[float]], shapes: Sequence[tuple[int, int]]) -> list[int]:
        best, lengths = [0] * len(gains), [0] * len(gains)
        next_of_rows = [(-one[0], row) for row, one in enumerate(gains) if one]
        heapq.heapify(next_of_rows)
        plain = self._seconds.get(shapes[0])
        if self._steps_with >= PLAIN_EVERY:
            self._steps_with = 0
            plain = None
        if plain is None or not next_of_rows or self._stake <= 0:
            return best
        expected, num_tokens = float(len(gains)), len(gains)
        best_rate = MARGIN * expected / plain
        for rows, size in shapes[1:]:
            while next_of_rows and num_tokens < size:
                gain, row = heapq.heappop(next_of_rows)
                expected -= gain
                num_tokens += 1
                lengths[row] += 1
                if lengths[row] < len(gains[row]):
                    heapq.heappush(next_of_rows, (-gains[row][lengths[row]], row))
            seconds = self._seconds.get((rows, size), plain * (1 + FIRST_GUESS * (size - len(gains))))
            if (rate := expected / seconds) > best_rate:
                best, best_rate = lengths.copy(), rate
        return best
