"""What the endpoints that generate have in common: a request for the engine, and the form of its answer."""

import abc
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from jfa_models.decoding.outputs import CompletionOutput, Logprob, RequestOutput
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.prompts import Prompt
from jfa_models.serving.errors import ApiError
from jfa_models.serving.schema import Sampling

DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


@dataclasses.dataclass
class Shown:
    """How much of a choice a stream has sent."""

    num_tokens: int = 0
    num_characters: int = 0
    is_ended: bool = False


class Reply(abc.ABC):
    """One request: what the engine is asked, and how its results become an answer.

    Attributes:
      id, created: of the answer; created in seconds since 1970.
      model: the name that the request gives.
      prompts, params: for the engine.
    """

    prefix: str  # of the id
    prompts: Sequence[Prompt]
    params: SamplingParams

    def __init__(self, request: Sampling, model: str, id: str):
        self.request, self.model, self.id = request, model, f"{self.prefix}-{id}"
        self.created = int(time.time())
        self._shown: dict[tuple[int, int], Shown] = {}

    @abc.abstractmethod
    def whole(self, results: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer as one JSON object."""

    @abc.abstractmethod
    def grown(self, place: int, result: RequestOutput) -> Iterator[bytes]:
        """The events for what a prompt's result has grown by."""

    @abc.abstractmethod
    def end(self, results: Sequence[RequestOutput]) -> Iterator[bytes]:
        """The events after the last result."""

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """The events of an error after the first event."""
        yield event(error.body)

    def opening(self) -> Iterator[bytes]:
        """The events before the first result."""
        return iter(())

    def shown(self, place: int, one: CompletionOutput) -> Shown:
        """The record of a choice."""
        return self._shown.setdefault((place, one.index), Shown())


def usage_of(results: Sequence[RequestOutput]) -> dict[str, int]:
    """Numbers of tokens, with OpenAI's names."""
    prompt = sum(len(result.prompt_token_ids) for result in results)
    completion = sum(len(one.token_ids) for result in results for one in result.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def token_text(token_id: int, one: Logprob, *, as_id: bool = False) -> str:
    """The text of a token in lists of log-probabilities; tokens without one are named by their id."""
    return f"token_id:{token_id}" if as_id or one.decoded_token is None else one.decoded_token


def likeliest(entries: Mapping[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The `count` most likely tokens of a place, the most likely first."""
    ranked = sorted(entries.items(), key=lambda entry: -entry[1].logprob)
    return ranked[:count]
