"""One continuation while it is generated: its tokens, its text, and its end. Runs on the host."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jfa_models.decoding.draft_tree import DraftTree
from jfa_models.decoding.outputs import CompletionOutput, FinishReason, Logprob
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.sampling import NO_TOKEN, Sampled
from jfa_models.text.guided import EVERYTHING, GrammarError, Guide, fill
from jfa_models.text.tokenizer import Tokenizer

# Number of prompt tokens that are decoded together with the first new token: enough to complete a character, and to
# keep the leading space of the new token, which some tokenizers drop at the start of a text.
TEXT_CONTEXT = 8

NOT_FINITE = (
    "the logits are not finite, so there is no next token: a weight is damaged, or the model overflows its dtype; "
    "load it with dtype='bfloat16' or 'float32'"
)


class Completion:
    """One continuation of a prompt: takes tokens one by one and produces text.

    Attributes:
      token_ids: all tokens so far, including the one that ended it.
      finish_reason: None until it ends.
      error: why it ended with finish_reason "error".
      max_tokens: maximum number of tokens.
      guide: allows the tokens that its form permits; None: all.
      cumulative_logprob: sum of the log-probabilities of its tokens; None if they are not computed.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        index: int = 0,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
        guide: Guide | None = None,
    ):
        self.params = params
        self.guide = guide
        self.max_tokens = max_tokens
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._stop_reason: str | int | None = None
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self._tokenizer = tokenizer
        # stop strings that are special tokens: they also end the text where the model writes that token
        special = {stop: tokenizer.special_token_id(stop) for stop in params.stop} if tokenizer else {}
        self._special_stops = {token: stop for stop, token in special.items() if token is not None}
        self._stream = tokenizer.stream(skip_special_tokens=params.skip_special_tokens) if tokenizer else None
        if self._stream:
            for token in prompt_ids[-TEXT_CONTEXT:]:
                self._stream.push(token)
        self._text = ""
        self._stops_from = 0
        self._eos_token_ids = frozenset(eos_token_ids)

    @property
    def finished(self) -> bool:
        """Whether it has ended and takes no more tokens."""
        return self.finish_reason is not None

    def push(self, sampled: Sampled, row: int) -> None:
        """Takes the token that the device sampled for a row."""
        token = int(sampled.token[row])
        if token == NO_TOKEN:
            self.fail(NOT_FINITE)
            return
        if self._logprobs is not None and self.cumulative_logprob is not None:
            entries = logprobs_of(sampled, row, self.params.logprobs, self._tokenizer)
            self._logprobs.append(entries)
            self.cumulative_logprob += entries[token].logprob
        self.take(token)

    def take(self, token: int) -> None:
        """Takes a token by its id, and ends if a stop condition is met."""
        self.token_ids.append(token)
        ended_by_id = self._ends(token)
        stop = self._special_stops.get(token) if ended_by_id else None
        includes_stop = self.params.include_stop_str_in_output
        if self._stream and (not ended_by_id or (includes_stop and stop is None)):
            self._text += self._stream.push(token)
        if ended_by_id:
            self.finish_reason = "stop"
            self._stop_reason = None if token in self._eos_token_ids else stop or token
        elif self._completes(token):
            self.finish_reason = "stop"
        elif self.error is None and len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finished and self._stream:
            self._text += self._stream.flush()
        was_cut = len(self.token_ids) > self.params.min_tokens and self._cut_at_stop_string()
        if len(self.token_ids) <= self.params.min_tokens:
            self._stops_from = len(self._text)
        if stop is not None and includes_stop and not was_cut:
            self._text += stop

    def fail(self, error: str) -> None:
        """Ends it with finish_reason "error"."""
        self.finish_reason, self.error = "error", error
        if self._stream:
            self._text += self._stream.flush()

    def _completes(self, token: int) -> bool:
        """Moves the guide behind a token; whether nothing can follow."""
        if self.guide is None:
            return False
        try:
            self.guide.accept([token])
        except GrammarError as error:
            self.finish_reason, self.error = "error", str(error)
            return False
        return self.guide.complete

    def end(self, reason: FinishReason) -> None:
        """Ends it for this reason, if it has not ended yet."""
        if not self.finished:
            self.finish_reason = reason

    def output(self) -> CompletionOutput:
        """The result so far. Until it ends, text that may be the start of a stop string is withheld."""
        text = self._text if self.finished else self._text[: len(self._text) - self._undecided()]
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=tuple(self.token_ids),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )

    def _ends(self, token: int) -> bool:
        is_eos = token in self._eos_token_ids and not self.params.ignore_eos
        return is_eos or token in self.params.stop_token_ids

    def _cut_at_stop_string(self) -> bool:
        """Cuts the text at the first stop string in it; whether there is one."""
        found = [(at, stop) for stop in self.params.stop if (at := self._text.find(stop, self._stops_from)) >= 0]
        if found:
            at, stop = min(found)
            self._text = self._text[: at + len(stop) if self.params.include_stop_str_in_output else at]
            self.finish_reason, self._stop_reason = "stop", stop
        return bool(found)

    def _undecided(self) -> int:
        """The length of the longest suffix of the text that is a prefix of a stop string."""
        return max(
            (n for stop in self.params.stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0
        )


def allowed_tokens(
    rows: Sequence[tuple[int, Completion | None, DraftTree | None]], num_rows: int, vocab_size: int
) -> Int32[np.ndarray, "rows words"] | None:
    """The masks of a step's rows; those of no completion with a guide allow everything. None: none has a guide.

    A completion whose guide can allow nothing more fails.

    Args:
      rows: the first row of each completion, and the drafts after whose tokens its next rows sample.
    """
    guided = [(row, one, one.guide, drafts) for row, one, drafts in rows if one is not None and one.guide is not None]
    guided = [each for each in guided if not each[1].finished]
    if not guided:
        return None
    masks = everything_allowed(num_rows, vocab_size)
    for row, one, guide, drafts in guided:
        if drafts:
            try:
                guide.allowed_after(drafts.tokens, masks[row : row + 1 + len(drafts)], drafts.parents)
            except GrammarError as error:
                one.fail(str(error))
    single = [(row, one, guide) for row, one, guide, drafts in guided if not drafts]
    filled = np.empty((len(single), masks.shape[1]), np.int32)
    failed = fill([guide for _, _, guide in single], filled)
    for place, (row, one, _) in enumerate(single):
        masks[row] = filled[place]
        if place in failed:
            one.fail(str(failed[place]))
    return masks


def everything_allowed(num_rows: int, vocab_size: int) -> Int32[np.ndarray, "rows words"]:
    """Masks that allow every token."""
    return np.full((num_rows, -(-vocab_size // 32)), EVERYTHING, np.int32)


def logprobs_of(sampled: Any, row: int, num_top: int | None, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """Logprobs of a row of Sampled by token id: the num_top most likely tokens, and always the sampled one."""
    assert sampled.logprob is not None and sampled.rank is not None
    token, chosen, rank = int(sampled.token[row]), float(sampled.logprob[row]), int(sampled.rank[row])
    entries = {}
    if sampled.top_ids is not None and sampled.top_logprobs is not None:
        likeliest = zip(sampled.top_ids[row].tolist(), sampled.top_logprobs[row].tolist(), strict=True)
        for place, (other, logprob) in enumerate(itertools.islice(likeliest, num_top), start=1):
            entries[other] = Logprob(logprob=logprob, rank=place, decoded_token=_token_text(tokenizer, other))
    entries.setdefault(token, Logprob(logprob=chosen, rank=rank, decoded_token=_token_text(tokenizer, token)))
    return entries


def _token_text(tokenizer: Tokenizer | None, token: int) -> str | None:
    # a model's vocabulary may be larger than its tokenizer's
    if tokenizer is None or tokenizer.core.id_to_token(token) is None:
        return None
    return tokenizer.token_text(token)
