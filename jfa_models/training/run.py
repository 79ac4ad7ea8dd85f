"""A whole fine-tune: batches, steps, evaluation, a log, checkpoints, and going on where an earlier call stopped.

Everything that the result depends on is in Options, the data and the model, so a run that was interrupted at any moment
and goes on has the losses of one that was not, bit for bit.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jfa import QuantizedArray
from jfa_models.checkpoints.families import FAMILIES
from jfa_models.checkpoints.peft import Adapter, save_adapter
from jfa_models.decoding.language_model import LanguageModel
from jfa_models.text.files import read_json, write_json
from jfa_models.training.data import Data, batches
from jfa_models.training.step import (
    Batch,
    Remat,
    Trainable,
    TrainState,
    make_eval_step,
    make_optimizer,
    make_train_step,
    new_state,
)

LOG_FILE, RUN_FILE, LOCK_FILE, CHECKPOINTS = "log.jsonl", "run.json", "run.lock", "checkpoints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is trained.

    Attributes:
      epochs: how often every text is seen. max_steps: stop earlier; None: do not.
      row_length: tokens of a row, into which texts are packed.
      rows, accumulate: a step's gradient is that of accumulate times rows rows, computed `rows` at a time.
      learning_rate: at its highest: it rises over the first warmup (a fraction of all steps) in equal parts, of which
        the first step has one, then falls to a tenth along a cosine.
      weight_decay: of matrices only.
      max_grad_norm: larger gradients are scaled down to it; None: never.
      seed: of the order of the texts, and of what an adapter's lora_dropout drops.
      save_every: steps between checkpoints. eval_every: steps between evaluations; None: one at the end.
      remat: what the backward pass computes again to save memory: "none", "products" (all but linear layers and
        attention), "attention" (all but the attention of each block), "all".
    """

    epochs: int = 1
    max_steps: int | None = None
    row_length: int = 1024
    rows: int = 4
    accumulate: int = 1
    learning_rate: float = 2e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    seed: int = 0
    save_every: int = 100
    eval_every: int | None = None
    remat: Remat = "products"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("row_length", 2), ("rows", 1), ("accumulate", 1), ("save_every", 1)):
            _check(name, getattr(self, name), int, least)
        for name in ("max_steps", "eval_every"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), int, 1)
        _check("seed", self.seed, int, 0)
        for name in ("learning_rate", "weight_decay", "warmup"):
            _check(name, getattr(self, name), (int, float), 0)
        if self.warmup > 1:
            raise ValueError(f"warmup is a fraction of all steps, at most 1, got {self.warmup}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, or None, got {self.max_grad_norm}")


def _check(name: str, value: Any, kind: type | tuple[type, ...], least: int) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not (value >= least and math.isfinite(value)):
        what = "an integer" if kind is int else "a number"
        raise ValueError(f"{name} must be {what} of at least {least}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """A finished step, as callers are told of it.

    Attributes:
      loss: mean over the step's targets, nats. eval_loss: over the evaluation's; None: there was none.
      tokens: that the step computed, empty places at the ends of rows not counted.
      seconds: that the step took, without evaluation and checkpoint.
      flops: of the step's matrix products with weights, forward and backward.
    """

    step: int
    num_steps: int
    loss: float
    grad_norm: float
    targets: int
    tokens: int
    seconds: float
    flops: float
    eval_loss: float | None = None


def finetune(
    model: LanguageModel,
    adapter: Adapter | None,
    data: Data,
    output: Path,
    options: Options = Options(),
    *,
    eval_data: Data | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> None:
    """Trains an adapter, or the whole model, and writes it to a folder: an adapter as PEFT stores it, or a checkpoint.

    The folder also gets log.jsonl (a line per step), run.json (what the run depends on) and checkpoints. If it has
    those of an earlier call with the same arguments, the run goes on from the last checkpoint.

    Args:
      adapter: training.lora.new_adapter, or one that was read, to go on with; None: all parameters are trained.
      eval_data: texts to evaluate with; not trained on.
      on_step: called after each step.

    Raises:
      ValueError: the folder has another run, or one that is going on, or a checkpoint that cannot be read; a text does
        not fit the model or the rows; or the loss or gradient is not finite: the message has the step and the lines of
        its texts. The last checkpoint remains.
      RuntimeError: a step needs more memory than the device has.
    """
    for one in (data, *([] if eval_data is None else [eval_data])):
        _check_texts(one, model.config.vocab_size, options.row_length)
    plan = _Plan(data, options)
    trainable = Trainable(model, adapter, remat=options.remat)
    optimizer = make_optimizer(
        learning_rate=options.learning_rate,
        num_steps=plan.num_steps,
        warmup_steps=round(options.warmup * plan.num_steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
    )
    state = new_state(trainable.start(model), optimizer)
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output), _checkpoints(output) as manager:
        _same_run(output / RUN_FILE, _description(model, adapter, data, options, eval_data))
        state = _restored(manager, state)
        log = _Log(output / LOG_FILE, int(state.step))
        step_flops = _flops(model, is_full=adapter is None)
        train_step, eval_step = make_train_step(trainable, optimizer, seed=options.seed), make_eval_step(trainable)
        last = time.monotonic()
        for number, (batch, lines) in plan.batches(int(state.step)):
            with _memory_named(number):
                state, metrics = train_step(trainable.base, state, batch)
                found = {name: float(x) for name, x in jax.device_get(metrics).items()}
            if not all(map(math.isfinite, found.values())):
                raise ValueError(
                    f"step {number}: the loss is {found['loss']} and the gradient's norm {found['grad_norm']}; its "
                    f"texts are lines {', '.join(map(str, lines[:20]))}{' ...' * (len(lines) > 20)} of {data.path}; "
                    "lower the learning rate, or look at these lines"
                )
            seconds, is_last = time.monotonic() - last, number == plan.num_steps
            eval_loss = None
            if eval_data is not None and (is_last or (options.eval_every and number % options.eval_every == 0)):
                eval_loss = _evaluate(eval_step, trainable, state, eval_data, options)
            tokens = int(np.count_nonzero(batch.segments))
            done = Progress(
                step=number,
                num_steps=plan.num_steps,
                loss=found["loss"],
                grad_norm=found["grad_norm"],
                targets=int(found["targets"]),
                tokens=tokens,
                seconds=seconds,
                flops=step_flops * tokens,
                eval_loss=eval_loss,
            )
            log.write(done)
            if is_last or number % options.save_every == 0:
                _save(manager, number, state)
            if on_step is not None:
                on_step(done)
            last = time.monotonic()
        tensors = jax.device_get(state.tensors)
        if adapter is not None:
            prefix = FAMILIES[model.config.architecture].prefix
            save_adapter(output, dataclasses.replace(adapter, tensors=tensors), prefix=prefix)
        else:
            held = dict(zip(model.names, model.params, strict=True))
            params = tuple(jnp.asarray(tensors[name], jax.tree.leaves(x)[0].dtype) for name, x in held.items())
            trained = LanguageModel(
                decoder=model.decoder, params=params, tokenizer=model.tokenizer, defaults=model.defaults
            )
            trained.save_pretrained(output)


@contextlib.contextmanager
def _memory_named(step: int) -> Iterator[None]:
    """Where the device's memory is not enough: what needs less."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RuntimeError(
            f"step {step} needs more memory than the device has: use remat 'attention' or 'all', fewer rows with a "
            f"larger accumulate, or a smaller row_length ({str(error).splitlines()[0]})"
        ) from error


def _check_texts(data: Data, vocab_size: int, row_length: int) -> None:
    for one in data.examples:
        where = f"{data.path}, line {one.line}"
        if len(one.ids) > row_length:
            raise ValueError(
                f"{where}: the text has {len(one.ids)} tokens, more than a row of {row_length}: read the file with a "
                "max_length of at most row_length"
            )
        if (largest := one.ids.max()) >= vocab_size:
            raise ValueError(
                f"{where}: token {largest} is not one of the model's {vocab_size}: the tokenizer is another model's, "
                "or has tokens that the embedding lacks"
            )


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Refuses a second run in a folder while the first goes on. The lock ends with its process."""
    with (output / LOCK_FILE).open("a") as file:
        with contextlib.suppress(ImportError):  # Windows has none
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run is going on in {output}: wait for it, or use another folder") from None
            except OSError:  # some network file systems have no locks
                pass
        yield


class _Plan:
    """The batches of a run by the number of their step, counted from 1."""

    def __init__(self, data: Data, options: Options):
        self._examples, self._options = data.examples, options
        self._per_epoch = [sum(1 for _ in self._epoch(epoch)) for epoch in range(options.epochs)]
        self.num_steps = min(sum(self._per_epoch), options.max_steps or sum(self._per_epoch))

    def _epoch(self, epoch: int) -> Iterator[tuple[Batch, list[int]]]:
        one = self._options
        return batches(
            self._examples,
            row_length=one.row_length,
            rows=one.rows,
            parts=one.accumulate,
            seed=one.seed,
            epoch=epoch,
        )

    def batches(self, done: int) -> Iterator[tuple[int, tuple[Batch, list[int]]]]:
        """(step, (batch, lines)) after the first `done` steps."""
        epochs = itertools.chain.from_iterable(map(self._epoch, range(len(self._per_epoch))))
        return itertools.islice(enumerate(epochs, start=1), done, self.num_steps)


def _evaluate(eval_step, trainable: Trainable, state: TrainState, data: Data, options: Options) -> float:
    total = np.zeros(2)
    for batch, _ in batches(data.examples, row_length=options.row_length, rows=options.rows):
        total += np.asarray(eval_step(trainable.base, state.tensors, batch), np.float64)
    return float(total[0] / total[1])


def _flops(model: LanguageModel, *, is_full: bool) -> float:
    """Of the matrix products with weights for one token: forward, gradient of the input, and of trained weights."""
    matrices = {name: shape for name, shape in model.shapes.items() if len(shape) > 1}
    count = sum(math.prod(shape) for name, shape in matrices.items() if name != "embed.weight")
    if "lm_head.weight" not in matrices:
        count += math.prod(matrices["embed.weight"])
    if (experts := model.config.experts) is not None:
        stacked = sum(math.prod(shape) for shape in matrices.values() if len(shape) == 3)
        count -= stacked * (1 - experts.experts_per_token / experts.num_experts)
    return count * (6.0 if is_full else 4.0)


def _description(
    model: LanguageModel, adapter: Adapter | None, data: Data, options: Options, eval_data: Data | None
) -> dict[str, Any]:
    """What the losses depend on."""

    def texts(data: Data | None) -> str | None:
        if data is None:
            return None
        found = hashlib.sha256()
        for one in data.examples:
            found.update(one.ids.tobytes() + one.is_target.tobytes() + b"|")
        return found.hexdigest()

    about: dict[str, Any] = {"trains": "all parameters"}
    if adapter is not None:
        first = _fingerprint_of_adapter(adapter)
        about = {"adapter": dataclasses.asdict(adapter.config), "first tensors of the adapter": first}
    about["weights of the model"] = _fingerprint_of_weights(model)
    about |= {"model": dataclasses.asdict(model.config), "dtype": str(model.dtype), "data": texts(data)}
    about |= {"eval_data": texts(eval_data), "options": dataclasses.asdict(options)}
    return json.loads(json.dumps(about, default=str))


def _fingerprint_of_adapter(adapter: Adapter) -> str:
    found = hashlib.sha256()
    for module, kinds in sorted(adapter.tensors.items()):
        for kind, x in sorted(kinds.items()):
            found.update(f"{module} {kind} {x.shape}".encode())
            if kind != "lora_magnitude_vector":  # a new one's is computed, with other roundings on another device
                found.update(np.asarray(x, np.float32).tobytes())
    return found.hexdigest()


def _fingerprint_of_weights(model: LanguageModel) -> str:
    """Tells quantizations and models of the same architecture apart, from a few numbers of each parameter."""
    found = hashlib.sha256()
    for name, x in zip(model.names, model.params, strict=True):
        found.update(f"{name} {[(part.shape, str(part.dtype)) for part in jax.tree.leaves(x)]}".encode())
        if not isinstance(x, QuantizedArray):  # quantizing rounds otherwise on another device
            found.update(np.asarray(x[(0,) * (x.ndim - 1)][:64], np.float32).tobytes())
    return found.hexdigest()


def _same_run(file: Path, about: Mapping[str, Any]) -> None:
    try:
        before = read_json(file) if file.exists() else None
    except ValueError:
        raise ValueError(f"{file} is damaged: delete the folder, or use another output folder") from None
    if before == about:
        return
    log = file.with_name(LOG_FILE)
    if before is None or not log.exists() or not log.stat().st_size:  # no step was done: nothing is lost
        part = file.with_suffix(".part")  # so that no reader finds an incomplete file
        write_json(part, about)
        os.replace(part, file)
        return
    wrong = sorted(name for name in {*before, *about} if before.get(name) != about.get(name))
    given, other = before.get("options", {}), about["options"]
    if "options" in wrong:
        wrong.remove("options")
        wrong += [f"{name} ({given.get(name)}, now {other[name]})" for name in other if given.get(name) != other[name]]
    raise ValueError(
        f"{file.parent} has another run, which differs in {', '.join(wrong)}: use another output folder, or delete it"
    )


class _Log:
    """log.jsonl: a line per step, without those after the checkpoint from which a run goes on."""

    def __init__(self, file: Path, steps: int):
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        kept = [line for line in lines if _step_of(line) <= steps]
        part = file.with_suffix(".part")
        part.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(part, file)
        self._file = file

    def write(self, done: Progress) -> None:
        about = {name: x for name, x in dataclasses.asdict(done).items() if name != "num_steps" and x is not None}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(about) + "\n")


def _step_of(line: bytes) -> float:
    """Infinity for a line that a crash of the machine left incomplete."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _checkpoints(output: Path) -> ocp.CheckpointManager:
    # not asynchronous: the tensors are donated to the next step
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager((output / CHECKPOINTS).absolute(), options=options)


def _leaves(state: TrainState) -> dict[str, jax.Array]:
    return {f"{i:06}": x for i, x in enumerate(jax.tree.leaves(state))}


def _save(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    manager.save(step, args=ocp.args.StandardSave(_leaves(state)))
    manager.wait_until_finished()


def _restored(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The state of the last checkpoint, or the given one if there is none."""
    if (step := manager.latest_step()) is None:
        return state
    try:
        found = manager.restore(step, args=ocp.args.StandardRestore(_leaves(state)))
    except Exception as error:  # of many kinds
        before = max((one for one in manager.all_steps() if one < step), default=0)
        raise ValueError(
            f"the checkpoint {manager.directory / str(step)} cannot be read: delete this folder to go on after step "
            f"{before} ({type(error).__name__}: {str(error)[:80]})"
        ) from error
    return jax.tree.unflatten(jax.tree.structure(state), [found[name] for name in sorted(found)])
