"""The output of `jfa info`."""

import functools
import importlib.metadata
import os
from collections.abc import Iterator

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import jfa
from jfa import cpu
from jfa.device import probe
from jfa_models.checkpoints.families import FAMILIES
from jfa_models.checkpoints.load import Weights
from jfa_models.checkpoints.locate import PACKAGED
from jfa_models.checkpoints.presets import PRESETS
from jfa_models.checkpoints.reader import open_checkpoint
from jfa_models.cli.base import DEFAULT_MODEL
from jfa_models.decoding.language_model import abstract_decoder, compute_dtype, named_leaves
from jfa_models.decoding.pretrained import weights_of
from jfa_models.model.mixers import state_cache

PACKAGES = ("jfa", "jax", "jaxlib", "flax", "jax-rocm7-plugin", "jax-rocm10-plugin", "jax-cuda13-plugin", "libtpu")


def show(model: str, dtype: str | None, quantization: str | None) -> None:
    """Prints a table: versions, the device, the backend of each op and why others are not used, the model's size.

    Raises:
      ValueError: there is no such model.
    """
    console = Console()
    device = probe()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("versions", ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))))
    table.add_row("device", escape(", ".join(dict.fromkeys((device.platform, device.arch))) + _details(device)))
    if device.platform == "cpu":
        times = ", ".join(f"{form} {one} and {many} ms" for form in cpu.FORMS for one, many in [cpu.milliseconds(form)])
        table.add_row("products", escape(f"of 1 and 8 rows with weights in {times}"))
    printed = None
    for op in jfa.explain(device):
        table.add_row(op.op, escape(f"{op.backend} ({op.tiles})"))
        for backend, reason in () if op.refused == printed else op.refused:
            table.add_row("", escape(f"not {backend}: {reason}"))
        printed = op.refused
    try:
        sizes = list(_sizes(model, dtype, quantization))
    except ValueError as error:
        if model != DEFAULT_MODEL:
            raise
        # the user did not ask for the default model: print the rest without it
        sizes = [("model", str(error))]
    for name, text in sizes:
        table.add_row(name, escape(text))
    console.print(table)


def _sizes(model: str, given: str | None, quantization: str | None) -> Iterator[tuple[str, str]]:
    dtype = compute_dtype(given)
    config = None if model.lower() in PACKAGED or os.path.exists(model) else PRESETS.get(model.lower())
    if config is not None:
        name, stored, ends = model, "without weights", []
        weights, tensors = Weights(quantization=None if quantization in ("none", "stored") else quantization), {}
    else:
        checkpoint = open_checkpoint(model)
        config, name, stored = checkpoint.config, checkpoint.path.stem, f"stored as {checkpoint.stored_dtype}"
        weights, tensors = weights_of(checkpoint, quantization, given), checkpoint.tensors
        tokenizer = checkpoint.load_tokenizer()
        texts = tokenizer.core.id_to_token if tokenizer else {}.get
        ends = [f"{texts(i) or 'token'} ({i})" for i in checkpoint.generation.ends(tokenizer) if i < config.vocab_size]
    users = FAMILIES[config.architecture].users
    yield "model", f"{name} ({users}): {config.num_params / 1e6:,.1f} M parameters, {stored}"
    num_bytes = weights.num_bytes(named_leaves(abstract_decoder(config, dtype)), tensors)
    yield "", f"{num_bytes / 1e6:,.0f} MB in memory, weights as {weights.describe(dtype)}"
    if ends:
        yield "end tokens", ", ".join(ends)
    if config.attention_layers:
        whole = config.cache_elements(config.context_length) * dtype.itemsize
        context = f"{whole / 1e6:,.0f} MB for its context of {config.context_length:,} tokens"
        yield "KV cache", f"{config.cache_elements_per_token * dtype.itemsize:,} bytes per token, {context}"
    if (states := jax.eval_shape(functools.partial(state_cache, config, batch=1, dtype=dtype))) is not None:
        yield "states", f"{states.num_bytes:,} bytes per text, however long it is, in {len(states.state)} layers"
    windows = [window for i in range(config.num_layers) if (window := config.window(i)) is not None]
    if windows:
        yield "", f"{len(windows)} of {config.num_layers} layers see and store only the last {windows[0]:,} tokens"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _details(device: jfa.DeviceInfo) -> str:
    if not device.lds_bytes:
        return ""
    return f", {device.compute_units} compute units, {device.lds_bytes // 1024} KiB of LDS per workgroup"
