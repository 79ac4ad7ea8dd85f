"""`jfa-bench serve`: a seeded trace of requests to a server with OpenAI's protocol, or to an engine in this process.

A trace is determined by its seed and rate. At another rate the lengths are the same, and so are the times between
requests in relation to each other; the prompts are others, so that a server that keeps prefixes does not know them.
"""

import asyncio
import dataclasses
import itertools
import json
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jfa_models import Engine, LanguageModel, RequestOutput, SamplingParams

from .. import names
from . import client, machine
from .latencies import Answer, figures

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education"
).split()
PLAIN_IDS = range(1000, 5000)  # which every usual vocabulary has


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request: a text or token ids, their number if it is known, and the number of tokens to generate."""

    prompt: str | tuple[int, ...]
    input_len: int | None
    output_len: int


def random_requests(
    *,
    num_prompts: int,
    input_len: int,
    output_len: int,
    range_ratio: float,
    alphabet: Sequence[int] | Sequence[str],
    seed: int,
    request_rate: float,
) -> list[Asked]:
    """Prompts of random tokens, or words. range_ratio: lengths are from 1 - range_ratio to 1 + range_ratio times."""
    lengths, tokens = random.Random(f"{seed} lengths"), random.Random(f"{seed} tokens {request_rate}")

    def length(mean: int) -> int:
        return lengths.randint(max(1, math.floor(mean * (1 - range_ratio))), math.ceil(mean * (1 + range_ratio)))

    requests = []
    for _ in range(num_prompts):
        prompt = tokens.choices(alphabet, k=length(input_len))
        text = " ".join(prompt) if isinstance(prompt[0], str) else tuple(prompt)  # type: ignore[arg-type]
        requests.append(Asked(text, len(prompt), length(output_len)))  # type: ignore[arg-type]
    return requests


def dataset_requests(path: Path, *, num_prompts: int, output_len: int, seed: int) -> list[Asked]:
    """Prompts of a file of JSON Lines, shuffled, and repeated if there are too few of them.

    A line is an object with `prompt`, and `output_tokens` if it is to differ from output_len.

    Raises:
      ValueError: a line is no such object.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            one = json.loads(line)
            asked = Asked(one["prompt"], None, int(one.get("output_tokens", output_len)))
            if not isinstance(asked.prompt, str) or not asked.prompt or asked.output_len < 1:
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{path}:{number}: not a JSON object with a text as prompt: {line[:60]!r}") from None
        found.append(asked)
    if not found:
        raise ValueError(f"{path} has no prompts")
    random.Random(seed).shuffle(found)
    return list(itertools.islice(itertools.cycle(found), num_prompts))


def arrival_times(num_prompts: int, *, request_rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which requests arrive.

    The times between them have a gamma distribution of shape `burstiness`, 1 for a Poisson process, and are scaled so
    that the last request arrives after num_prompts / request_rate.
    """
    if math.isinf(request_rate):
        return [0.0] * num_prompts
    rng = random.Random(f"{seed} arrivals")
    even = math.isinf(burstiness)
    times = list(
        itertools.accumulate(1.0 if even else rng.gammavariate(burstiness, 1 / burstiness) for _ in range(num_prompts))
    )
    return [one / times[-1] * num_prompts / request_rate for one in times]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked at each rate. requests: those for a rate."""

    requests: Callable[[float], Sequence[Asked]]
    rates: Sequence[float]
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0
    temperature: float = 0.0
    ignore_eos: bool = True
    percentiles: Sequence[float] = (99,)
    metrics: Sequence[str] = tuple(names.LATENCIES)
    goodput: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def records(
        self,
        run: Callable[[Sequence[Asked], Sequence[float]], tuple[list[Answer], float]],
        *,
        shared: Mapping[str, Any],
        case: Mapping[str, Any],
        implementation: str,
    ) -> Iterator[dict]:
        """A record for each rate. run: returns the answers to requests that arrive at some times, and its seconds."""
        for rate in self.rates:
            asked = self.requests(rate)
            arrivals = arrival_times(len(asked), request_rate=rate, burstiness=self.burstiness, seed=self.seed)
            answers, seconds = run(asked, arrivals)
            found = figures(answers, seconds=seconds, percentiles=self.percentiles, goodput=self.goodput)
            reason = None if found["completed"] else f"all failed, the first one: {answers[0].error}"
            about = {**case, "request_rate": rate if math.isfinite(rate) else "inf"}
            about |= {"burstiness": self.burstiness if math.isfinite(self.burstiness) else "inf"}
            about |= {"max_concurrency": self.max_concurrency, "seed": self.seed, "temperature": self.temperature}
            about |= {"ignore_eos": self.ignore_eos, "goodput": dict(self.goodput)}
            yield {
                **shared,
                **{"benchmark": "serve", "case": about, "implementation": implementation},
                **{"status": "failed" if reason else "ok", "reason": reason},
                **found,
                **{"percentile_metrics": list(self.metrics), "notes": notes(asked, answers, self.ignore_eos)},
            }


def notes(asked: Sequence[Asked], answers: Sequence[Answer], ignore_eos: bool) -> list[str]:
    """What a reader of the figures must know: failures, and lengths that are not those that were asked for."""
    lines = [f"{count} failed: {error}" for error, count in Counter(one.error for one in answers if one.error).items()]
    done = [(wanted, one) for wanted, one in zip(asked, answers, strict=True) if one.error is None]
    prompts = [(wanted.input_len, one.input_tokens) for wanted, one in done]
    lines += _other_lengths("prompts", [pair for pair in prompts if None not in pair])
    if ignore_eos:
        lines += _other_lengths("answers", [(wanted.output_len, one.num_generated) for wanted, one in done])
    if silent := sum(one.output_tokens is None for _, one in done):
        lines.append(f"{silent} answers without usage: the parts of their streams are counted as tokens")
    return lines


def _other_lengths(what: str, lengths: Sequence[tuple[Any, Any]]) -> list[str]:
    wrong = [(wanted, found) for wanted, found in lengths if wanted != found]
    if not wrong:
        return []
    means = [sum(column) / len(wrong) for column in zip(*wrong, strict=True)]
    asked = "{} of {} {} have other lengths than asked for: {:.1f} tokens on average instead of {:.1f}"
    return [asked.format(len(wrong), len(lengths), what, means[1], means[0])]


# A server.


def served_model(server: client.Client, name: str | None) -> str:
    """The name of the model to ask for; None: the first one.

    Raises:
      ValueError: no server answers, it refuses the key, or it has no such model.
    """
    try:
        known = [one["id"] for one in server.json("/v1/models")["data"]]
    except client.HttpError as error:
        if error.status != 404:
            raise ValueError(f"{server.base_url}/v1/models: {error}") from None
        known = []
    except (TypeError, KeyError):
        raise ValueError(f"{server.base_url}/v1/models does not list models") from None
    if not known and name is None:
        raise ValueError(f"{server.base_url} lists no models: name one with --model")
    if known and name is not None and name not in known:
        raise ValueError(f"{server.base_url} has no model {name!r}; it has {', '.join(known)}")
    return known[0] if name is None else name


def alphabet_of(server: client.Client, endpoint: str, model: str) -> Sequence[int] | Sequence[str]:
    """What random prompts are made of: token ids if the server takes them, else words."""
    if endpoint.endswith("/chat/completions"):
        return WORDS
    try:
        body = {"model": model, "prompt": " ".join(WORDS), "add_special_tokens": False}
        ids = server.json("/tokenize", body)["tokens"]
        if ids and all(isinstance(one, int) for one in ids):
            return sorted(set(ids))
    except (ValueError, TypeError, KeyError):
        pass
    probe = Asked(tuple(PLAIN_IDS[:8]), 8, 1)
    body = body_of(probe, endpoint=endpoint, model=model, temperature=0.0, ignore_eos=False)
    taken = asyncio.run(server.stream(endpoint, body))
    return PLAIN_IDS if taken.error is None and taken.input_tokens in (8, None) else WORDS


def body_of(asked: Asked, *, endpoint: str, model: str, temperature: float, ignore_eos: bool) -> bytes:
    """The JSON of a request."""
    body: dict[str, Any] = {"model": model, "temperature": temperature, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    if ignore_eos:
        body["ignore_eos"] = True
    if endpoint.endswith("/chat/completions"):
        body |= {"messages": [{"role": "user", "content": asked.prompt}], "max_completion_tokens": asked.output_len}
    else:
        body |= {"prompt": asked.prompt, "max_tokens": asked.output_len}
    return json.dumps(body).encode()


def measure(
    load: Load,
    server: client.Client,
    *,
    endpoint: str,
    model: str,
    retries: bool,
    case: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> Iterator[dict]:
    """A record for each rate, of a server.

    Raises:
      ValueError: the server refuses the first request, which is sent before anything is measured.
    """
    options = {"endpoint": endpoint, "model": model, "temperature": load.temperature, "ignore_eos": load.ignore_eos}
    first = load.requests(math.nan)[0]  # not one of a rate, which the server would know then
    tried = asyncio.run(server.stream(endpoint, body_of(first, **options)))
    if tried.error is not None:
        raise ValueError(f"{server.base_url}{endpoint}: {tried.error}")

    def run(asked: Sequence[Asked], arrivals: Sequence[float]) -> tuple[list[Answer], float]:
        bodies = [body_of(one, **options) for one in asked]
        loading = client.load(
            lambda index: server.stream(endpoint, bodies[index], retries=retries),
            arrivals,
            max_concurrency=load.max_concurrency,
        )
        return asyncio.run(loading)

    shared = machine.client_circumstances() | {"metadata": dict(metadata)}
    about = {"model": model, "endpoint": endpoint, **case}
    yield from load.records(run, shared=shared, case=about, implementation="server")


# An engine in this process.


def engine_alphabet(model: LanguageModel) -> Sequence[int]:
    """The token ids that alphabet_of finds for a server of the same model."""
    if model.tokenizer is None:
        return range(model.config.vocab_size)
    return sorted(set(model.tokenizer.encode(" ".join(WORDS), add_special_tokens=False)))


def measure_engine(
    load: Load,
    model: LanguageModel,
    engine_options: Mapping[str, Any],
    *,
    case: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> Iterator[dict]:
    """A record for each rate, of an engine; everything is compiled before anything is measured."""
    engine = Engine(model, **engine_options)
    params = SamplingParams(temperature=load.temperature, ignore_eos=load.ignore_eos)
    engine.warm_up([params])

    def run(asked: Sequence[Asked], arrivals: Sequence[float]) -> tuple[list[Answer], float]:
        return run_engine(engine, asked, arrivals, params=params, max_concurrency=load.max_concurrency)

    shared = machine.circumstances() | {"metadata": dict(metadata)}
    yield from load.records(run, shared=shared, case=case, implementation="engine")


def run_engine(
    engine: Engine,
    asked: Sequence[Asked],
    arrivals: Sequence[float],
    *,
    params: SamplingParams,
    max_concurrency: int | None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Answer], float]:
    """client.load for an engine. A request that arrives during a step counts from its arrival."""
    most = max_concurrency or len(asked)
    answers = [Answer() for _ in asked]
    waiting, running, freed = deque(range(len(asked))), 0, -math.inf
    start = clock()

    def arrive(index: int) -> bool:
        """Whether the engine takes a request."""
        answer = answers[index]
        answer.sent = answer.end = max(start + arrivals[index], freed)
        answer.error = "the engine ended it without a token"
        limits = dataclasses.replace(params, max_tokens=asked[index].output_len)

        def grow(output: RequestOutput) -> None:
            answer.end = clock()
            answer.times.append(answer.end)
            answer.input_tokens = len(output.prompt_token_ids)
            answer.output_tokens = len(output.outputs[0].token_ids)
            answer.error = output.error

        try:
            prompt = asked[index].prompt
            engine.add_request(prompt if isinstance(prompt, str) else list(prompt), limits, on_output=grow)
        except ValueError as error:
            answer.error = str(error)
            return False
        return True

    while waiting or engine.has_unfinished:
        while waiting and running < most and start + arrivals[waiting[0]] <= clock():
            running += arrive(waiting.popleft())
        if engine.has_unfinished:
            finished = len(engine.step())
            if finished and running == most:
                freed = clock()
            running -= finished
        elif waiting:
            time.sleep(max(0.0, start + arrivals[waiting[0]] - clock()))
    return answers, clock() - start
