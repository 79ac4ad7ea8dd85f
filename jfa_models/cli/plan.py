"""`jfa plan`: what a model needs of devices that are not there, and what they could do at best."""

from typing import Any

import click

from jfa_models.cli.base import ModelName, mesh_options
from jfa_models.decoding.options import DTYPES, KV_DTYPES
from jfa_models.rates import CARDS

QUANTIZATIONS = ("int8", "int8-dynamic", "int4", "fp8")
_COUNT, _RATE = click.IntRange(min=1), click.FloatRange(min=0, min_open=True)


@click.command()
@click.option("--model", type=ModelName(), required=True, help="A name such as llama-3-70b; or as for `jfa info`.")
@click.option("--arch", type=click.Choice(tuple(CARDS)), required=True, help="Architecture of the devices.")
@click.option("--devices", type=_COUNT, default=1, show_default=True, help="Devices of each host.")
@click.option("--hosts", type=_COUNT, default=1, show_default=True)
@mesh_options
@click.option("--batch", type=_COUNT, default=64, show_default=True, help="Sequences at a time, over all devices.")
@click.option("--context", type=_COUNT, help="Tokens of each sequence. Default: the model's context.")
@click.option("--prompt", type=_COUNT, help="Tokens of a prompt. Default: the context.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
@click.option("--quantization", type=click.Choice(QUANTIZATIONS), help="Of weights.")
@click.option("--kv-dtype", type=click.Choice(KV_DTYPES), help="Of the pages of the KV cache.")
@click.option("--hbm-gb", type=_RATE, help="Memory of a device. This and the following: instead of the card's.")
@click.option("--hbm-tb-per-s", type=_RATE, help="Rate of this memory.")
@click.option("--tflops", type=_RATE, help="Rate of matrix products in 16 bits.")
@click.option("--link-gb-per-s", type=_RATE, help="From a device to others of its host.")
@click.option("--host-link-gb-per-s", type=_RATE, help="From a device to other hosts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def plan(tensor_parallel: int | None, mesh_sizes: dict[str, int] | None, **options: Any) -> None:
    """Compute what fits on devices, how fast, and how to divide them.

    Needs none of the devices. Every number is computed from the rates of data
    sheets, which programs do not reach: none is measured.
    """
    if "data" in (mesh_sizes or ()):
        raise click.UsageError("the number of engines follows from that of the devices: leave data out")
    if tensor_parallel is not None:
        if mesh_sizes is not None:
            raise click.UsageError("--tensor-parallel and --mesh both say how the model is divided: give one")
        mesh_sizes = {"tensor": tensor_parallel}
    from jfa_models.cli import planned

    planned.show(mesh=mesh_sizes, **options)
