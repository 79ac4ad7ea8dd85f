"""Decides which drafted tokens the next step of an engine verifies. No jax.

A draft comes from the grammar of a request, where it leaves only one possibility, or from a proposer. How many tokens
of it are verified is decided by their odds and by the measured times of steps (pace.py).
"""

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

from jfa_models.decoding.draft_tree import DraftTree
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.speculation import TREES, SpeculativeConfig
from jfa_models.engine.drafts import Acceptance, Draft, Lookup
from jfa_models.engine.pace import Pace
from jfa_models.engine.request import Continuation
from jfa_models.text.guided import GrammarError

LONGEST_FORCED = 16  # tokens that a grammar forces, in one step
GRAMMAR = "grammar"  # the method of tokens that a grammar forces


class Proposer(Protocol):
    """Drafts the next tokens of continuations whose tokens are all known."""

    def gains(self, one: Continuation) -> Sequence[float]:
        """For each token of the draft that can be had, the probability that it is accepted, the likeliest first."""
        ...

    def draft(self, lengths: Mapping[Continuation, int]) -> Mapping[Continuation, DraftTree]:
        """Drafts of at most these lengths. Tokens that a grammar forbids are never accepted, and better left out."""
        ...

    def judge(self, one: Continuation, draft: DraftTree, path: Sequence[int], sampled: Sequence[int]) -> None:
        """Tells what came of a verified draft.

        Args:
          draft: its first tokens, as many as were verified.
          path: the indices of those accepted.
          sampled: the model's token after the text, then those after each drafted token.
        """
        ...

    def warm_up(self, params: Sequence[SamplingParams]) -> None:
        """Compiles what drafts for such requests need."""
        ...


class NgramProposer:
    """Prompt lookup."""

    def __init__(self, config: SpeculativeConfig):
        self._config = config
        self._acceptance = Acceptance()
        self._lookups: WeakKeyDictionary[Continuation, Lookup] = WeakKeyDictionary()

    def gains(self, one: Continuation) -> Sequence[float]:
        return list(itertools.accumulate(self.lookup(one).odds, operator.mul))

    def lookup(self, one: Continuation) -> Draft:
        """The longest draft that its text gives."""
        if one not in self._lookups:
            config = self._config
            self._lookups[one] = Lookup(
                config.prompt_lookup_min, config.prompt_lookup_max, config.length, self._acceptance
            )
        self._lookups[one].follow(one.tokens)
        return self._lookups[one].draft()

    def draft(self, lengths: Mapping[Continuation, int]) -> Mapping[Continuation, DraftTree]:
        return {one: permitted(one, self.lookup(one).tokens[:length]) for one, length in lengths.items()}

    def judge(self, one: Continuation, draft: DraftTree, path: Sequence[int], sampled: Sequence[int]) -> None:
        """Nothing: a lookup judges its drafts itself, also those that were not verified."""

    def warm_up(self, params: Sequence[SamplingParams]) -> None:
        """Nothing: it runs on the host."""


class Speculated(NamedTuple):
    """Counts of one method: tokens drafted and verified, those of them accepted, and the drafts they belonged to.

    tokens_per_step: mean tokens that a row got from a step that verified a draft.
    """

    proposed: int = 0
    accepted: int = 0
    drafts: int = 0

    @property
    def tokens_per_step(self) -> float | None:
        """None before the first draft."""
        return 1 + self.accepted / self.drafts if self.drafts else None


class Speculator:
    """Plans the drafts of each step.

    Attributes:
      is_timed: whether the planned step has a time to compare: not if drafts were made and none is verified.
      counts: by method; "grammar": tokens that a grammar forced.
    """

    def __init__(
        self,
        config: SpeculativeConfig | None,
        proposer: Proposer | None,
        shapes: Callable[[int], Sequence[tuple[int, int]]],
        *,
        longest: int,
    ):
        """longest: tokens that a row of the cache has room for.

        shapes: of the steps that a number of rows can take: (rows, tokens), first the one without drafts.
        """
        self._method = None if config is None else config.method
        self._longest = longest
        self._proposer = proposer
        self._shapes = shapes
        self._pace = Pace(adaptive=config is None or config.adaptive)
        self._forced: set[Continuation] = set()
        self._verified = self._accepted = 0  # rows of the last step with drafts, and accepted tokens
        self._is_due = False  # whether the next step asks the proposer
        self.is_timed = True
        self.counts: dict[str, Speculated] = {} if config is None else {config.method: Speculated()}

    def warm_up(self, params: Sequence[SamplingParams]) -> None:
        """Compiles what drafts for such requests need."""
        if self._proposer is not None:
            self._proposer.warm_up(params)

    def looks(self, running: Sequence[Continuation]) -> bool:
        """Whether the next step must be planned with known results: for drafts, or for the masks of a grammar."""
        self._is_due = self._proposer is not None and self._pace.looks()
        return self._is_due or any(one.guide is not None for one in running)

    def plan(self, rows: Sequence[Continuation]) -> dict[Continuation, DraftTree]:
        """The drafts to verify in a step that computes just the next token of these continuations."""
        shapes = self._shapes(len(rows)) if rows else [(0, 0)]
        budget = shapes[-1][1] - len(rows)  # drafted tokens that the largest step takes
        drafts: dict[Continuation, DraftTree] = {}
        rooms = {one: one.limit - one.num_tokens - 1 for one in rows if one.draws}
        for one, room in rooms.items():
            if one.guide is not None and (forced := _forced(one, min(room, budget, LONGEST_FORCED))):
                drafts[one] = DraftTree(forced)
                budget -= len(forced)
        self._forced, self.is_timed, self._verified, self._accepted = set(drafts), True, 0, 0
        if self._proposer is None or not self._is_due or not budget:
            return drafts
        # a tree may have more tokens than can still come: it has several for each place
        most = {one: self._longest - one.num_tokens if self._method in TREES else room for one, room in rooms.items()}
        free = {one for one, room in rooms.items() if one not in drafts and room > 0}
        gains = [self._proposer.gains(one)[: most[one]] if one in free else () for one in rows]
        lengths = self._pace.lengths(gains, [shapes[0], *(one for one in shapes[1:] if one[1] <= len(rows) + budget)])
        wanted = {one: length for one, length in zip(rows, lengths, strict=True) if length}
        num_forced = len(drafts)
        for one, draft in (self._proposer.draft(wanted) if wanted else {}).items():
            if draft and budget:
                drafts[one] = draft.first(budget)
                budget -= len(drafts[one])
        self.is_timed = not wanted or len(drafts) > num_forced
        self._verified = len(rows) * (len(drafts) > num_forced)
        return drafts

    def judge(self, one: Continuation, draft: DraftTree, path: Sequence[int], sampled: Sequence[int]) -> None:
        """Counts a verified draft; see Proposer."""
        forced = one in self._forced
        method = GRAMMAR if forced else self._method
        assert method is not None
        self._accepted += len(path)
        before = self.counts.get(method, Speculated())
        self.counts[method] = Speculated(before.proposed + len(draft), before.accepted + len(path), before.drafts + 1)
        if not forced and self._proposer is not None:
            self._proposer.judge(one, draft, path, sampled)

    def time(self, shape: tuple[int, int], seconds: float) -> None:
        """Records the seconds of a step of this shape."""
        if self._verified:
            won, plain = self._accepted / self._verified, self._shapes(self._verified)[0]
            self._pace.time(*shape, seconds, plain=plain, won=won)
        else:
            self._pace.time(*shape, seconds)


def permitted(one: Continuation, draft: Sequence[int]) -> DraftTree:
    """The draft up to the first token that the form of a continuation forbids."""
    return DraftTree(draft if one.guide is None else draft[: one.guide.permitted(draft)])


def _forced(one: Continuation, limit: int) -> list[int]:
    """The next tokens of a continuation, as far as its form leaves only one possibility."""
    assert one.guide is not None
    try:
        return one.guide.forced(limit)
    except GrammarError:
        return []  # the mask of the next step reports it
