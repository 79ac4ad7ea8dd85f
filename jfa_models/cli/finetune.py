"""`jfa finetune`: trains an adapter, or a whole model, on a file of texts."""

from pathlib import Path
from typing import Any

import click

from jfa_models.cli.base import ModelName, NamedAdapter, mesh_options
from jfa_models.decoding.options import DTYPES, QUANTIZATIONS

_OPTION_OF = {"targets": "target", "use_dora": "dora", "use_rslora": "rslora", "dropout": "lora-dropout"}
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--model", type=ModelName(), default="smollm2", show_default=True, help="What jfa generate takes.")
@click.option("--data", type=_FILE, required=True, help="Texts, as JSON Lines.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the result.")
@click.option("--full", is_flag=True, help="Train all parameters instead of an adapter.")
@click.option("--adapter", type=NamedAdapter(), help="Go on with an adapter of this model.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--alpha", type=float, help="The change is scaled by alpha / rank. Default: 2 * rank.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="End of a name, such as q_proj or experts.down_proj. Default: all linear layers, without experts.",
)
@click.option("--dora", "use_dora", is_flag=True, help="Train the norms of rows too.")
@click.option("--rslora", "use_rslora", is_flag=True, help="Scale by alpha / sqrt(rank).")
@click.option(
    "--lora-dropout",
    "dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Part of the inputs' numbers that the adapter does not see in a step.",
)
@click.option("--quantization", type=click.Choice(QUANTIZATIONS), help="Of the base, which stays as it is (QLoRA).")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: float32 on a CPU, bfloat16 elsewhere.")
@mesh_options
@click.option("--epochs", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after this many steps.")
@click.option("--max-length", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens of a text.")
@click.option("--too-long", type=click.Choice(("cut", "drop")), default="cut", show_default=True)
@click.option("--rows", type=click.IntRange(min=1), default=4, show_default=True, help="Rows of --max-length per part.")
@click.option("--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Parts per step.")
@click.option("--learning-rate", type=click.FloatRange(min=0), default=2e-4, show_default=True)
@click.option("--warmup", type=click.FloatRange(0, 1), default=0.03, show_default=True, help="Fraction of all steps.")
@click.option("--weight-decay", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--max-grad-norm", type=float, default=1.0, show_default=True, help="0: no clipping.")
@click.option(
    "--remat",
    type=click.Choice(("none", "products", "attention", "all")),
    default="products",
    show_default=True,
    help="What the backward pass computes again, from nothing to all: faster, or less memory.",
)
@click.option("--train-on-prompts", is_flag=True, help="Learn every token, not the answers alone.")
@click.option("--eval-data", type=_FILE, help="Texts to evaluate with.")
@click.option("--eval-fraction", type=click.FloatRange(0, 1), default=0.0, help="Part of --data to evaluate with.")
@click.option("--eval-every", type=click.IntRange(min=1), help="Steps. Default: at the end.")
@click.option("--save-every", type=click.IntRange(min=1), default=100, show_default=True, help="Steps.")
@click.option("--skip-bad-lines", is_flag=True, help="Leave out lines that cannot be used.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="The curve of the loss, as .png or .svg.")
@click.pass_context
def finetune(
    context: click.Context,
    model: str,
    data: Path,
    output: Path,
    full: bool,
    adapter: tuple[str, str] | None,
    quantization: str | None,
    dtype: str | None,
    tensor_parallel: int | None,
    mesh_sizes: dict[str, int] | None,
    max_length: int,
    too_long: Any,
    train_on_prompts: bool,
    eval_data: Path | None,
    eval_fraction: float,
    skip_bad_lines: bool,
    plot: Path | None,
    seed: int,
    rank: int,
    alpha: float | None,
    targets: tuple[str, ...],
    use_dora: bool,
    use_rslora: bool,
    dropout: float,
    max_grad_norm: float,
    **options,
) -> None:
    """Train a LoRA adapter on a file of texts, or all parameters with --full.

    Each line of the file is a JSON object with "messages", with "prompt" and "completion", or with "text". Answers are
    learned, prompts are not. The output folder is in the format of PEFT, and jfa generate --adapter reads it.
    After an interruption, the same command goes on from the last checkpoint.
    """
    new: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "targets": targets,
        "use_dora": use_dora,
        "use_rslora": use_rslora,
        "dropout": dropout,
    }
    if full or adapter is not None:
        given = [name for name in new if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
        if full and adapter is not None:
            raise click.UsageError("--full trains all parameters, --adapter those of an adapter: use one of them")
        if given:
            name = _OPTION_OF.get(given[0], given[0])
            raise click.UsageError(f"--{name} belongs to a new adapter: leave out {'--full' if full else '--adapter'}")
    if dropout and use_dora:
        raise click.UsageError("--lora-dropout cannot be used with --dora: use one of them")
    if full and quantization not in (None, "none"):
        raise click.UsageError(f"--full trains floats: leave out --quantization {quantization}")
    if eval_data is not None and eval_fraction:
        raise click.UsageError("--eval-data and --eval-fraction both choose the evaluation's texts: use one of them")
    if options["eval_every"] and eval_data is None and not eval_fraction:
        raise click.UsageError("--eval-every needs --eval-data or --eval-fraction: there is nothing to evaluate with")

    from jfa_models.cli import running
    from jfa_models.training import Options, curve, finetune, new_adapter, read_data
    from jfa_models.training.data import split

    if plot is not None:
        curve.check(plot)
    chosen = Options(row_length=max_length, seed=seed, max_grad_norm=max_grad_norm or None, **options)
    divided: dict[str, Any] = dict(tensor_parallel=tensor_parallel, mesh_sizes=mesh_sizes, replicas=True)
    loaded = running.load(model, dtype=dtype, quantization=quantization or "none", **divided)
    if loaded.tokenizer is None:
        raise click.UsageError(f"{model} has no tokenizer, so texts cannot be read")
    if max_length > loaded.config.context_length:
        raise click.UsageError(f"--max-length {max_length} is more than the model's {loaded.config.context_length}")
    reading: dict[str, Any] = dict(
        max_length=max_length,
        too_long=too_long,
        train_on_prompts=train_on_prompts,
        skip_bad_lines=skip_bad_lines,
    )
    texts = read_data(data, loaded.tokenizer, **reading)
    texts, held_out = split(texts, eval_fraction, seed)
    if eval_data is not None:
        held_out = read_data(eval_data, loaded.tokenizer, **reading)
    for name, one in (("training", texts), ("evaluation", held_out)):
        if one is not None:
            click.echo(f"{name}: {one.describe()}", err=True)
    start = None
    if adapter is not None:
        start = loaded.read_adapter(adapter[1])
    elif not full:
        new["targets"] = targets or "all-linear"
        start = new_adapter(loaded, **new, seed=seed).for_base(model)
    with running.training_bar(loaded) as on_step:
        finetune(loaded, start, texts, output, chosen, eval_data=held_out, on_step=on_step)
    if plot is not None:
        curve.save(output, plot)
    what = "the model" if full else "the adapter"
    use = f"--model {output}" if full else f"--model {model} --adapter {output}"
    click.echo(f"{what} is in {output}: jfa generate {use} ...", err=True)
