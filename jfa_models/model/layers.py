"""The layers of a decoder except attention. Modules hold only parameters; weights are [out, in], as on disk.

A weight is an array of floats, whose dtype may differ from that of the inputs, or a jfa.QuantizedArray. Where adapters
change a module, it gets their change as its last argument.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

import jfa
from jfa import quant, row_ops
from jfa.products import times_rows
from jfa.types import RowSpec
from jfa_models.model.config import Activation, DecoderConfig
from jfa_models.model.lora import UNCHANGED, Applied, Scope
from jfa_models.model.partition import WHOLE, Axes, Partition, Portion, first_of, summed

_normal = jax.nn.initializers.normal(0.02)


class Linear(nnx.Module):
    """x weight^T + bias.

    sum_over: the axes of a mesh over whose devices the columns are divided: their products are summed. Or its caller
      sums what it returns, later; the bias is then in the part of the first device.
    implementation: of what one kernel computes together; None: the platform's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        sum_over: Axes = (),
        sums_later: bool = False,
        implementation: str | None = None,
    ):
        self.implementation = implementation
        self.sum_over = sum_over
        self.sums_later = sums_later
        self.weight = nnx.Param(_normal(rngs.params(), (out_features, in_features), dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "*b in"], change: Applied | None = None, residual: Float[Array, "*b out"] | None = None
    ) -> Float[Array, "*b out"]:
        """residual: what the result is added to."""
        if residual is not None and (out := together(x, (self,), (change,), residual=residual)) is not None:
            return out
        y = times_rows(x, self.weight.get_value())
        bias = None if self.bias is None else self.bias[...]
        if change is not None:
            y, bias = change.product(x, y, first_of(self.sum_over, 1)), change.bias(bias, y)
        if bias is not None and self.sums_later:
            bias = jnp.where(first_of(self.sum_over, 1) == 0, bias, 0)
        y = y if self.sums_later else summed(y, self.sum_over)
        y = checkpoint_name(y if bias is None else y + bias, "jfa_product")
        return y if residual is None else residual + y


class Embedding(nnx.Module):
    """Token id to vector and, if the head is tied, vector to logits.

    rows_over: the axes of a mesh over whose devices the rows are divided; logits are those of a device's own rows.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs, rows_over: Axes = ()):
        self.dtype = dtype
        self.rows_over = rows_over
        self.weight = nnx.Param(_normal(rngs.params(), (vocab_size, hidden_size), dtype))

    def __call__(self, tokens: Int[Array, "*b"], change: Applied | None = None) -> Float[Array, "*b hidden"]:
        weight = self.weight.get_value()
        tokens = tokens - first_of(self.rows_over, weight.shape[0])
        is_own = (tokens >= 0) & (tokens < weight.shape[0])
        tokens = jnp.where(is_own, tokens, 0) if self.rows_over else tokens
        rows = _at(weight, tokens)
        x = quant.dequantize(rows, self.dtype) if isinstance(rows, jfa.QuantizedArray) else rows.astype(self.dtype)
        x = x if change is None else change.rows(tokens, x)
        return summed(jnp.where(is_own[..., None], x, 0), self.rows_over) if self.rows_over else x

    def attend(self, x: Float[Array, "*b hidden"], change: Applied | None = None) -> Float[Array, "*b vocab"]:
        logits = times_rows(x, self.weight.get_value())
        return logits if change is None else change.product(x, logits)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32, returned in the dtype of x.

    With plus_one, 1 is added to the stored scale, and the product is in float32 too, as in training. With num_groups,
    each of so many equal parts of x has a root mean square of its own.
    Source: arXiv:1910.07467.
    """

    def __init__(self, size: int, *, eps: float, plus_one: bool = False, num_groups: int = 1, dtype: DTypeLike):
        self.eps = eps
        self.plus_one = plus_one
        self.num_groups = num_groups
        self.scale = nnx.Param(jnp.full(size, 0.0 if plus_one else 1.0, dtype))

    def __call__(self, x: Float[Array, "*b size"], change: Applied | None = None) -> Float[Array, "*b size"]:
        wide = x.astype(jnp.float32).reshape(*x.shape[:-1], self.num_groups, -1)
        wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        wide = wide.reshape(x.shape)
        scale = self.scale[...] if change is None else change.scale(self.scale[...], x)
        if self.plus_one:
            return (wide * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * scale


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias, in float32, returned in the dtype of x.

    Source: arXiv:1607.06450.
    """

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype))

    def __call__(self, x: Float[Array, "*b size"], change: Applied | None = None) -> Float[Array, "*b size"]:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...] if change is None else change.scale(self.scale[...], x)
        bias = self.bias[...] if change is None else change.bias(self.bias[...], x)
        scale, bias = scale.astype(jnp.float32), jnp.asarray(bias, jnp.float32)
        return (wide * scale + bias).astype(x.dtype)


def make_norm(config: DecoderConfig, size: int, *, dtype: DTypeLike) -> RMSNorm | LayerNorm:
    """The norm that the configuration specifies."""
    if config.norm == "layer":
        return LayerNorm(size, eps=config.norm_eps, dtype=dtype)
    return RMSNorm(size, eps=config.norm_eps, plus_one=config.norm == "rms_plus_one", dtype=dtype)


class Normed(NamedTuple):
    """norm(x), for modules whose products may normalize x by themselves; the value is then not computed under jit."""

    value: Float[Array, "*b size"]
    x: Float[Array, "*b size"]
    norm: RMSNorm | None  # None: no product can do this

    @classmethod
    def of(cls, norm: RMSNorm | LayerNorm, x: Float[Array, "*b size"], change: Applied | None = None) -> "Normed":
        is_plain = change is None and isinstance(norm, RMSNorm) and norm.num_groups == 1
        return cls(norm(x, change), x, norm if is_plain else None)  # type: ignore[arg-type]


def together(
    x: Normed | Float[Array, "*b in"],
    modules: Sequence[Linear],
    changes: Sequence[Applied | None],
    *,
    activation: Activation | None = None,
    residual: Float[Array, "*b sum_of_out"] | None = None,
) -> Float[Array, "*b sum_of_out"] | None:
    """What one kernel computes of several modules; None: there is none for this call.

    Their outputs side by side. Or activation(first), times the second if there are two. Then the residual is added.
    """
    if any(change is not None for change in changes) or any(one.sum_over or one.sums_later for one in modules):
        return None
    weights = [one.weight.get_value() for one in modules]
    how: dict[str, Any] = dict(implementation=modules[0].implementation)
    arrays: dict[str, Any] = dict(biases=[None if one.bias is None else one.bias[...] for one in modules])
    spec, rows = RowSpec(activation=activation), x.value if isinstance(x, Normed) else x
    if isinstance(x, Normed) and (norm := x.norm) is not None:
        normalizing = dataclasses.replace(spec, eps=norm.eps, plus=1.0 if norm.plus_one else 0.0)
        if row_ops.serves(x.x, weights, normalizing, **how):
            spec, rows, arrays["scale"] = normalizing, x.x, norm.scale[...]
    if not row_ops.serves(rows, weights, spec, **how):
        return None
    found = row_ops.matmul_few_rows(rows, weights, spec, residual=residual, **arrays, **how)
    return checkpoint_name(found, "jfa_product")


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate.

    size: of the inner vectors; None: config.intermediate_size. sum_over, sums_later: of down, see Linear, which also
      has implementation.
    Source: arXiv:2002.05202.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        size: int | None = None,
        sum_over: Axes = (),
        sums_later: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        implementation: str | None = None,
    ):
        hidden, inner = config.hidden_size, size or config.intermediate_size
        options: dict[str, Any] = dict(bias=config.mlp_bias, implementation=implementation)
        linear = functools.partial(Linear, **options, dtype=dtype, rngs=rngs)
        self.activation: Activation = config.hidden_act
        self.gate = linear(hidden, inner) if config.gated_mlp else None
        self.up = linear(hidden, inner)
        self.down = linear(inner, hidden, sum_over=sum_over, sums_later=sums_later)

    def __call__(
        self,
        x: Normed | Float[Array, "*b hidden"],
        scope: Scope = UNCHANGED,
        residual: Float[Array, "*b hidden"] | None = None,
    ) -> Float[Array, "*b hidden"]:
        """residual: what the result is added to."""
        before = [(self.up, scope.at("up"))]
        if self.gate is not None:
            before.insert(0, (self.gate, scope.at("gate")))
        inner = together(x, *zip(*before, strict=True), activation=self.activation)
        if inner is None:
            x = x.value if isinstance(x, Normed) else x
            first, *factor = (module(x, change) for module, change in before)
            inner = functools.reduce(jnp.multiply, factor, ACTIVATIONS[self.activation](first))
        return self.down(inner, scope.at("down"), residual)


class Experts(nnx.Module):
    """A mixture of gated MLPs: every token goes to a few of them, whose outputs are summed with the router's weights.

    One more MLP may process every token, with a gate of its own. Where experts are divided over devices, and each has
    its own tokens, these are sent to where their experts are. If all devices have the same few, each skips those that
    go to others' experts. None is dropped, however uneven they are. Source: arXiv:2401.04088, section 2.1.
    """

    def __init__(self, config: DecoderConfig, *, partition: Partition = WHOLE, dtype: DTypeLike, rngs: nnx.Rngs):
        assert config.experts is not None
        self.config = config.experts
        self.act = ACTIVATIONS[config.hidden_act]
        hidden, inner = config.hidden_size, config.experts.intermediate_size
        stacked = functools.partial(StackedLinear, config.experts.num_experts, dtype=dtype, rngs=rngs)
        self.router = Linear(hidden, config.experts.num_experts, bias=False, dtype=dtype, rngs=rngs)
        self.gate = stacked(hidden, inner)
        self.up = stacked(hidden, inner)
        self.down = stacked(inner, hidden)
        size, has_gate = config.experts.shared_size, config.experts.shared_gate
        self.experts_over, self.inner_over = partition.experts, partition.expert_inner
        self.sum_over = (*self.inner_over, *self.experts_over)
        # of the same axes, one sum for both
        self.sums_together = bool(size) and partition.shared_inner == self.sum_over
        sums: dict[str, Any] = dict(sum_over=partition.shared_inner, sums_later=self.sums_together)
        self.shared = MLP(config, size=size, **sums, dtype=dtype, rngs=rngs) if size else None
        self.shared_gate = Linear(hidden, 1, bias=False, dtype=dtype, rngs=rngs) if has_gate else None

    def __call__(
        self, x: Float[Array, "*b hidden"], scope: Scope = UNCHANGED, portion: Portion | None = None
    ) -> Float[Array, "*b hidden"]:
        """portion: devices have different tokens. None: all have x."""
        is_exchanged = portion is not None and bool(set(self.experts_over) & set(portion.axes))
        routed = self._routed(x, scope, is_exchanged)
        if not self.sums_together:
            routed = summed(routed, self.inner_over if is_exchanged else self.sum_over)
        if self.shared is None:
            return routed
        shared = self.shared(x, scope.inside("shared"))
        if self.shared_gate is not None:
            shared = shared * jax.nn.sigmoid(self.shared_gate(x, scope.at("shared_gate")))
        return summed(routed + shared, self.sum_over if self.sums_together else ())

    def _routed(self, x: Float[Array, "*b hidden"], scope: Scope, is_exchanged: bool) -> Float[Array, "*b hidden"]:
        """The part of this device's experts; if tokens are exchanged, that of all."""
        tokens = x.reshape(-1, x.shape[-1])
        scope = scope.flat()
        weights = jax.nn.softmax(self.router(tokens, scope.at("router")).astype(jnp.float32), axis=-1)
        weights, chosen = lax.top_k(weights, self.config.experts_per_token)
        if self.config.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)

        def expert(rows, number):
            return self._expert(rows[0], number, scope._replace(gates=rows[1]))

        num_own = jax.tree.leaves(self.gate.weight.get_value())[0].shape[0]

        def of_own_experts(rows, chosen, weights):
            chosen = chosen - first_of(self.experts_over, num_own)
            out = for_each_expert(expert, rows, chosen, self.config.num_experts, num_own)
            return jnp.einsum("nkh,nk->nh", out, weights.astype(x.dtype), precision=_precision(x))

        run = of_own_experts
        if is_exchanged:
            run = functools.partial(where_experts_are, of_own_experts, num_own=num_own, axes=self.experts_over)
        return run((tokens, scope.gates), chosen, weights).reshape(x.shape)

    def _expert(
        self, x: Float[Array, "rows hidden"], expert: Int[Array, ""], scope: Scope
    ) -> Float[Array, "rows hidden"]:
        gate, up = (
            module(x, expert, scope.at_expert(name, expert)) for name, module in (("gate", self.gate), ("up", self.up))
        )
        return self.down(self.act(gate) * up, expert, scope.at_expert("down", expert))


class StackedLinear(nnx.Module):
    """One weight for each expert."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs.params(), (num_experts, out_features, in_features), dtype))

    def __call__(
        self, x: Float[Array, "rows in"], expert: Int[Array, ""], change: Applied | None = None
    ) -> Float[Array, "rows out"]:
        y = times_rows(x, _at(self.weight.get_value(), expert))
        return y if change is None else change.product(x, y)


def for_each_expert(
    function: Callable[[Any, Int[Array, ""]], Float[Array, "rows hidden"]],
    tokens: Any,
    chosen: Int[Array, "n k"],
    num_experts: int,
    num_own: int | None = None,
) -> Float[Array, "n k hidden"]:
    """Applies function(rows, expert) to every token and each expert chosen for it.

    Tokens are an array [n, hidden] or a tree of arrays [n, ...], the first of them [n, hidden]. With num_own, experts
    outside of 0 to num_own are others', and their outputs zeros.

    Tokens are sorted by expert and cut into blocks of one expert each; empty blocks are skipped. So a token costs k
    experts, however many there are: XLA's own ragged_dot costs all of them on CPUs and most GPUs (bench/LOG.md).
    Source: arXiv:2211.15841, section 5.
    """
    n, k = chosen.shape
    first = jax.tree.leaves(tokens)[0]
    if n == 0:
        return jnp.zeros((0, k, first.shape[1]), first.dtype)
    expert, own, others = chosen.reshape(-1), num_experts, 0
    if num_own not in (None, num_experts):
        expert = jnp.where((expert >= 0) & (expert < num_own), expert, num_own)
        own, others = num_own, 1  # as if of one more expert, which is skipped
    rows = min(128, max(1, n * k // num_experts))  # per block: on average, half of an expert's last block is empty
    num_blocks = n * k // rows + min(own + others, n * k)
    count = jnp.zeros(own + others, jnp.int32).at[expert].add(1)
    blocks = -(-count // rows)
    first_block = jnp.cumsum(blocks) - blocks
    order = jnp.argsort(expert, stable=True)
    rank = jnp.arange(n * k, dtype=jnp.int32) - (jnp.cumsum(count) - count)[expert[order]]
    place = jnp.zeros(n * k, jnp.int32).at[order].set(first_block[expert[order]] * rows + rank)
    token_of = jnp.full(num_blocks * rows, n, jnp.int32).at[place].set(jnp.arange(n * k, dtype=jnp.int32) // k)
    expert_of = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(num_blocks), side="right", method="compare_all")

    def block(_, which):
        token, expert = which
        rows_of = functools.partial(jnp.take, indices=token, axis=0, mode="fill", fill_value=0)
        x = jax.tree.map(rows_of, tokens)
        nothing = jnp.zeros((rows, first.shape[1]), first.dtype)
        return None, lax.cond(expert < own, lambda: function(x, expert), lambda: nothing)

    _, out = lax.scan(block, None, (token_of.reshape(num_blocks, rows), expert_of))
    return out.reshape(num_blocks * rows, -1)[place].reshape(n, k, -1)


def where_experts_are(
    function: Callable[[Any, Int[Array, "m k"], Float[Array, "m k"]], Float[Array, "m hidden"]],
    tokens: Any,
    chosen: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    *,
    num_own: int,
    axes: Axes,
) -> Float[Array, "n hidden"]:
    """function(tokens, chosen, weights), where a device sums the outputs of its num_own experts, over all devices.

    Tokens are a tree of arrays [n, ...], other ones on each device. A device sends each token once to every other that
    has an expert of it, and gets one sum back. Shapes are static, so each pair of devices exchanges a fixed number of
    tokens at a time, a little more than an even spread needs, as often as the most uneven pair must.
    Source: arXiv:2006.16668, section 3.2, whose capacity drops tokens.
    """
    n, k = chosen.shape
    count = lax.axis_size(axes)
    goes_to = (chosen[:, None, :] // num_own == jnp.arange(count)[:, None]).any(-1)  # [n, count]
    size = tokens_of_round(n, k, count)
    rounds = -(-n // size)
    rank = jnp.where(goes_to, jnp.cumsum(goes_to, axis=0) - 1, rounds * size)  # none
    order = jnp.full((count, rounds * size), n, jnp.int32)  # the tokens for each device, then n
    order = order.at[jnp.arange(count), rank].set(jnp.arange(n, dtype=jnp.int32)[:, None], mode="drop")

    def exchanged(x: Shaped[Array, "count size ..."]) -> Shaped[Array, "count size ..."]:
        return lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)

    def one_round(number: Any, out: Float[Array, "n hidden"]) -> Float[Array, "n hidden"]:
        token = lax.dynamic_slice_in_dim(order, number * size, size, axis=1)

        def sent(x: Array, nothing: int) -> Array:
            there = exchanged(jnp.take(x, token, axis=0, mode="fill", fill_value=nothing))
            return there.reshape(count * size, *x.shape[1:])

        rows = jax.tree.map(functools.partial(sent, nothing=0), (tokens, weights))
        found = function(rows[0], sent(chosen, count * num_own), rows[1])  # no device has this expert
        return out.at[token].add(exchanged(found.reshape(count, size, -1)), mode="drop")

    out = jnp.zeros_like(jax.tree.leaves(tokens)[0])
    if rounds == 1:
        return one_round(0, out)
    most = lax.pmax(goes_to.sum(0).max(), axes)
    return lax.fori_loop(0, -(-most // size), one_round, out)


def tokens_of_round(n: int, k: int, count: int) -> int:
    """How many of a device's n tokens, of k experts each, it sends to each of so many devices at a time."""
    expected = n * (1 - (1 - 1 / count) ** k)
    return min(n, 8 * math.ceil(1.25 * expected / 8))


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def _at[T: (Array, jfa.QuantizedArray)](weight: T, index: Int[Array, "*b"]) -> T:
    """weight[index], of each part of a quantized weight."""
    return jax.tree.map(lambda x: quant.on_bits(lambda x: x[index], x), weight)


def _precision(x: Float[Array, "..."]) -> str | None:
    return "highest" if x.dtype == jnp.float32 else None  # otherwise float32 may be rounded to tf32
