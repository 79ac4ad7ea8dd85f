"""`jfa-bench throughput`: a seeded trace of requests through the engine, beside batches that wait for their longest row
and beside one request at a time.

Lengths are fixed, or drawn: log-normally with the means of ShareGPT (memory.DATA_SETS), or log-uniformly from 8 tokens
on ("skewed"). Requests arrive all at once, or as a Poisson process. Latencies, in milliseconds: TTFT from arrival to
the first token, TPOT the mean time of the later ones, ITL each of these times, E2E from arrival to the end.
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

SHORTEST = 8  # tokens of a skewed prompt or answer
PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request of a trace: seconds after its start, token ids, and how many it wants."""

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
    """The same requests for the same arguments. request_rate: per second; infinite: all at once."""
    draw = random.Random(seed)

    def length(mean: float, largest: int) -> int:
        if lengths == "fixed":
            return largest
        if lengths == "skewed":
            return round(math.exp(draw.uniform(math.log(min(SHORTEST, largest)), math.log(largest))))
        return max(1, min(largest, round(draw.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA))))

    prompt_mean, answer_mean = DATA_SETS["ShareGPT"]
    arrivals, now = [], 0.0
    for _ in range(num_prompts):
        prompt = tuple(draw.randrange(vocab_size) for _ in range(length(prompt_mean, input_len)))
        arrivals.append(Arrival(at=now, prompt=prompt, output_len=length(answer_mean, output_len)))
        now += draw.expovariate(request_rate) if math.isfinite(request_rate) else 0.0
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
    """A record for each implementation; what it needs is compiled before its clock starts.

    tokens_per_s: generated ones over the time from the first arrival to the last token. wasted_share: of the places in
    held pages, those without a token; saved_share: of the pages that would be held without sharing, those it saves;
    reserved_share: the most places held over those that as many rows take which all reserve the longest request.
    """
    shared = machine.circumstances() | {"benchmark": "throughput", "case": dict(case)}
    static = None
    asked = [_params(one, n) if beam_width is None else _beams(one, beam_width) for one in arrivals]
    for name in sorted(implementations, key=names.BATCHING.index):
        if name == "engine":
            figures = _engine(model, arrivals, asked, max_num_seqs, max_concurrency, engine_options)
        elif arrivals[-1].at > 0 or n > 1 or beam_width is not None:
            reason = "a batch takes single continuations, all at once"
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
    """Batches in the order of arrival, each of which runs until its longest row has ended."""
    batches = [arrivals[first : first + size] for first in range(0, len(arrivals), size)]
    for batch in batches:
        state = model.start([one.prompt for one in batch], [_params(one) for one in batch])
        model.steps.decode_many(model.params, dataclasses.replace(state, active=np.zeros_like(state.active)))
    ended = []
    start = time.perf_counter()
    for batch in batches:
        model.generate([one.prompt for one in batch], [_params(one) for one in batch], max_batch=size)
        ended += [(time.perf_counter() - start) * 1e3] * len(batch)
    return {"seconds": ended[-1] / 1e3, "e2e_ms": _percentiles(ended)}


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
    seen: dict[int, list[float]] = {}  # of each request: its arrival, then its tokens
    left, ended = list(enumerate(arrivals)), 0
    wasted, saved, steps, most = 0.0, 0.0, 0, 0.0
    start = time.perf_counter()

    def clock(index: int) -> Callable[[RequestOutput], None]:
        return lambda output: seen[index].append(time.perf_counter() - start)

    while left or engine.has_unfinished:
        now = time.perf_counter() - start
        running = len(seen) - ended
        while left and left[0][1].at <= now and (max_concurrency is None or running < max_concurrency):
            index, one = left.pop(0)
            seen[index] = [one.at]
            engine.add_request(one.prompt, asked[index], on_output=clock(index))
            running += 1
        if engine.has_unfinished:
            ended += len(engine.step())
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
