"""What a request gives back, under vLLM's names. Plain values: nothing here holds a device array."""

import dataclasses
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprob:
    """The natural-log probability of one token under the raw logits, before bias, penalties and temperature.

    `rank` is 1 for the likeliest token, and None where it was not computed. `decoded_token` is the token's own text
    where somebody decoded it; half a character decodes to U+FFFD.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt.

    `text` ends before the stop string that ended it; `token_ids` holds every token that was generated, the one that
    ended it included. `cumulative_logprob` is the sum over `token_ids`, `logprobs` has one mapping from token id to
    Logprob per token: the most likely ones and always the chosen one; both are None unless logprobs were asked for.
    `finish_reason` is "stop" (an end or stop token, or a stop string; `stop_reason` says which, None for the model's
    own end token), "length" (max_tokens or the model's context), or None while it is still growing.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[Mapping[int, Logprob], ...] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt and its continuations. `prompt` is None where token ids were given.

    `prefill_ms` is the time to the first token, `decode_ms` the time of all the later ones; where requests ran as one
    batch both are the batch's. None where no clock was read.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prefill_ms: float | None = None
    decode_ms: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens of this request per second of `decode_ms`; the first token belongs to the prefill.

        None without a clock, and where nothing came after the first token.
        """
        num_decoded = sum(len(output.token_ids) - 1 for output in self.outputs if output.token_ids)
        if not self.decode_ms or not num_decoded:
            return None
        return num_decoded / (self.decode_ms / 1e3)
