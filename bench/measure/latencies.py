"""What requests to a server took, from the times when the parts of their answers arrived.

The names and definitions are those of `vllm bench serve`. TTFT: from sending a request to its first token. TPOT: from
the first token to the end, divided by the number of the later tokens. ITL: between two parts of a stream that bring
tokens. E2EL: from sending a request to the end of its answer. All in milliseconds.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass
class Answer:
    """What arrived for a request, and when, in seconds of one clock.

    Attributes:
      sent: when the request was sent.
      times: when each part with tokens arrived.
      end: when the last part of the answer arrived; what follows is only about it, such as its usage.
      input_tokens, output_tokens: as the server counts them; None: it does not say.
      error: why it failed; None: it is complete.
      is_refused: the server had no room for it, and answered with status 429.
      num_retries: how often it was sent again after such an answer.
    """

    sent: float = math.nan
    times: list[float] = dataclasses.field(default_factory=list)
    end: float = math.nan
    input_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None
    is_refused: bool = False
    num_retries: int = 0

    @property
    def num_generated(self) -> int:
        """The number of generated tokens; parts are counted if the server does not say it."""
        return len(self.times) if self.output_tokens is None else self.output_tokens

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    @property
    def tpot(self) -> float:
        """Seconds per later token; 0 if there is none."""
        return (self.end - self.times[0]) / (self.num_generated - 1) if self.num_generated > 1 else 0.0

    @property
    def e2el(self) -> float:
        """Seconds to the end."""
        return self.end - self.sent


def figures(
    answers: Sequence[Answer],
    *,
    seconds: float,
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The figures of a run that took so many seconds, with the names of vLLM's JSON.

    goodput: the most milliseconds of ttft, tpot or e2el in a good answer. request_goodput: good answers per second.
    rejected: requests that got status 429; they are not in `failed`.
    """
    done = [one for one in answers if one.error is None]
    generated = sum(one.num_generated for one in done)
    prompts = sum(one.input_tokens or 0 for one in done)
    good = [one for one in done if all(getattr(one, name) * 1e3 <= most for name, most in (goodput or {}).items())]
    found = {
        "completed": len(done),
        "failed": sum(one.error is not None and not one.is_refused for one in answers),
        "rejected": sum(one.is_refused for one in answers),
        "retries": sum(one.num_retries for one in answers),
        "duration": seconds,
        "total_input_tokens": prompts,
        "total_output_tokens": generated,
        "request_throughput": len(done) / seconds,
        "request_goodput": len(good) / seconds if goodput else None,
        "output_throughput": generated / seconds,
        "total_token_throughput": (prompts + generated) / seconds,
        "max_output_tokens_per_s": _peak_output(done),
        "max_concurrent_requests": _peak_requests(done),
    }
    values = {
        "ttft": [one.ttft for one in done],
        "tpot": [one.tpot for one in done if one.num_generated > 1],
        "itl": [later - earlier for one in done for earlier, later in itertools.pairwise(one.times)],
        "e2el": [one.e2el for one in done],
    }
    for name, measured in values.items():
        ms = np.array(measured) * 1e3
        found |= {f"{kind}_{name}_ms": None for kind in ("mean", "median", "std", *map(_percentile_name, percentiles))}
        if measured:
            found |= {f"mean_{name}_ms": float(ms.mean()), f"median_{name}_ms": float(np.median(ms))}
            found |= {f"std_{name}_ms": float(ms.std())}
            found |= {f"{_percentile_name(p)}_{name}_ms": float(np.percentile(ms, p)) for p in percentiles}
    return found


def _percentile_name(percentile: float) -> str:
    return f"p{percentile:g}"


def _peak_output(done: Sequence[Answer]) -> int:
    """The most parts with tokens in one of the seconds since the first request."""
    start = min((one.sent for one in done), default=0.0)
    return max(Counter(int(time - start) for one in done for time in one.times).values(), default=0)


def _peak_requests(done: Sequence[Answer]) -> int:
    """The most requests that ran at a time."""
    changes = sorted([(one.sent, 1) for one in done] + [(one.end, -1) for one in done])
    return max(itertools.accumulate(change for _, change in changes), default=0)
