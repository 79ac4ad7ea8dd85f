"""Runs a file of prompts and writes a file of results; after an interruption, the same call resumes the batch."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jfa_models import processes
from jfa_models.decoding.outputs import CompletionOutput, Logprob, RequestOutput
from jfa_models.decoding.params import SamplingParams
from jfa_models.engine import Engine, Replicas
from jfa_models.engine.shares import Shares

PROMPTS = ("prompt", "prompt_token_ids")
OTHERS = ("id", "adapter")
_NOTHING = object()  # what a field that is not given has, and None has not
FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a batch file: its number, counted from 1, and its request, or the reason why it is invalid."""

    number: int
    given: dict[str, Any]
    error: str | None = None

    @property
    def prompt(self) -> Any:
        """Text or token ids."""
        return next((self.given[name] for name in PROMPTS if name in self.given), None)


def read(path: Path) -> list[Line]:
    """Reads the lines of a batch file, except blank ones.

    Each is a JSON object with "prompt" or "prompt_token_ids", and optionally "id", the name of an "adapter", and fields
    of SamplingParams.
    """
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return [_line(number, text) for number, text in lines if text.strip()]


def _line(number: int, text: bytes) -> Line:
    try:
        given = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        return Line(number=number, given={}, error=f"not valid JSON: {error}")
    if not isinstance(given, dict) or sum(name in given for name in PROMPTS) != 1:
        return Line(number=number, given={}, error=f"must be a JSON object with either {' or '.join(PROMPTS)}")
    error = None
    if unknown := given.keys() - {*PROMPTS, *OTHERS, *FIELDS}:
        error = f"unknown fields {', '.join(sorted(unknown))}; allowed are id, adapter and the fields of SamplingParams"
    elif not isinstance(given.get("prompt", ""), str):
        error = f"prompt must be a string, got {given['prompt']!r}; pass token ids as prompt_token_ids"
    elif not _are_integers(given.get("prompt_token_ids", [])):
        error = f"prompt_token_ids must be a list of integers, got {given['prompt_token_ids']!r}"
    elif isinstance(bias := given.get("logit_bias"), dict):
        with contextlib.suppress(ValueError):  # the keys of a JSON object are strings
            given["logit_bias"] = {int(token): value for token, value in bias.items()}
    return Line(number=number, given=given, error=error)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _finite(digits: str) -> float:
    if math.isfinite(number := float(digits)):
        return number
    raise ValueError(f"the number {digits} is too large")


def _are_integers(tokens: Any) -> bool:
    return isinstance(tokens, list) and all(type(token) is int for token in tokens)


def done(path: Path, lines: list[Line]) -> set[int]:
    """The numbers of the lines that already have a result in the file. Removes an incomplete last line from the file.

    Raises:
      ValueError: the file contains something other than results of these lines.
    """
    if not path.exists():
        return set()
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        with path.open("r+b") as file:
            file.truncate(len(whole) + bool(whole))
    by_number = {line.number: line for line in lines}
    found = set()
    for text in whole.split(b"\n") if whole else ():
        try:
            result = json.loads(text)
            line = by_number[result["line"]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} contains a line that is not a result of this batch: {text[:60]!r}") from None
        if line.error is None:
            for name in (_prompt_name(line), "adapter"):
                if line.given.get(name, _NOTHING) != result.get(name, _NOTHING):
                    raise ValueError(
                        f"{path} has the results of another batch: the {'adapter' if name == 'adapter' else 'prompt'} "
                        f"of line {line.number} differs; use another --output"
                    )
        found.add(line.number)
    return found


def run(
    engine: Engine | Replicas,
    lines: list[Line],
    output: Path,
    defaults: SamplingParams,
    default_adapter: str | None = None,
    shares: Shares | None = None,
) -> Iterator[dict[str, Any]]:
    """Appends the result of each line to the output as soon as it is available, and yields it.

    Fields of a line replace those of defaults, and its adapter the default one; null is no adapter.

    The result of an invalid line has an "error" field.

    If several processes have the model, all call this with the same lines, and the first one writes. If they have
    several replicas, each group of processes runs every so many-th line, and the first process yields all results.

    shares: if they have several replicas.

    Raises:
      ValueError: shares is missing.
    """
    partition = engine.model.partition
    if partition.num_groups > 1 and shares is None:
        raise ValueError(
            f"{partition.num_groups} groups of processes have replicas of the model: their results need "
            "shares=Shares(HOST), with the address of the first process"
        )
    if partition.is_shared and not processes.is_first():
        output = Path(os.devnull)
    to_first = shares if partition.is_first_of_group else None  # one process of a group sends
    waiting: dict[str, Line] = {}
    with output.open("a", encoding="utf-8") as file:

        def write(result: dict[str, Any]) -> dict[str, Any]:
            text = json.dumps(result, allow_nan=False)  # ASCII: lone surrogates and line separators are escaped
            file.write(text + "\n")
            file.flush()
            if to_first is not None:
                to_first.send(result)
            return result

        for line in lines[partition.group :: partition.num_groups]:
            error = line.error
            if error is None:
                try:
                    fields = {name: value for name, value in line.given.items() if name in FIELDS}
                    params = dataclasses.replace(defaults, **fields)
                    adapter = line.given.get("adapter", default_adapter)
                    waiting[engine.add_request(line.prompt, params, number=line.number, adapter=adapter)] = line
                except (ValueError, TypeError) as refused:
                    error = str(refused)
            if error is not None:
                yield write(_about(line) | {"error": error})
        while engine.has_unfinished:
            for result in engine.step():
                assert result.request_id is not None
                yield write(_about(waiting[result.request_id]) | _result(result))
            if shares is not None:
                yield from map(write, shares.arrived())
        if shares is not None:
            yield from map(write, shares.rest())


def _prompt_name(line: Line) -> str:
    return next(name for name in PROMPTS if name in line.given)


def _about(line: Line) -> dict[str, Any]:
    return {"line": line.number} | {name: line.given[name] for name in (*OTHERS, *PROMPTS) if name in line.given}


def _result(result: RequestOutput) -> dict[str, Any]:
    found = [_completion(one) for one in result.outputs]
    whole: dict[str, Any] = found[0] if len(found) == 1 else {"outputs": found}
    if result.prompt_logprobs is not None:
        whole["prompt_logprobs"] = [None if one is None else _logprobs(one) for one in result.prompt_logprobs]
    return whole if result.error is None else whole | {"error": result.error}


def _completion(one: CompletionOutput) -> dict[str, Any]:
    about: dict[str, Any] = {"text": one.text, "token_ids": list(one.token_ids), "finish_reason": one.finish_reason}
    if one.stop_reason is not None:
        about["stop_reason"] = one.stop_reason
    if one.logprobs is not None:
        about |= {
            "cumulative_logprob": _or_null(one.cumulative_logprob),
            "logprobs": [_logprobs(entry) for entry in one.logprobs],
        }
    return about


def _logprobs(entries: Mapping[int, Logprob]) -> dict[int, float | None]:
    return {token: _or_null(entry.logprob) for token, entry in entries.items()}


def _or_null(logprob: float | None) -> float | None:
    """JSON has neither NaN nor infinities: they become null."""
    return logprob if logprob is not None and math.isfinite(logprob) else None
