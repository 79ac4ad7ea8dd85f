"""Processes the results of a step: tokens for each request, text from tokens, and how requests end. No jax."""

import collections
from collections.abc import Callable

from jfa_models.decoding.completion import NOT_FINITE, Completion, logprobs_of
from jfa_models.decoding.draft_tree import DraftTree
from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.outputs import FinishReason, RequestOutput
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.sampling import NO_TOKEN, Sampled
from jfa_models.engine.beams import Beam, BeamSearch
from jfa_models.engine.launch import Launched
from jfa_models.engine.request import Continuation, Request
from jfa_models.engine.scheduler import Scheduler
from jfa_models.engine.speculator import Speculator


class Results:
    """The unfinished requests of an engine, and the results of finished ones.

    Attributes:
      requests: unfinished requests by id.
      ended: results not yet returned to the caller.
    """

    def __init__(self, model: LanguageModel, scheduler: Scheduler, speculator: Speculator, clock: Callable[[], float]):
        self.model = model
        self.scheduler = scheduler
        self.speculator = speculator
        self._clock = clock
        self.requests: dict[str, Request] = {}
        self.ended: collections.deque[RequestOutput] = collections.deque()
        self.generated_tokens = self.finished_requests = 0
        self._begun_requests = self._tokens_after = 0
        self._seconds_to_first = self._seconds_after = 0.0

    @property
    def time_to_first_token(self) -> float | None:
        """Mean in seconds, over the requests that have a first token."""
        return self._seconds_to_first / self._begun_requests if self._begun_requests else None

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between tokens, over the continuations that finished normally."""
        return self._seconds_after / self._tokens_after if self._tokens_after else None

    def collect(self, launched: Launched) -> None:
        """Reads the results of a step and adds them to their requests."""
        sampled, prompt_logprobs = launched.read()
        now = self._clock()
        tokenizer = self.model.tokenizer
        for request, place, first, count in launched.prompts:
            for i in range(count):
                entries = logprobs_of(prompt_logprobs, first + i, request.num_prompt_logprobs, tokenizer)
                request.prompt_logprobs.setdefault(place + i, entries)
        grown: dict[Request, None] = {}
        for row, one, drafts in launched.chunks:
            assert sampled is not None
            request = one.request
            if one.finished or request.finished:
                continue  # sampled before its end was known
            if request.first_token is None:
                request.first_token = now
                self._begun_requests += 1
                self._seconds_to_first += now - request.arrival
            grown[request] = None
            try:
                if request.beams is not None:
                    self._report(request, request.beams, one, sampled, row)
                else:
                    self._push(one, sampled, row, drafts, now)
            except Exception as error:  # its text cannot be decoded: only this request ends
                self._fail(request, error)
        for request in grown:
            if not request.finished:
                self._show(request)

    def _push(self, one: Continuation, sampled: Sampled, row: int, drafts: DraftTree, now: float) -> None:
        """Takes the tokens that a step gave a continuation: one after each accepted draft, and the first."""
        assert one.completion is not None
        path, node = [], -1  # the accepted drafts, and the last one
        while True:
            if one.completion.error is None:  # its guide may have failed at the mask
                one.completion.push(sampled, row + 1 + node)
            if one.completion.error is not None:
                one.request.error = one.completion.error
                self.end(one.request, "error")
                return
            token = one.completion.token_ids[-1]
            one.tokens.append(token)
            self.generated_tokens += 1
            child = drafts.child(node, token)
            if child is not None:
                path.append(child)
            if one.completion.finished or child is None:
                break
            node = child
        if drafts:
            self.speculator.judge(one, drafts, path, sampled.token[row : row + 1 + len(drafts)].tolist())
        if one.completion.finished:
            self.scheduler.finish(one)
            self._count(one.request, one.completion, now)
        else:
            self.scheduler.keep(one, len(path))

    def _count(self, request: Request, completion: Completion, now: float) -> None:
        assert request.first_token is not None
        self._seconds_after += now - request.first_token
        self._tokens_after += len(completion.token_ids) - 1

    def _report(self, request: Request, beams: BeamSearch, one: Continuation, sampled: Sampled, row: int) -> None:
        """Records a beam's successors; chooses the next beams once all have reported."""
        assert sampled.top_ids is not None and sampled.top_logprobs is not None
        if sampled.token[row] == NO_TOKEN:
            request.error = NOT_FINITE
            self.end(request, "error")
            return
        width = 2 * beams.params.beam_width
        ids, logprobs = sampled.top_ids[row, :width].tolist(), sampled.top_logprobs[row, :width].tolist()
        parents = request.continuations
        if not beams.report(parents.index(one), list(zip(ids, logprobs, strict=True))):
            return
        chosen = beams.choose()
        continued = {place: token for place, token in reversed(chosen)}  # the first child reuses its parent's record
        for place, parent in enumerate(parents):
            if place not in continued:
                self.scheduler.finish(parent)
        live = []
        for place, token in chosen:
            child = parents[place]
            if child in live:
                child = request.new_beam([*parents[place].tokens, token])
                self.scheduler.fork(parents[place], child)
            live.append(child)
        for place, token in continued.items():
            self.scheduler.choose(parents[place], token)
        request.continuations = live
        if beams.done:
            request.completions = [
                self._completion_of(request, index, found.beam) for index, found in enumerate(beams.hypotheses)
            ]
            self.generated_tokens += request.num_generated
            for completion in request.completions[:1]:
                self._count(request, completion, self._clock())

    def _completion_of(self, request: Request, index: int, beam: Beam) -> Completion:
        assert request.beams is not None
        params = SamplingParams(
            temperature=0.0, max_tokens=request.beams.params.max_tokens, ignore_eos=request.beams.params.ignore_eos
        )
        completion = self.model.completion(request.prompt_ids, params, index=index)
        for token in beam.tokens:
            completion.take(token)
        completion.cumulative_logprob = beam.total
        return completion

    def _show(self, request: Request) -> None:
        """Calls on_output of a request that grew, or ends the request if it is done."""
        done = request.beams.done if request.beams is not None else all(one.finished for one in request.completions)
        if done:
            self.end(request)
        elif request.on_output is not None and request.beams is None:
            try:
                request.on_output(request.output())
            except Exception as error:  # the caller's code: only this request ends
                self._fail(request, error, "on_output raised ")

    def _fail(self, request: Request, error: Exception, what: str = "") -> None:
        request.error = f"{what}{error!r}"
        self.end(request, "error")

    def end(self, request: Request, reason: FinishReason | None = None) -> None:
        """Frees everything that a request holds. reason: finish_reason of completions that are unfinished."""
        request.ended = self._clock()
        for one in request.continuations:
            if not one.finished:
                self.scheduler.finish(one)
        if reason is not None and request.beams is not None:
            found = [*(one.beam for one in request.beams.hypotheses), *request.beams.live]
            request.completions = [
                self._completion_of(request, index, beam)
                for index, beam in enumerate(found[: request.beams.params.beam_width])
            ]
        for completion in request.completions:
            if reason is not None:
                completion.end(reason)
            request.error = request.error or completion.error  # it was aborted before its failure was seen
        del self.requests[request.id]
        self.model.adapters.release(request.adapter)
        self.finished_requests += 1
        # after an error of the caller's own on_output it is not called again; a stream has no other way to end
        if request.on_output is not None and (reason != "error" or request.is_streamed):
            try:
                request.on_output(request.output())
            except Exception as error:
                request.error = f"on_output raised {error!r}"
        if not request.is_streamed:
            self.ended.append(request.output())
