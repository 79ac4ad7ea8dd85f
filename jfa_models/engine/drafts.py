"""Drafts by prompt lookup: what followed the last tokens where the same ones stood before. No jax.

Source: https://github.com/apoorvumang/prompt-lookup-decoding; vLLM calls it "ngram".
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

GUESS = 0.5  # probability that a drafted token is right, before any was tested
PRIOR = 4.0  # tokens that a request's own acceptance must outweigh
FADING = 0.97  # weight of a tested token after each later one


class Draft(NamedTuple):
    """Tokens that may follow, and for each the estimated probability that it is right if those before it are."""

    tokens: list[int]
    odds: list[float]


NO_DRAFT = Draft([], [])


class Acceptance:
    """How many of the tested tokens were right, the latest counting most, for each kind of draft."""

    def __init__(self, prior: "Acceptance | float" = GUESS):
        self._prior = prior
        self._counts: dict[Hashable, tuple[float, float]] = {}  # right, tested

    def odds(self, kind: Hashable) -> float:
        """The estimated probability that a token of such a draft is right."""
        right, tested = self._counts.get(kind, (0.0, 0.0))
        prior = self._prior.odds(kind) if isinstance(self._prior, Acceptance) else self._prior
        return (right + PRIOR * prior) / (tested + PRIOR)

    def forget(self, kind: Hashable) -> None:
        """Weakens what is known a little, so that drafts that did not pay are tried again one day."""
        right, tested = self._counts.get(kind, (0.0, 0.0))
        self._counts[kind] = right * FADING, tested * FADING

    def add(self, kind: Hashable, num_right: int, *, missed: bool) -> None:
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
        self._place = 0  # tokens of it that were right so far

    def follow(self, tokens: Sequence[int]) -> None:
        """Takes the text, which has grown since the last call."""
        for token in tokens[len(self._tokens) :]:
            if self._draft:
                is_right = self._draft[0] == token
                self._acceptance.add(self._kind(0), int(is_right), missed=not is_right)
                self._draft, self._place = (self._draft[1:], self._place + 1) if is_right else ([], 0)
            self._enter(token)

    def _kind(self, ahead: int) -> tuple[int, int]:
        """What the odds of a drafted token depend on: the size of the match, and how many tokens are right since it."""
        return self._size, (self._place + ahead).bit_length()

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
        tokens = self._draft[: self._length]
        return Draft(tokens, [self._acceptance.odds(self._kind(i)) for i in range(len(tokens))])

    def _look_up(self) -> None:
        end = len(self._tokens)
        for size, after in zip(self._sizes, self._after, strict=True):
            start = after.get(tuple(self._tokens[end - size :])) if end >= size else None
            if start is not None:
                # a copy that reaches the end of the text goes on with itself: a period repeats
                period = end - start
                self._draft = [self._tokens[start + i % period] for i in range(2 * self._length)]
                if not self._place:
                    self._size = size
                return
        self._draft, self._place = [], 0
