"""The work, in units of about a minute, most valuable first."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jfa.types import DeviceInfo

from .. import names
from ..measure import attention, decode, paged, peers, prefill
from ..proof import ops
from ..records.record import Record
from . import correctness, tuning

CORRECTNESS, TUNING = correctness.STAGE, "tuning"
STAGES = (CORRECTNESS, "attention", "models", "paged", TUNING, "attention, other lengths")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """A unit of work.

    Attributes:
      stage: one of STAGES.
      run: measures; takes the records of all units that are done.
    """

    stage: str
    name: str
    run: Callable[[Sequence[Record]], Iterable[Record]]

    @property
    def key(self) -> str:
        """Names the unit in a ledger."""
        return f"{self.stage}: {self.name}"


class Rows(NamedTuple):
    """Rows of a decode step, and the tokens of context in each."""

    batch: int
    context: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured. layers: of each model; None: all. The tuples are in order of value."""

    name: str
    quick: bool  # fewer cases for correctness, and only one entry of a table to tune
    samples: int
    lengths: tuple[int, ...]
    other_lengths: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: str  # of the attention stages
    models: tuple[str, ...]
    layers: int | None
    prompts: tuple[int, ...]
    decodes: tuple[Rows, ...]
    pages: tuple[Rows, ...]
    page_dtype: str
    page_kinds: tuple[str, ...]
    page_heads: tuple[int, int]
    page_head_dim: int


# the shapes of the commands attention, prefill, decode and paged; the lengths that tell most come first
_LENGTHS = (4096, 2048, 1024, 512, 256)
FULL = Size(
    name="full",
    quick=False,
    samples=15,
    lengths=_LENGTHS,
    other_lengths=tuple(length for length in range(256, 4097, 64) if length not in _LENGTHS),
    heads=32,
    head_dim=128,
    dtype="float16",
    models=("mistral-7b", "llama-3-8b", "phi-2"),
    layers=None,
    prompts=(2048, 512, 1024),
    decodes=(Rows(1, 1024), Rows(64, 1024), Rows(8, 1024)),
    pages=(Rows(64, 8192), Rows(8, 8192), Rows(64, 1024), Rows(1, 8192), Rows(8, 1024)),
    page_dtype="bfloat16",
    page_kinds=names.PAGE_KINDS,
    page_heads=(32, 8),
    page_head_dim=128,
)
# a try-out in a few minutes on two cores
QUICK = Size(
    name="quick",
    quick=True,
    samples=3,
    lengths=(256, 128),
    other_lengths=(192,),
    heads=4,
    head_dim=64,
    dtype="float32",
    models=("phi-2",),
    layers=1,
    prompts=(128,),
    decodes=(Rows(1, 128),),
    pages=(Rows(8, 256),),
    page_dtype="float32",
    page_kinds=("same", "int8"),
    page_heads=(8, 2),
    page_head_dim=64,
)


def units(size: Size, device: DeviceInfo) -> tuple[list[Unit], dict[str, str]]:
    """(the units, stages that this machine cannot do with the reason)."""
    why = tuning.why_not()
    found = [
        *_correctness(size, device),
        *_attention("attention", size, device, size.lengths),
        *_models(size),
        *_paged(size),
        *(() if why else _tuning(size, device)),
        *_attention("attention, other lengths", size, device, size.other_lengths),
    ]
    return found, {TUNING: why} if why else {}


def _correctness(size: Size, device: DeviceInfo) -> Iterator[Unit]:
    for row in correctness.rows(device.arch, quick=size.quick):
        of = "options" if row.head_dim is None else f"head_dim {row.head_dim}"
        for number, cases in enumerate(correctness.parts(row), 1):
            yield Unit(
                stage=CORRECTNESS,
                name=f"{row.op}, {row.direction}, {row.dtype}, {of}, part {number}",
                run=_run(correctness.check, row, cases),
            )


def _attention(stage: str, size: Size, device: DeviceInfo, lengths: Sequence[int]) -> Iterator[Unit]:
    for direction, length in itertools.product(("forward", "backward"), lengths):
        case = attention.Case(
            batch=1,
            length=length,
            heads=size.heads,
            kv_heads=size.heads,
            head_dim=size.head_dim,
            dtype=size.dtype,
            causal=True,
        )
        yield Unit(
            stage=stage,
            name=f"{direction}, {length} tokens",
            run=_run(
                attention.measure,
                [case],
                directions=(direction,),
                implementations=peers.usual(device.platform),
                samples=size.samples,
            ),
        )


def _models(size: Size) -> Iterator[Unit]:
    """The first prompt and the first decode step of each model, then the others."""
    for number in range(max(len(size.prompts), len(size.decodes))):
        for model, prompt in itertools.product(size.models, size.prompts[number : number + 1]):
            yield Unit(
                stage="models",
                name=f"prefill, {model}, {prompt} tokens",
                run=_run(
                    prefill.measure,
                    [model],
                    layers=size.layers,
                    batch=1,
                    seq_lens=[prompt],
                    implementations=("reference", "jfa"),
                    dtype=None,
                    samples=size.samples,
                ),
            )
        for model, rows in itertools.product(size.models, size.decodes[number : number + 1]):
            yield Unit(
                stage="models",
                name=f"decode, {model}, {rows.batch} x {rows.context} tokens",
                run=_run(
                    decode.measure,
                    [model],
                    layers=size.layers,
                    batches=[rows.batch],
                    contexts=[rows.context],
                    implementations=("jfa",),
                    dtype=None,
                    samples=size.samples,
                ),
            )


def _paged(size: Size) -> Iterator[Unit]:
    for rows in size.pages:
        yield Unit(
            stage="paged",
            name=f"{rows.batch} x {rows.context} tokens",
            run=_run(
                paged.measure,
                batches=[rows.batch],
                contexts=[rows.context],
                page_sizes=[16],
                kv_dtypes=size.page_kinds,
                heads=size.page_heads,
                head_dim=size.page_head_dim,
                dtype=size.page_dtype,
                implementation=None,
                samples=size.samples,
            ),
        )


def _tuning(size: Size, device: DeviceInfo) -> Iterator[Unit]:
    """For each dtype and head_dim the first candidates of every kernel, then the next ones."""
    entries = tuning.keys()
    if size.quick:
        entries = [[tuning.Key(kernel=ops.OPS[0].kernel, dtype="bfloat16", head_dim=64)]]
    for keys in entries:
        for turn, key in itertools.product(range(1 if size.quick else tuning.ROUNDS), keys):
            about = f"{key.kernel}, {key.dtype}, head_dim {key.head_dim}"
            if not turn:
                compiling = _run(tuning.compile_candidates, key, device.arch)
                yield Unit(stage=TUNING, name=f"candidates of {about}", run=compiling)
            measuring = functools.partial(tuning.measure, key, turn, samples=size.samples)
            yield Unit(stage=TUNING, name=f"{about}, round {turn + 1}", run=measuring)


def _run(measure: Callable[..., Iterable[Record]], *args: Any, **options: Any) -> Callable:
    """A unit's run that needs no earlier records."""
    return lambda records: measure(*args, **options)
