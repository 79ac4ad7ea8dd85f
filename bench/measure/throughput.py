"""`jfa-bench throughput`: runs a seeded trace of requests in the engine, compared with static batches, which wait for
their longest row, and with one request at a time.

Lengths are fixed or random: log-normal with the means of ShareGPT (memory.DATA_SETS), or log-uniform from 8 tokens
on ("skewed"). Requests arrive all at once or as a Poisson process. Latencies, in milliseconds: TTFT from arrival to
the first token, TPOT the mean time of each later token, ITL each of these times, E2E from arrival to the last token.
"""

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jfa_models import BeamSearchParams, Engine, LanguageModel, RequestOutput, SamplingParams

from .. import names
from . import machine
from .memory import DATA_SETS, SIGMA

SHORTEST = 8  # minimum tokens of a skewed prompt or completion
PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request of a trace: arrival in seconds after the start, prompt tokens, and number of tokens to generate."""

    at: float
    prompt: tuple[int, ...]
    output_len: int


def trace(
    *,
    num_prompts: int,
    lengths: str,
    input_len: int,
    output_len: int,
    request_rate: float,
    vocab_size: int,
    seed: int,
) -> list[Arrival]:
    """A random trace, determined by seed. request_rate: requests per second; infinite: all at once."""
    rng = random.Random(seed)

    def length(mean: float, largest: int) -> int:
        if lengths == "fixed":
            return largest
        if lengths == "skewed":
            return round(math.exp(rng.uniform(math.log(min(SHORTEST, largest)), math.log(largest))))
        return max(1, min(largest, round(rng.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA))))

    prompt_mean, answer_mean = DATA_SETS["ShareGPT"]
    arrivals, now = [], 0.0
    for _ in range(num_prompts):
        prompt = tuple(rng.randrange(vocab_size) for _ in range(length(prompt_mean, input_len)))
        arrivals.append(Arrival(at=now, prompt=prompt, output_len=length(answer_mean, output_len)))
        now += rng.expovariate(request_rate) if math.isfinite(request_rate) else 0.0
    return arrivals


def measure(
    model: LanguageModel,
    arrivals: Sequence[Arrival],
    *,
    case: Mapping[str, Any],
    implementations: Sequence[str],
    max_num_seqs: int,
    max_concurrency: int | None,
    n: int = 1,
    beam_width: int | None = None,
    engine_options: Mapping[str, Any],
) -> Iterator[dict]:
    """A record for each implementation; everything is compiled before timing starts.

    tokens_per_s: generated tokens / time from the first arrival to the last token. wasted_share: fraction of the slots
    in held pages that have no token; saved_share: of the pages that would be held without sharing, the fraction that
    sharing saves; reserved_share: maximum number of held slots / slots of the same number of rows that all reserve the
    longest request.
    """
    shared = machine.circumstances() | {"benchmark": "throughput", "case": dict(case)}
    static = None
    asked = [_params(one, n) if beam_width is None else _beams(one, beam_width) for one in arrivals]
    for name in sorted(implementations, key=names.BATCHING.index):
        if name == "engine":
            figures = _engine(model, arrivals, asked, max_num_seqs, max_concurrency, engine_options)
        elif arrivals[-1].at > 0 or n > 1 or beam_width is not None:
            reason = "static batches support only single completions of requests that arrive all at once"
            yield shared | {"implementation": name, "status": "unsupported", "reason": reason}
            continue
        else:
            figures = _batches(model, arrivals, max_num_seqs if name == "static" else 1)
        rate = (beam_width or n) * sum(one.output_len for one in arrivals) / figures["seconds"]
        static = rate if name == "static" else static
        figures |= {"tokens_per_s": rate, "requests_per_s": len(arrivals) / figures["seconds"]}
        figures |= {"speedup": static and rate / static}
        yield shared | {"implementation": name, "status": "ok", "reason": None} | figures


def _params(one: Arrival, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0.0 if n == 1 else 1.0, n=n, max_tokens=one.output_len, ignore_eos=True)


def _beams(one: Arrival, width: int) -> BeamSearchParams:
    return BeamSearchParams(beam_width=width, max_tokens=one.output_len, ignore_eos=True)


def _batches(model: LanguageModel, arrivals: Sequence[Arrival], size: int) -> dict[str, Any]:
    """Runs batches in the order of arrival, each until its longest row is finished."""
    batches = [arrivals[first : first + size] for first in range(0, len(arrivals), size)]
    for batch in batches:
        state = model.start([one.prompt for one in batch], [_params(one) for one in batch])
        state = dataclasses.replace(state, active=np.zeros_like(state.active))
        model.steps.decode_many(model.params, state, adapters=None)  # as generate calls it: else it compiles again
    finished = []
    start = time.perf_counter()
    for batch in batches:
        model.generate([one.prompt for one in batch], [_params(one) for one in batch], max_batch=size)
        finished += [(time.perf_counter() - start) * 1e3] * len(batch)
    return {"seconds": finished[-1] / 1e3, "e2e_ms": _percentiles(finished)}


def _engine(
    model: LanguageModel,
    arrivals: Sequence[Arrival],
    asked: Sequence[SamplingParams | BeamSearchParams],
    max_num_seqs: int,
    max_concurrency: int | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    engine = Engine(model, max_num_seqs=max_num_seqs, **options)
    kinds = [one for one in asked[:1] if isinstance(one, SamplingParams)]
    engine.warm_up(kinds or [SamplingParams(temperature=0.0, logprobs=1)])
    seen: dict[int, list[float]] = {}  # times of each request: its arrival, then its tokens
    left, finished = list(enumerate(arrivals)), 0
    wasted, saved, steps, most = 0.0, 0.0, 0, 0.0
    start = time.perf_counter()

    def clock(index: int) -> Callable[[RequestOutput], None]:
        return lambda output: seen[index].append(time.perf_counter() - start)

    while left or engine.has_unfinished:
        now = time.perf_counter() - start
        running = len(seen) - finished
        while left and left[0][1].at <= now and (max_concurrency is None or running < max_concurrency):
            index, one = left.pop(0)
            seen[index] = [one.at]
            engine.add_request(one.prompt, asked[index], on_output=clock(index))
            running += 1
        if engine.has_unfinished:
            finished += len(engine.step())
            metrics = engine.metrics()
            if metrics.cache_use:
                wasted, saved = wasted + metrics.cache_waste, saved + metrics.cache_saved
                steps, most = steps + 1, max(most, metrics.cache_use)
        elif left:
            time.sleep(max(0.0, left[0][1].at - now))
    times = list(seen.values())
    gaps = [gap for one in times for gap in np.diff(one[1:])]
    longest = max(len(one.prompt) + one.output_len for one in arrivals)
    width = max(one.beam_width if isinstance(one, BeamSearchParams) else one.n for one in asked)
    reserved = min(max_num_seqs, width * len(arrivals)) * longest
    return {
        "seconds": max(one[-1] for one in times),
        "ttft_ms": _percentiles([(one[1] - one[0]) * 1e3 for one in times]),
        "tpot_ms": _percentiles([(one[-1] - one[1]) / (len(one) - 2) * 1e3 for one in times if len(one) > 2]),
        "itl_ms": _percentiles([gap * 1e3 for gap in gaps]),
        "e2e_ms": _percentiles([(one[-1] - one[0]) * 1e3 for one in times]),
        "wasted_share": wasted / max(1, steps),
        "saved_share": saved / max(1, steps),
        "reserved_share": most * engine.num_slots / reserved,
        "metrics": dataclasses.asdict(engine.metrics()),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 3) for p in PERCENTILES} if values else {}
