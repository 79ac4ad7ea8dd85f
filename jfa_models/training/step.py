"""One step of training: the loss, its gradient, and the update, as pure functions for a loop of one's own.

What is trained is a tree of float32 arrays: the tensors of an adapter (checkpoints.peft.Adapter.tensors), or a
decoder's parameters by name. Everything else, the base, may be in 16 bits or quantized, and is never changed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from jfa import QuantizedArray
from jfa.quant import dequantize
from jfa.rules import with_default_rules
from jfa_models.checkpoints.changes import changes_of
from jfa_models.checkpoints.peft import Adapter
from jfa_models.checkpoints.places import place_of
from jfa_models.decoding.language_model import LanguageModel
from jfa_models.model.decoder import Block, Decoder
from jfa_models.model.lora import Adapters, Dropout
from jfa_models.model.partition import TENSOR, Axes, first_of, gathered, part_of, summed
from jfa_models.training.lora import NO_DORA

Tensors = Any  # a tree of float32 arrays
Remat = Literal["none", "products", "attention", "all"]

LOSS_ROWS = 512  # tokens whose logits are in memory at the same time

_names = jax.checkpoint_policies.save_only_these_names
REMAT: Mapping[str, Callable[[Callable], Callable] | None] = {
    # what a backward pass keeps of a block: everything; outputs of linear layers and attention; the attention's output
    # and the block's input; its input
    "none": None,
    "products": functools.partial(jax.checkpoint, policy=_names("jfa_product", "jfa_out", "jfa_lse")),
    "attention": functools.partial(jax.checkpoint, policy=_names("jfa_out", "jfa_lse")),
    "all": jax.checkpoint,
}
_WHOLE = "jfa_whole"
# everything but parameters that were gathered for a block
_KEEP_ALL = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_anything_except_these_names(_WHOLE))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of texts, packed one after another.

    Attributes:
      tokens: the first axis counts the parts of a batch that are computed one after another (gradient accumulation).
      segments: the number of each token's text in its row, 1 and up; 0: empty places at a row's end.
      is_target: tokens that are to be predicted from those before them. Never the first of a text.
    """

    tokens: Int[Array, "parts b t"]
    segments: Int[Array, "parts b t"]
    is_target: Int[Array, "parts b t"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes: the number of steps so far, the trained tensors, and the optimizer's state."""

    step: Int[Array, ""]
    tensors: Tensors
    optimizer: optax.OptState


class Trainable:
    """A model of which a part is trained: `forward` computes with the base and the part.

    Attributes:
      base: the parameters of the model; None for those that are trained.
    """

    def __init__(self, model: LanguageModel, adapter: Adapter | None, *, remat: Remat = "none"):
        """adapter: what its tensors are trained for; None: all parameters of the model are trained.

        Raises:
          ValueError: all parameters are to be trained, and some are quantized; the adapter's file has a copy of the
            embedding it was trained on, and the model has another one; its lora_dropout is above 0, and it is DoRA or
            changes experts; the model was loaded with attention_window; or several processes have it.
        """
        if remat not in REMAT:
            raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {remat!r}")
        if model.config.streaming is not None:
            raise ValueError(
                "a model that was loaded with attention_window cannot be trained, since it sees the first tokens of a "
                "row, which has several texts; load it without"
            )
        if model.partition.is_shared:
            raise ValueError("training is of one process: use a mesh of its own devices, jax.local_devices()")
        self._adapter, self._remat = adapter, REMAT[remat]
        self.partition = model.partition.for_training()
        self._config, self._names, self._shapes = model.config, model.names, model.shapes
        self._dtype = model.dtype
        self._graphdef, state = nnx.split(model.decoder)
        self._treedef = jax.tree.structure(state)
        self._specs = {
            name: self.partition.of_parameter(name, x) for name, x in zip(model.names, model.params, strict=True)
        }
        self.base: tuple[Any, ...] | None = None
        if adapter is not None:
            held = zip(model.params, self._specs.values(), strict=True)
            in_place = self.partition.mesh is None
            self.base = model.params if in_place else tuple(self.partition.put(x, spec) for x, spec in held)
        if adapter is not None and any("base" in kinds for kinds in adapter.tensors.values()):
            changes_of(adapter, model.config, model.shapes, model.float32)  # compares the copies with the model's own
        if adapter is not None and adapter.config.lora_dropout:
            _check_dropout(adapter, model)
        if adapter is not None and adapter.config.use_dora and self.partition.size(TENSOR) > 1:
            raise ValueError(
                "DoRA needs the norms of whole rows of weights, which an axis 'tensor' divides: train it with an axis "
                "'data' alone, or LoRA"
            )
        if adapter is None:
            wrong = [name for name, x in zip(model.names, model.params, strict=True) if isinstance(x, QuantizedArray)]
            if wrong:
                raise ValueError(
                    f"quantized weights such as {wrong[0]} cannot be trained: train an adapter, or load the model with "
                    "quantization='none'"
                )

    @property
    def has_dropout(self) -> bool:
        """Whether the loss depends on a key: the adapter's lora_dropout is above 0."""
        return self._adapter is not None and self._adapter.config.lora_dropout > 0

    def start(self, model: LanguageModel) -> Tensors:
        """The tensors before the first step, float32; over a mesh, divided as they are at rest."""
        if self._adapter is not None:  # the copies of an embedding that a file may have are not its own
            tensors = self._adapter.tensors.items()
            held: Any = {name: {kind: x for kind, x in kinds.items() if kind != "base"} for name, kinds in tensors}
        else:
            held = dict(zip(self._names, model.params, strict=True))

        def started(x: Any, spec: Any) -> Array:  # one at a time, before the next one is whole in float32
            x = jnp.array(x, jnp.float32)
            return x if self.partition.mesh is None else jax.block_until_ready(self.partition.put(x, spec))

        return jax.tree.map(started, held, self._tensor_specs(held))

    def _tensor_specs(self, tensors: Tensors) -> Any:
        """The PartitionSpecs of tensors at rest."""
        if self._adapter is not None:  # they are small
            return jax.tree.map(lambda _: PartitionSpec(), tensors)
        return {name: self.partition.at_rest(self._specs[name], x.shape)[0] for name, x in tensors.items()}

    def _in_compute_dtype(self, x: Array) -> Array:
        x = jnp.asarray(x)
        return x.astype(self._dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def _whole(self, name: str, x: Array) -> Array:
        """A parameter of which this device has its rows' part at rest."""
        axis = self.partition.at_rest(self._specs[name], self._shapes[name])[1]
        return x if axis is None else checkpoint_name(gathered(x, self.partition.rows, axis), _WHOLE)

    def _whole_block(self, number: int, block: Block) -> Block:
        """So a device has all of one block at a time, and gathers it again in the backward pass."""
        graphdef, state = nnx.split(block)
        held = nnx.to_pure_dict(state)

        def whole(path: Any, x: Array) -> Array:
            return self._whole(f"layers.{number}.{jax.tree_util.keystr(path, simple=True, separator='.')}", x)

        nnx.replace_by_pure_dict(state, jax.tree.map_with_path(whole, held))
        return nnx.merge(graphdef, state)

    def sum_over_mesh(
        self, loss: Callable, base: Any, tensors: Tensors, seed: UInt32[Array, " 2"] | None, *rows: Int[Array, "b t"]
    ) -> Float[Array, ""]:
        """The sum of loss(base, tensors, seed, *rows) over all rows, of which each replica computes its own.

        The devices of an axis "context" have the same rows, and each returns a part of their sum.
        """
        partition = self.partition
        replicas = partition.size(partition.rows)
        if rows[0].shape[0] % replicas:
            raise ValueError(f"{rows[0].shape[0]} rows cannot be divided by {replicas} replicas: use a multiple")

        def of_part(base, tensors, seed, *rows):
            return summed(loss(base, tensors, seed, *rows), (*partition.rows, *partition.tokens))

        of_base = None if base is None else tuple(self._specs.values())
        of_rows = (PartitionSpec(self.partition.rows),) * len(rows)
        specs = (of_base, self._tensor_specs(tensors), None if seed is None else PartitionSpec(), *of_rows)
        return self.partition.on_devices(of_part, specs, PartitionSpec())(base, tensors, seed, *rows)

    def forward(
        self,
        base: tuple[Any, ...] | None,
        tensors: Tensors,
        tokens: Int[Array, "b t"],
        segments: Int[Array, "b t"],
        seed: UInt32[Array, " 2"] | None = None,
    ) -> tuple[Float[Array, "b t hidden"], Callable[..., Float[Array, "n vocab"]]]:
        """The state after each token, and the function (states, number of a block of them) -> logits.

        seed: of the adapter's lora_dropout; None: nothing is dropped.
        """
        adapters, whole = None, None
        if self._adapter is None:
            params = [tensors[name].astype(self._dtype) for name in self._names]
            if self.partition.size(self.partition.rows) > 1:
                whole = self._whole_block
                # those of blocks: one block at a time
                params = [
                    x if name.startswith("layers.") else self._whole(name, x)
                    for name, x in zip(self._names, params, strict=True)
                ]
        else:
            assert base is not None
            params = list(base)
            adapter = dataclasses.replace(self._adapter, tensors=tensors)
            held = dict(zip(self._names, params, strict=True))
            weights = functools.partial(_float32, held)
            changes = changes_of(adapter, self._config, self._shapes, weights, constant=lax.stop_gradient)
            adapters = Adapters(jax.tree.map(self._in_compute_dtype, changes), 1)
            if self.partition.mesh is not None:
                adapters = jax.tree.map(part_of, adapters, self.partition.of_adapters(adapters))
            if seed is not None and (rate := self._adapter.config.lora_dropout):
                # devices with other rows or tokens drop other numbers
                own = Dropout(seed, rate).at(first_of((*self.partition.rows, *self.partition.tokens), 1))
                adapters = dataclasses.replace(adapters, dropout=own)
        decoder: Decoder = nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, params))
        decoder.partition = self.partition
        slot = None if adapters is None else jnp.zeros(tokens.shape[0], jnp.int32)
        rows: dict[str, Any] = dict(segments=segments, adapters=adapters, slot=slot)
        states, _ = decoder(
            tokens, **rows, remat=self._remat if whole is None else self._remat or _KEEP_ALL, whole=whole
        )

        def logits(states: Float[Array, "n hidden"], block: Int[Array, ""]) -> Float[Array, "n vocab"]:
            own = None if slot is None else jnp.zeros(states.shape[0], jnp.int32)
            of_block = adapters
            if adapters is not None and adapters.dropout is not None:
                of_block = dataclasses.replace(adapters, dropout=adapters.dropout.at(block))
            return decoder.unembed(states, of_block, own)

        return states, logits


def _check_dropout(adapter: Adapter, model: LanguageModel) -> None:
    rate = adapter.config.lora_dropout
    if adapter.config.use_dora:
        raise ValueError(f"lora_dropout={rate} of the adapter cannot be trained with use_dora: {NO_DORA}")
    for name, kinds in adapter.tensors.items():
        place = place_of(name, kinds, model.config, model.shapes)
        if place is not None and not (place.expert is None and place.num_experts is None):
            raise ValueError(
                f"lora_dropout={rate} of the adapter cannot be trained with changes of experts such as {name}, as in "
                "PEFT: set it to 0 in adapter_config.json"
            )


def _float32(held: Mapping[str, Any], name: str) -> Float[Array, "..."]:
    x = held[name]
    return dequantize(x, jnp.float32) if isinstance(x, QuantizedArray) else x.astype(jnp.float32)


@with_default_rules
def loss_fn(
    trainable: Trainable,
    base: tuple[Any, ...] | None,
    tensors: Tensors,
    tokens: Int[Array, "b t"],
    segments: Int[Array, "b t"],
    is_target: Int[Array, "b t"],
    dropout_key: Array | None = None,
) -> Float[Array, ""]:
    """The sum over all targets of their negative log-likelihood in nats.

    Logits are computed for targets alone, LOSS_ROWS at a time, and their gradient right after them. Over a mesh, each
    replica computes its share of the rows, whose number must be a multiple.

    dropout_key: of jax.random, "threefry2x32": decides what the adapter's lora_dropout drops; None: nothing is dropped.
    """
    seed = None if dropout_key is None else jax.random.key_data(dropout_key)
    rows = [jnp.asarray(x) for x in (tokens, segments, is_target)]
    loss = functools.partial(_loss, trainable)
    if trainable.partition.mesh is None:
        return loss(base, tensors, seed, *rows)
    return trainable.sum_over_mesh(loss, base, tensors, seed, *rows)


def _loss(trainable: Trainable, base, tensors, seed, tokens, segments, is_target) -> Float[Array, ""]:
    states, logits = trainable.forward(base, tensors, tokens, segments, seed)
    # the state before each target; targets first, so that blocks without one can be skipped
    states = states[:, :-1].reshape(-1, states.shape[-1])
    target, wanted = tokens[:, 1:].reshape(-1), is_target[:, 1:].reshape(-1)
    order = jnp.argsort(1 - wanted, stable=True)
    # blocks in turn to the devices that have the same rows
    axes = trainable.partition.tokens
    parts = trainable.partition.size(axes)
    n = min(LOSS_ROWS, len(order))
    order = jnp.pad(order, (0, -len(order) % (n * parts))).reshape(-1, parts, n)
    first = jnp.arange(0, order.size, n).reshape(-1, parts)
    order, first = (x[:, first_of(axes, 1)] for x in (order, first))
    count = wanted.sum()

    def block(states: Float[Array, "n hidden"], target: Int[Array, " n"], first: Int[Array, ""]) -> Float[Array, ""]:
        of_target = _log_softmax_at(logits(states, first), target, trainable.partition.vocab)
        return -jnp.where(first + jnp.arange(n) < count, of_target, 0.0).sum()

    return _sum_of_blocks(block, states[order], (target[order], first), first < count)


def _sum_of_blocks(
    function: Callable[..., Float[Array, ""]],
    x: Float[Array, "blocks *b"],
    others: tuple[Int[Array, "blocks ..."], ...],
    is_wanted: Bool[Array, " blocks"],
) -> Float[Array, ""]:
    """The sum of function(x[i], *others[i]) over the wanted blocks.

    If it is differentiated, also with respect to what the function closes over, each block's gradient is computed right
    after its value: nothing that the function computes is kept for longer, or computed a second time.
    """
    function, held = jax.closure_convert(function, x[0], *(y[0] for y in others))

    def scanned(of_block: Callable, start: Any, nothing: Any, x: Array) -> Any:
        """of_block(total, x[i], *others[i]) -> (total, output), in turn."""

        def add(total, part):
            is_wanted, *part = part
            return lax.cond(is_wanted, of_block, lambda total, *_: (total, nothing), total, *part)

        return lax.scan(add, start, (is_wanted, x, *others))

    @jax.custom_vjp
    def total(x, held):
        return scanned(lambda total, *part: (total + function(*part, *held), None), jnp.float32(0.0), None, x)[0]

    def forward(x, held):
        trained = [i for i, value in enumerate(held) if value.perturbed]
        held = [value.value for value in held]

        def of_block(total, x, *others):
            def value(x, *parts):
                with_parts = dict(enumerate(held)) | dict(zip(trained, parts, strict=True))
                return function(x, *others, *with_parts.values())

            found, vjp = jax.vjp(value, x, *(held[i] for i in trained))
            d_x, *grads = vjp(jnp.ones_like(found))
            return jax.tree.map(jnp.add, total, (found, grads)), d_x

        start = (jnp.float32(0.0), [jnp.zeros(held[i].shape, jnp.float32) for i in trained])
        (found, grads), d_x = scanned(of_block, start, jnp.zeros_like(x.value[0]), x.value)
        return found, (d_x, dict(zip(trained, grads, strict=True)))

    def backward(saved, d_total):
        d_x, grads = jax.tree.map(lambda d: d * d_total.astype(d.dtype), saved)
        return d_x, [grads[i].astype(value.dtype) if i in grads else None for i, value in enumerate(held)]

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(x, held)


def _log_softmax_at(logits: Float[Array, "n part"], target: Int[Array, " n"], axes: Axes) -> Float[Array, " n"]:
    """The log-probability of each target, of logits whose vocabulary is divided over these axes."""
    if not axes:
        found = jax.nn.log_softmax(logits, axis=-1)
        return jnp.take_along_axis(found, target[:, None], axis=-1)[:, 0]
    size = logits.shape[-1]
    largest = lax.pmax(lax.stop_gradient(logits).max(-1), axes)
    total = summed(jnp.exp(logits - largest[:, None]).sum(-1), axes)
    own = target - first_of(axes, size)
    is_own = (own >= 0) & (own < size)
    chosen = jnp.take_along_axis(logits, jnp.where(is_own, own, 0)[:, None], axis=-1)[:, 0]
    return summed(jnp.where(is_own, chosen, 0.0), axes) - largest - jnp.log(total)


def make_optimizer(
    *,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW with a linear warm-up and a cosine decay to a tenth; weight decay spares norms, biases and magnitudes.

    The first step of a warm-up has learning_rate / warmup_steps and the last one learning_rate: no step is without
    effect, as the first one of optax's schedule from 0 and of transformers' is.

    Source: arXiv:1711.05101.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        learning_rate / max(warmup_steps, 1),
        learning_rate,
        max(warmup_steps - 1, 0),
        max(num_steps, warmup_steps + 1),
        learning_rate / 10,
    )
    steps = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]

    def decays(tensors: Tensors) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, tensors)

    adamw = optax.adamw(schedule, *betas, eps=eps, weight_decay=weight_decay, mask=decays)
    return optax.chain(*steps, adamw)


def new_state(tensors: Tensors, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, on the devices of the tensors."""
    state = TrainState(jnp.int32(0), tensors, optimizer.init(tensors))
    sharding = jax.tree.leaves(tensors)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return state
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.tree.map(lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole), state)


def make_train_step(
    trainable: Trainable, optimizer: optax.GradientTransformation, *, seed: int = 0
) -> Callable[[Any, TrainState, Batch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """A compiled train_step(base, state, batch) -> (state, metrics); the state is donated.

    metrics: "loss", the mean over all targets of the batch in nats; "targets", their number; "grad_norm", before it is
    clipped. seed: together with state.step it decides what the adapter's lora_dropout drops.
    """

    def train_step(base, state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), state.step)

        def add(total, numbered: tuple[Int[Array, ""], Batch]):
            number, part = numbered
            loss, grads = jax.value_and_grad(loss_fn, argnums=2)(
                trainable,
                base,
                state.tensors,
                part.tokens,
                part.segments,
                part.is_target,
                jax.random.fold_in(key, number) if trainable.has_dropout else None,
            )
            return jax.tree.map(jnp.add, total, (loss, grads)), None

        nothing = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, state.tensors))
        (loss, grads), _ = lax.scan(add, nothing, (jnp.arange(batch.tokens.shape[0]), batch))
        targets = batch.is_target.sum()
        scale = 1.0 / jnp.maximum(targets, 1)
        grads = jax.tree.map(lambda x: x * scale, grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.tensors)
        tensors = optax.apply_updates(state.tensors, updates)
        metrics = {"loss": loss * scale, "targets": targets, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, tensors, optimizer_state), metrics

    return jax.jit(train_step, donate_argnums=1)


def make_eval_step(trainable: Trainable) -> Callable[[Any, Tensors, Batch], Float[Array, " 2"]]:
    """A compiled eval_step(base, tensors, batch) -> (sum of losses, number of targets)."""

    @jax.jit
    def eval_step(base, tensors: Tensors, batch: Batch):
        def add(total, part: Batch):
            return total + loss_fn(trainable, base, tensors, part.tokens, part.segments, part.is_target), None

        return jnp.stack([lax.scan(add, jnp.float32(0.0), batch)[0], batch.is_target.sum().astype(jnp.float32)])

    return eval_step
