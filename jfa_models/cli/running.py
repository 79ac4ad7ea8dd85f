"""Loads and runs the model of a command, and prints text while it is generated."""

import contextlib
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from jfa_models.cli.sampling import given
from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.outputs import RequestOutput
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.pretrained import from_pretrained


def load(
    model: str,
    *,
    adapters: Sequence[tuple[str, str]] = (),
    adapter_scale: float = 1.0,
    mesh_sizes: Mapping[str, int] | None = None,
    replicas: bool = False,
    **options,
) -> LanguageModel:
    """Loads a model while a status line is shown; compiled programs are cached for the next start.

    replicas: the command uses all replicas of an axis "data".
    """
    if mesh_sizes is not None:
        if mesh_sizes.get("data", 1) > 1 and not replicas:
            raise ValueError(
                f"data={mesh_sizes['data']}: this command runs one engine, not replicas; leave it out, or start the "
                "command once for each"
            )
        options["mesh"] = _mesh(mesh_sizes)
    if adapter_scale != 1.0 and not adapters:
        raise ValueError(f"--adapter-scale {adapter_scale} needs --adapter: there is nothing else that it scales")
    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jfa" / "xla"
        with contextlib.suppress(OSError):  # if it is not writable, every start compiles
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
    with Console(stderr=True).status(f"loading {escape(model)}"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        loaded = from_pretrained(model, **options)
        for name, path in adapters:
            loaded.load_adapter(name, path, scale=adapter_scale)
    for warning in caught:
        click.echo(f"jfa: {warning.message}", err=True)
    return loaded


def _mesh(sizes: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh of the first devices."""
    devices, needed = jax.devices(), math.prod(sizes.values())
    if needed > len(devices):
        shown = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"--mesh {shown} needs {needed} devices, and JAX sees {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices[:needed])


def read_text(path: Path) -> str:
    """The contents of a file that an option names.

    Raises:
      ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from None


def sampling_params(model: LanguageModel, sampling: Mapping[str, Any]) -> SamplingParams:
    """The SamplingParams of a command line; for omitted options, the values that the model's authors recommend.

    If they recommend no temperature, decoding is greedy, unless an option that only affects sampling is given.
    """
    options = given(sampling)
    if model.defaults.temperature is None and not options.keys() & {"top_k", "top_p", "min_p", "seed"}:
        options.setdefault("temperature", 0.0)
    return model.default_params(**options)


def print_growth(results: Iterator[RequestOutput], *, after: str) -> str:
    """Prints `after`, then the text of the results as it grows; returns the text.

    Raises:
      ValueError: the request ended with an error.
    """
    # the spinner clears its line, so nothing must be printed there yet
    with Console(stderr=True).status("processing the prompt (the first run also compiles)"):
        first = next(results)
    click.echo(after, nl=False)
    shown, result = "", first
    for result in itertools.chain([first], results):
        text = result.outputs[0].text
        click.echo(text[len(shown) :], nl=False)
        shown = text
    click.echo()
    if result.error is not None:
        raise ValueError(result.error)
    return shown


def timed(
    stream: Callable[..., Iterator[RequestOutput]], prompt: str, params: SamplingParams, adapter: str | None
) -> dict:
    """Generates for one prompt and measures times, after generating two tokens to compile every step."""
    for _ in itertools.islice(stream(prompt, params, adapter=adapter), 2):
        pass
    start = time.perf_counter()
    results = stream(prompt, params, adapter=adapter)
    result = next(results)
    first = time.perf_counter()
    *_, result = result, *results
    end = time.perf_counter()
    if result.error is not None:
        raise ValueError(result.error)
    output = result.outputs[0]
    decoded = len(output.token_ids) - 1
    return {
        "prompt": prompt,
        "prompt_token_ids": list(result.prompt_token_ids),
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "prefill_ms": round((first - start) * 1e3, 3),
        "decode_ms": round((end - first) * 1e3, 3),
        "tokens_per_s": round(decoded / (end - first), 3) if decoded else None,
    }


@contextlib.contextmanager
def training_bar(model: LanguageModel) -> Iterator[Callable[[Any], None]]:
    """Shows the progress of a fine-tune on stderr; yields what is to be called with each training.run.Progress.

    A terminal gets a bar, anything else some twenty lines.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, peak = bar.add_task("compiling", total=None), _matrix_peak(model.dtype)

        def show(done: Any) -> None:
            share = done.flops / done.seconds / peak
            text = f"loss {done.loss:.3f}, {done.tokens / done.seconds:,.0f} tokens/s ({share:.0%} of matrix peak)"
            text += "" if done.eval_loss is None else f", evaluation {done.eval_loss:.4f}"
            bar.update(task, description=text, completed=done.step, total=done.num_steps)
            every = max(1, done.num_steps // 20)
            if not console.is_terminal and (done.step % every == 0 or done.eval_loss is not None):
                click.echo(f"step {done.step} of {done.num_steps}: {text}", err=True)

        yield show


def _matrix_peak(dtype: Any) -> float:
    """FLOP/s of a square matrix product on this device, the best of a few."""
    x = jnp.ones((1024, 1024), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(seconds)
