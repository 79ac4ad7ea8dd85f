"""An engine's record of a request: its continuations and their states. No jax, no clock."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jfa_models.decoding.adapters import Loaded
from jfa_models.decoding.completion import Completion
from jfa_models.decoding.outputs import Logprob, RequestMetrics, RequestOutput
from jfa_models.decoding.params import MAX_LOGPROBS, SamplingParams
from jfa_models.engine.beams import BeamSearch
from jfa_models.text.guided import Guide

OnOutput = Callable[[RequestOutput], None]

GREEDY = SamplingParams(temperature=0.0)
CANDIDATES = SamplingParams(temperature=0.0, logprobs=MAX_LOGPROBS)  # for a beam
NO_SEED = np.random.SeedSequence(0)


class Continuation:
    """One continuation of a prompt: a row of the steps while it runs, and a sequence of the page allocator.

    Attributes:
      order: scheduling order, the smallest first; unique.
      tokens: the prompt and all generated tokens whose ids the host knows.
      num_tokens: the number of these, plus one for a token that is sampled in a step whose result was not read yet.
      num_computed: how many of them have their keys and values in pages, or will have after the last launched step.
      num_committed: how many of them the prefix cache was told of.
      num_drafted: how many of them also have a draft model's keys and values in its pages, and its states in the slot.
      limit: the num_tokens at which sampling stops.
      draws: the device samples its next token; for a beam the host chooses it.
      reported: for a beam: its last token's successors are computed or being computed, and none is chosen yet.
      slot: where the device keeps its last token; None unless it runs. is_new: the slot is not initialized yet.
      followers: other continuations of the same prompt, to be forked off when the prompt is computed.
    """

    def __init__(
        self,
        request: "Request",
        index: int,
        tokens: Sequence[int],
        *,
        limit: int,
        params: SamplingParams,
        seed: np.random.SeedSequence,
        draws: bool = True,
        completion: Completion | None = None,
    ):
        self.request = request
        self.order = (request.priority, request.number, index)
        self.tokens = list(tokens)
        self.num_prompt = len(request.prompt_ids)
        self.num_tokens = len(self.tokens)
        self.num_computed = 0
        self.num_committed = 0
        self.num_drafted = 0
        self.limit = limit
        self.params = params
        self.seed = seed
        self.draws = draws
        self.completion = completion
        self.reported = False
        self.finished = False
        self.slot: int | None = None
        self.is_new = False
        self.followers: list[Continuation] = []

    @property
    def num_new(self) -> int:
        """Tokens to compute before the next one can be sampled; 0: there is nothing to do."""
        return 0 if self.reported or self.num_tokens >= self.limit else self.num_tokens - self.num_computed

    @property
    def guide(self) -> Guide | None:
        """Allows the tokens that its form permits; None: all."""
        return None if self.completion is None else self.completion.guide

    def __repr__(self) -> str:
        return f"Continuation({self.request.id!r}, {self.order[2]})"


@dataclasses.dataclass(kw_only=True, eq=False)
class Request:
    """A prompt, its continuations and their results."""

    id: str
    number: int
    prompt: str | None
    prompt_ids: tuple[int, ...]
    priority: int
    arrival: float
    on_output: OnOutput | None = None
    is_streamed: bool = False  # its results go only to on_output
    adapter: Loaded | None = None
    num_prompt_logprobs: int | None = None
    continuations: list[Continuation] = dataclasses.field(default_factory=list)  # the live ones
    completions: list[Completion] = dataclasses.field(default_factory=list)
    beams: BeamSearch | None = None
    num_beams: int = 0  # created so far
    prompt_logprobs: dict[int, dict[int, Logprob]] = dataclasses.field(default_factory=dict)  # by prompt position
    first_token: float | None = None
    ended: float | None = None
    error: str | None = None

    @property
    def salt(self) -> bytes:
        """What cached keys and values depend on, apart from tokens: pages of one adapter serve no other."""
        return b"" if self.adapter is None else self.adapter.number.to_bytes(8)

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self.ended is not None

    @property
    def num_generated(self) -> int:
        """Number of tokens of all its continuations so far."""
        return sum(len(one.token_ids) for one in self.completions)

    def new_beam(self, tokens: Sequence[int]) -> Continuation:
        """Creates another beam of its search; tokens includes the prompt."""
        assert self.beams is not None
        self.num_beams += 1
        limit = len(self.prompt_ids) + self.beams.params.max_tokens
        return Continuation(self, self.num_beams, tokens, limit=limit, params=CANDIDATES, seed=NO_SEED, draws=False)

    def output(self) -> RequestOutput:
        """The result so far."""
        prompt_logprobs = None
        if self.num_prompt_logprobs is not None and self.first_token is not None:
            prompt_logprobs = tuple(self.prompt_logprobs.get(place) for place in range(len(self.prompt_ids)))
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=tuple(one.output() for one in self.completions),
            prompt_logprobs=prompt_logprobs,
            request_id=self.id,
            error=self.error,
            metrics=RequestMetrics(arrival=self.arrival, first_token=self.first_token, finished=self.ended),
        )
