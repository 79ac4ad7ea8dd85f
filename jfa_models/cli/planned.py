"""The output of `jfa plan`."""

import dataclasses
import json
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from jfa_models.checkpoints.locate import PACKAGED
from jfa_models.checkpoints.presets import preset
from jfa_models.checkpoints.reader import open_checkpoint
from jfa_models.model.config import DecoderConfig
from jfa_models.planning import Load, Split, seconds, splits
from jfa_models.rates import CARDS, COLLECTIVE_US, HOST_COLLECTIVE_US, Card

ROWS = 12  # of the table of splits


def show(
    *,
    model: str,
    arch: str,
    devices: int,
    hosts: int,
    mesh: Mapping[str, int] | None,
    batch: int,
    context: int | None,
    prompt: int | None,
    as_json: bool,
    hbm_gb: float | None,
    hbm_tb_per_s: float | None,
    tflops: float | None,
    link_gb_per_s: float | None,
    host_link_gb_per_s: float | None,
    **kinds: Any,
) -> None:
    """Prints a plan. kinds: dtype, quantization and kv_dtype.

    Raises:
      ValueError: there is no such model, or it or the devices cannot be divided in this way.
    """
    config = _config_of(model)
    given = dict(memory_gb=hbm_gb, memory_gb_per_s=hbm_tb_per_s and hbm_tb_per_s * 1e3, tflops=tflops)
    given |= dict(link_gb_per_s=link_gb_per_s, host_link_gb_per_s=host_link_gb_per_s)
    card = dataclasses.replace(CARDS[arch], **{name: x for name, x in given.items() if x is not None})
    context = context or config.context_length
    load = Load(batch=batch, context=context, prompt=prompt or context)
    found = splits(config, card, load, devices=devices, hosts=hosts, mesh=mesh, **kinds)
    chosen = _fastest(found) or min(found, key=lambda one: sum(one.num_bytes.values()))
    if as_json:
        about = dict(model=model, arch=arch, devices=devices, hosts=hosts, **dataclasses.asdict(load), **kinds)
        rates = dataclasses.asdict(card) | dict(collective_us=COLLECTIVE_US, host_collective_us=HOST_COLLECTIVE_US)
        click.echo(
            json.dumps(about | {"computed_from": rates, "split": _document(chosen), "splits": [*map(_document, found)]})
        )
        return
    weights, pages = (kinds[name] or kinds["dtype"] for name in ("quantization", "kv_dtype"))
    where = f"{devices * hosts:,} x {card.name} ({arch})" + (f" in {hosts:,} hosts" if hosts > 1 else "")
    lines = [f"{model}, weights in {weights}, keys and values in {pages}", f"{where}: {_words(chosen)}", ""]
    lines += [*_memory(chosen, card, load, config), "", *_times(chosen, load)]
    if mesh is None:
        lines += ["", *_table(found)]
    lines += ["", *textwrap.wrap(_sources(card, hosts), 80)]
    click.echo("\n".join(lines))


def _config_of(name: str) -> DecoderConfig:
    is_stored = name.lower() in PACKAGED or "/" in name or os.path.exists(name)
    return open_checkpoint(name).config if is_stored else preset(name)


def _fastest(found: Sequence[Split]) -> Split | None:
    return _best(found, "tokens_per_s")


def _best(found: Sequence[Split], rate: str) -> Split | None:
    """Of those that fit, the one with the highest rate; of equals, the one with more engines."""
    fitting = [one for one in found if one.fits]
    return max(fitting, key=lambda one: (getattr(one, rate), one.engines), default=None)


def _document(split: Split) -> dict[str, Any]:
    more = dict(fits=split.fits, token_ms=1e3 * seconds(split.decode))
    return dataclasses.asdict(split) | more | dict(first_token_ms=1e3 * seconds(split.first_token))


def _words(split: Split) -> str:
    return f"{split.engines:,} engine{'s' * (split.engines > 1)} of {_mesh(split)}"


def _mesh(split: Split) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in split.mesh.items())


def _memory(split: Split, card: Card, load: Load, config: DecoderConfig) -> Iterator[str]:
    yield f"{'GB of each device':<34}{card.memory_gb:11.2f}"
    for kind, size in split.num_bytes.items():
        if size:
            yield f"  {kind + (', estimated' if kind == 'temporaries' else ''):<32}{size / 1e9:11.2f}"
    yield f"  {'free' if split.fits else 'MISSING':<32}{abs(split.free_bytes) / 1e9:11.2f}"
    longest = "any length" if split.most_context is None else f"{split.most_context:,}"
    most = f"at most {split.most_sequences:,} of them, or {load.batch:,} of {longest}"
    any_fits = split.most_context is None or split.most_context > 0
    asked = f"{load.batch:,} sequences of {load.context:,} tokens"
    yield f"{asked} fit: {most}" if split.fits else f"{asked} do not fit: {most if any_fits else 'nothing does'}"
    if load.context > config.context_length:
        yield f"note: the model's own context is {config.context_length:,} tokens"
    if split.whole:
        yield from textwrap.wrap(f"note: {split.whole}", 80)


def _times(split: Split, load: Load) -> Iterator[str]:
    token, first = seconds(split.decode), seconds(split.first_token)
    yield f"{'ms of a decode step':<34}{1e3 * token:11.2f}  bound by"
    yield from _parts(split, "decode")
    yield f"= {1 / token:,.1f} tokens/s for each sequence, {split.tokens_per_s:,.0f} in all"
    yield f"\n{f'ms to the first token of {load.prompt:,}':<34}{1e3 * first:11.2f}"
    yield from _parts(split, "first_token")


def _parts(split: Split, step: str) -> Iterator[str]:
    for part in getattr(split, step):
        yield f"  {part.name:<32}{1e3 * part.seconds:11.2f}  {part.bound}"


_HEADINGS = ("mesh of an engine", "engines", "free GB", "ms/token", "tokens/s", "most seqs", "tokens/s")


def _table(found: Sequence[Split]) -> Iterator[str]:
    fitting = sorted((one for one in found if one.fits), key=lambda one: -one.tokens_per_s)
    fastest, most = _fastest(found), _best(found, "most_tokens_per_s")
    if most is None:
        yield f"none of the {len(found)} ways to divide them fits"
        return
    shown = fitting[:ROWS] if most in fitting[:ROWS] else [*fitting[: ROWS - 1], most]
    yield _row(*_HEADINGS)
    for one in sorted(shown, key=lambda one: list(one.mesh.values())):
        token, free = f"{1e3 * seconds(one.decode):.2f}", f"{one.free_bytes / 1e9:.1f}"
        rates = f"{one.tokens_per_s:,.0f}", f"{one.most_sequences:,}", f"{one.most_tokens_per_s:,.0f}"
        yield _row(_mesh(one), f"{one.engines:,}", free, token, *rates)
    hidden = {"slower": len(fitting) - len(shown), "without room": len(found) - len(fitting)}
    if any(hidden.values()):
        yield f"not shown: {', '.join(f'{count} {what}' for what, count in hidden.items() if count)}"
    assert fastest is not None
    yield f"fastest at this batch: {_words(fastest)}"
    yield f"most tokens/s with as many sequences as fit: {_words(most)}"


def _row(mesh: str, *numbers: str) -> str:
    widths = (8, 9, 10, 10, 10, 11)
    return f"{mesh:<22}" + "".join(f"{one:>{width}}" for one, width in zip(numbers, widths, strict=True))


def _sources(card: Card, hosts: int) -> str:
    between = f", {card.host_link_gb_per_s:g} GB/s between hosts" if hosts > 1 else ""
    latency = f"{COLLECTIVE_US:g} us for each collective"
    latency += f" and {HOST_COLLECTIVE_US:g} more between hosts" if hosts > 1 else ""
    return (
        f"Computed, not measured, from: {card.memory_gb:g} GB and {card.memory_gb_per_s / 1e3:g} TB/s of memory, "
        f"{card.tflops:g} TFLOP/s in 16 bits, {card.link_gb_per_s:g} GB/s from a device to others of its host"
        f"{between}, {latency}. Programs reach a part of these rates."
    )
