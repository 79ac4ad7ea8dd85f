"""`jfa-bench speculation`: tokens per second with drafts and without, for prompts that copy and prompts that do not.

Each configuration runs every prompt in turn with the others, several times, so that a machine that slows down slows
them all. Greedy tokens must be the same with drafts and without, up to ties.
"""

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jfa_models import Engine, LanguageModel, SamplingParams
from jfa_models.decoding.speculation import SpeculativeConfig
from jfa_models.model.config import DecoderConfig
from jfa_models.planning import step_seconds
from jfa_models.rates import CARDS

from . import machine

PROMPTS = Path(__file__).parents[1] / "prompts.jsonl"
PLAIN = "none"
CONTEXT = 512  # tokens that a step on a card reads, where one is computed


def read_prompts(path: Path) -> list[dict[str, str]]:
    """The prompts of a file of JSON Lines with kind, task and prompt.

    Raises:
      ValueError: a line is no such object.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            one = json.loads(line)
            prompts.append({name: one[name] for name in ("kind", "task", "prompt")})
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}:{number}: not a JSON object with kind, task and prompt: {line[:60]!r}") from None
    return prompts


def measure(
    model: LanguageModel,
    prompts: Sequence[Mapping[str, str]],
    configs: Mapping[str, SpeculativeConfig | Mapping[str, Any] | None],
    *,
    case: Mapping[str, Any],
    batch: int,
    output_len: int,
    rounds: int,
    arch: str | None = None,
) -> Iterator[dict]:
    """A record for each prompt and configuration, and one for the mean of each kind.

    configs: speculative_config by name; that of PLAIN is None. batch: copies of a prompt that run at a time.
    tokens_per_s is the median over the rounds; speedup is the median of the ratios to PLAIN in the same round.
    arch: of a card for which `on_card` computes a speedup.
    """
    shared = machine.circumstances() | {"benchmark": "speculation"}
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    engines = {
        name: Engine(model, max_num_seqs=batch, speculative_config=config, enable_prefix_caching=False)
        for name, config in configs.items()
    }
    for engine in engines.values():
        engine.warm_up([params])
        for one in prompts:  # what a step of each size takes is learned before anything is timed
            _run(engine, one["prompt"], params, batch)
    speedups: dict[tuple[str, str], list[float]] = {}
    for one in prompts:
        rates: dict[str, list[float]] = {name: [] for name in engines}
        counts: dict[str, Any] = {}
        tokens: dict[str, Any] = {}
        for _ in range(rounds):
            for name, engine in engines.items():
                seconds, counts[name], tokens[name] = _run(engine, one["prompt"], params, batch)
                rates[name].append(batch * output_len / seconds)
        for name in engines:
            ratios = [rate / plain for rate, plain in zip(rates[name], rates[PLAIN], strict=True)]
            same = sum(x == y for x, y in zip(tokens[name], tokens[PLAIN], strict=True))
            figures = {"tokens_per_s": statistics.median(rates[name]), "speedup": statistics.median(ratios)}
            figures |= counts[name] | {"same_as_plain": same / batch}
            speedups.setdefault((one["kind"], name), []).append(figures["speedup"])
            about = {**case, "kind": one["kind"], "task": one["task"], "batch": batch, "output_len": output_len}
            if arch is not None:
                about |= {"arch": arch}
                figures |= {"computed_speedup": on_card(model.config, configs[name], about, figures)}
            yield shared | {"case": about, "implementation": name, "status": "ok", "reason": None} | figures
    for (kind, name), found in speedups.items():
        about = {**case, "kind": kind, "task": "geometric mean", "batch": batch, "output_len": output_len}
        figures = {"speedup": statistics.geometric_mean(found), "least": min(found)}
        yield shared | {"case": about, "implementation": name, "status": "ok", "reason": None} | figures


def on_card(
    config: DecoderConfig,
    drafts: SpeculativeConfig | Mapping[str, Any] | None,
    case: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> float | None:
    """What these drafts would bring on a card at best: the speedup by the bytes and FLOP of the steps that ran.

    Computed, in bfloat16 (planning.step_seconds), from the measured numbers of tokens and drafts per step. Drafted
    tokens of the model's first layers cost a step of these each; those of lookups cost nothing. None: it is not known
    how many steps the drafts took.
    """
    drafts = None if drafts is None else SpeculativeConfig.of(drafts)
    if drafts is None:
        return 1.0
    if drafts.method not in ("ngram", "lookahead", "self"):
        return None
    rows, card = case["batch"], CARDS[case["arch"]]
    per_step = figures["proposed"] / rows * figures["tokens_per_step"] / case["output_len"]
    plain, step = (step_seconds(config, card, rows=rows, new=new, context=CONTEXT) for new in (1, 1 + round(per_step)))
    if drafts.num_layers is not None:
        first = config.with_layers(drafts.num_layers)
        step += per_step * step_seconds(first, card, rows=rows, new=1, context=CONTEXT)
    return figures["tokens_per_step"] * plain / step


def _run(engine: Engine, prompt: str, params: SamplingParams, batch: int) -> tuple[float, dict[str, Any], list]:
    before = engine.metrics()
    start = time.perf_counter()
    for number in range(batch):
        engine.add_request(prompt, params, number=number)
    results = list(engine.run())
    seconds = time.perf_counter() - start
    after = engine.metrics()
    counts: dict[str, Any] = {"tokens_per_step": (after.generated_tokens - before.generated_tokens) / batch}
    counts["tokens_per_step"] /= after.steps - before.steps
    for name in after.speculation:
        old, new = before.speculation[name], after.speculation[name]
        counts |= {"proposed": new.proposed - old.proposed, "accepted": new.accepted - old.accepted}
    return seconds, counts, [result.outputs[0].token_ids for result in results]
