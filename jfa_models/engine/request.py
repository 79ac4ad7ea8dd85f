"""What an engine knows of a request: its continuations, and where each of them stands. No jax, no clock."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jfa_models.decoding.completion import Completion
from jfa_models.decoding.outputs import Logprob, RequestMetrics, RequestOutput
from jfa_models.decoding.params import MAX_LOGPROBS, SamplingParams
from jfa_models.engine.beams import BeamSearch

OnOutput = Callable[[RequestOutput], None]

GREEDY = SamplingParams(temperature=0.0)
CANDIDATES = SamplingParams(temperature=0.0, logprobs=MAX_LOGPROBS)  # of a beam
NO_SEED = np.random.SeedSequence(0)


class Continuation:
    """One continuation of a prompt: a row of the steps while it runs, and a sequence of the page allocator.

    Attributes:
      order: who goes first, the smallest; of unique values.
      tokens: the prompt and all tokens behind it whose id the host knows.
      num_tokens: those, and the one that was drawn in a step whose result is on its way.
      num_computed: how many of them have their keys and values in pages, or will have when the last step is done.
      limit: num_tokens at which nothing more is drawn.
      draws: the device draws its next token; of a beam the host chooses it.
      reported: of a beam: its last token's successors are known or on their way, and the choice is not made.
      slot: where the device keeps its last token; None unless it runs. is_new: since this step.
      followers: continuations of the same prompt, to be forked off when the prompt is computed.
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
        """Tokens that a step must compute before the next one can be drawn; 0: there is nothing to do."""
        return 0 if self.reported or self.num_tokens >= self.limit else self.num_tokens - self.num_computed

    def __repr__(self) -> str:
        return f"Continuation({self.request.id!r}, {self.order[2]})"


@dataclasses.dataclass(kw_only=True, eq=False)
class Request:
    """A prompt and what becomes of it."""

    id: str
    number: int
    prompt: str | None
    prompt_ids: tuple[int, ...]
    priority: int
    arrival: float
    on_output: OnOutput | None = None
    is_streamed: bool = False  # its results go to on_output alone
    num_prompt_logprobs: int | None = None
    continuations: list[Continuation] = dataclasses.field(default_factory=list)  # those that live
    completions: list[Completion] = dataclasses.field(default_factory=list)
    beams: BeamSearch | None = None
    num_beams: int = 0  # so far
    prompt_logprobs: dict[int, dict[int, Logprob]] = dataclasses.field(default_factory=dict)  # by place in the prompt
    first_token: float | None = None
    ended: float | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.ended is not None

    @property
    def num_generated(self) -> int:
        """Tokens of all its continuations so far."""
        return sum(len(one.token_ids) for one in self.completions)

    def new_beam(self, tokens: Sequence[int]) -> Continuation:
        """Another beam of its search, with these tokens, the prompt's among them."""
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
