"""Drafts by prompt lookup: what followed the last tokens where the same ones stood before. No jax.

Source: https://github.com/apoorvumang/prompt-lookup-decoding; vLLM calls it "ngram".
"""

from collections.abc import Sequence
from typing import NamedTuple

PRIOR = 4.0  # tokens that a request's own acceptance must outweigh
FADING = 0.97  # weight of a tested token after each later one


class Draft(NamedTuple):
    """Tokens that may follow, and for each the estimated probability that it is right if those before it are."""

    tokens: list[int]
    odds: list[float]


NO_DRAFT = Draft([], [])


class Acceptance:
    """How many of the tested tokens were right, the latest counting most, for each kind of draft."""

    def __init__(self, prior: "Acceptance | float" = 0.5):
        self._prior = prior
        self._counts: dict[int, tuple[float, float]] = {}  # right, tested

    def odds(self, kind: int) -> float:
        """The estimated probability that a token of such a draft is right."""
        right, tested = self._counts.get(kind, (0.0, 0.0))
        prior = self._prior.odds(kind) if isinstance(self._prior, Acceptance) else self._prior
        return (right + PRIOR * prior) / (tested + PRIOR)

    def forget(self, kind: int) -> None:
        """Weakens what is known a little, so that drafts that did not pay are tried again one day."""
        right, tested = self._counts.get(kind, (0.0, 0.0))
        self._counts[kind] = right * FADING, tested * FADING

    def add(self, kind: int, num_right: int, *, missed: bool) -> None:
        """Counts the tokens of a draft that were right, and whether one was wrong behind them."""
        right, tested = self._counts.get(kind, (0.0, 0.0))
        fade = FADING ** (num_right + missed)
        self._counts[kind] = right * fade + num_right, tested * fade + num_right + missed
        if isinstance(self._prior, Acceptance):
            self._prior.add(kind, num_right, missed=missed)


class Lookup:
    """The n-grams of one text that grows, and the draft that they give for its end.

    A draft is compared with the tokens that come, whether the device verified it or not: so acceptance is known for
    what was not tried too.
    """

    def __init__(self, shortest: int, longest: int, length: int, acceptance: Acceptance):
        self._sizes = range(longest, shortest - 1, -1)
        self._length = length
        self._acceptance = Acceptance(acceptance)
        self._tokens: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in self._sizes]  # where an n-gram was followed last
        self._draft: list[int] = []  # what is expected next
        self._size = 0  # of the match

    def follow(self, tokens: Sequence[int]) -> None:
        """Takes the text, which has grown since the last call."""
        for token in tokens[len(self._tokens) :]:
            if self._draft and self._draft[0] == token:
                self._acceptance.add(self._size, 1, missed=False)
                del self._draft[0]
            elif self._draft:
                self._acceptance.add(self._size, 0, missed=True)
                self._draft = []
            self._enter(token)

    def _enter(self, token: int) -> None:
        """Adds a token; the n-grams before it are now followed by it."""
        end = len(self._tokens)
        for size, after in zip(self._sizes, self._after, strict=True):
            if end >= size:
                after[tuple(self._tokens[end - size :])] = end
        self._tokens.append(token)

    def draft(self) -> Draft:
        """What followed the longest n-gram at the end of the text where it stood last."""
        if len(self._draft) < self._length:
            self._look_up()
        odds = self._acceptance.odds(self._size)
        return Draft(self._draft[: self._length], [odds] * min(len(self._draft), self._length))

    def _look_up(self) -> None:
        end = len(self._tokens)
        for size, after in zip(self._sizes, self._after, strict=True):
            start = after.get(tuple(self._tokens[end - size :])) if end >= size else None
            if start is not None:
                # a copy that reaches the end of the text goes on with itself: a period repeats
                period = end - start
                self._draft = [self._tokens[start + i % period] for i in range(2 * self._length)]
                self._size = size
                return
        self._draft = []
