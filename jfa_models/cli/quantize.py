"""`jfa quantize`: writes a model with its linear layers in 8 or 4 bits."""

from pathlib import Path

import click

from jfa_models.cli.base import ModelName
from jfa_models.decoding.options import DTYPES, KV_DTYPES


@click.command()
@click.argument("model", type=ModelName())
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--kind", type=click.Choice(KV_DTYPES), default="int4", show_default=True)
@click.option(
    "--group",
    type=click.IntRange(min=2),
    help="Inputs with a common scale. Default: 128, 64 or 32, the first that divides all layers, for int4; else a row.",
)
@click.option(
    "--awq", "calibration", type=click.File(), help="Text that shows which inputs are large: protects their weights."
)
@click.option("--symmetric", is_flag=True, help="int4 without zero points; transformers does not load those.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of the other weights.")
def quantize(model: str, folder: Path, kind: str, group: int | None, calibration, symmetric: bool, dtype: str) -> None:
    """Write MODEL with weights in 8 or 4 bits to FOLDER.

    MODEL is what jfa generate takes. The result is in the format of compressed-tensors, which other programs read too.
    Embedding, output layer and routers stay floats.
    """
    if folder.exists() and any(folder.iterdir()):
        raise click.UsageError(f"{folder} is not empty; use another folder")

    if symmetric and kind != "int4":
        raise click.UsageError(f"--symmetric needs --kind int4: {kind} has no zero points")

    from jfa_models.checkpoints.reader import open_checkpoint
    from jfa_models.cli import running
    from jfa_models.quantize import common_group, quantize

    if open_checkpoint(model).is_quantized:
        click.echo(f"jfa: {model} is quantized already: its numbers are rounded a second time", err=True)
    loaded = running.load(model, dtype=dtype, quantization="none")
    if group is None and kind == "int4":
        group = common_group(loaded)
    text = None if calibration is None else calibration.read()
    quantize(loaded, kind, group_size=group, symmetric=symmetric, calibration=text).save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    scales = f"{group} inputs" if group else "row"
    click.echo(f"{folder}: {size / 1e6:,.0f} MB, {kind} with a scale for each {scales}", err=True)
