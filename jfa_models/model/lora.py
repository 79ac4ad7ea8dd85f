"""What adapters change in a forward pass: each row has its own adapter or none, and all rows share the products.

The low-rank parts of all adapters lie behind one another, so that a layer multiplies by two more matrices however many
adapters there are, and a mask of rows and slots leaves to each row the part of its own adapter. Few rows on a CPU are
multiplied by the parts of their own adapters alone (jfa.products.low_rank_rows).

Sources: arXiv:2106.09685 (LoRA); arXiv:2402.09353 (DoRA).
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jfa import dropout
from jfa.products import low_rank_rows, times_rows

NO_ADAPTER = -1  # the slot of a row without an adapter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """What the adapters of all slots do to one module; None: nothing of this kind.

    Weights of experts have one more axis, the first. An adapter that does not change the module has zeros.

    Attributes:
      a, b: (b^T a), scaled, is added to the weight [out, in].
      factor: what is added to 1 before the rows of the sum are multiplied by it (DoRA).
      scale: added to the scale of a norm.
      bias: added to the bias, which the module may lack.
      whole: added to the weight by the few adapters that replace it; whole_slot: their slots.
    """

    a: Float[Array, "*e slots r in"] | None = None
    b: Float[Array, "*e slots r out"] | None = None
    factor: Float[Array, "slots out"] | None = None
    scale: Float[Array, "slots size"] | None = None
    bias: Float[Array, "slots out"] | None = None
    whole: Float[Array, "k out in"] | None = None
    whole_slot: Int[Array, " k"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """While training: low-rank parts see each number of their inputs with the probability 1 - rate, scaled by 1 / that.

    A pure function of the seed, the names of modules and the places of numbers (jfa.dropout).
    """

    seed: UInt32[Array, " 2"]
    rate: float = dataclasses.field(metadata=dict(static=True))

    def at(self, number: int | Int[Array, ""]) -> "Dropout":
        """Another one for each number."""
        number = jnp.asarray(number, jnp.uint32)
        pairs = self.seed, self.seed[::-1]
        seeds = [dropout.row_seed(tuple(pair), number, jnp.uint32(i), broadcast=False) for i, pair in enumerate(pairs)]
        return dataclasses.replace(self, seed=jnp.stack(seeds))

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b in"]:
        rows, columns = jnp.arange(x.size // x.shape[-1])[:, None], jnp.arange(x.shape[-1])
        is_kept = dropout.keep(self.seed[0], rows, columns, rate=self.rate).reshape(x.shape)
        return jnp.where(is_kept, x * jnp.asarray(1 / (1 - self.rate), x.dtype), 0)


class Applied(NamedTuple):
    """A module's change, which slot each row uses, and what is dropped of the inputs."""

    change: Change
    gates: Float[Array, "*b slots"]  # one-hot, or all zeros
    dropout: Dropout | None = None

    def product(
        self, x: Float[Array, "*b in"], y: Float[Array, "*b out"], part: int | Int[Array, ""] = 0
    ) -> Float[Array, "*b out"]:
        """y = x weight^T, with the changed weight. part: the number of the part of a row that x is."""
        change = self.change
        if change.a is not None and change.b is not None:
            inputs = x
            if self.dropout is not None:
                inputs = self.dropout.at(part)(x)
            y = y + low_rank_rows(inputs, change.a, change.b, self.gates)
        if change.whole is not None:
            gates = self._whole_gates(x)
            for i in range(change.whole.shape[0]):
                y = y + _gated(times_rows(x, change.whole[i]), gates[..., i : i + 1])
        return self._scaled(y)

    def rows(self, index: Int[Array, "*b"], y: Float[Array, "*b in"]) -> Float[Array, "*b in"]:
        """y = weight[index], of the changed weight."""
        change = self.change
        if change.a is not None and change.b is not None:
            hidden = jnp.moveaxis(change.b[..., index], (0, 1), (-2, -1)).reshape(*index.shape, -1).astype(y.dtype)
            y = y + times_rows(self._own(hidden), change.a.reshape(-1, change.a.shape[-1]).T)
        if change.whole is not None:
            gates = self._whole_gates(y)
            for i in range(change.whole.shape[0]):
                y = y + _gated(change.whole[i][index].astype(y.dtype), gates[..., i : i + 1])
        return self._scaled(y)

    def scale(self, scale: Float[Array, " size"], like: Float[Array, "*b size"]) -> Float[Array, "*#b size"]:
        """The scale of a norm for each row of `like`."""
        return scale if self.change.scale is None else scale + self._of_slot(self.change.scale, like)

    def bias(self, bias: Float[Array, " out"] | None, like: Float[Array, "*b out"]) -> Float[Array, "*#b out"] | None:
        """The bias for each row of `like`; None: there is none."""
        if self.change.bias is None:
            return bias
        added = self._of_slot(self.change.bias, like)
        return added if bias is None else bias + added

    def _scaled(self, y: Float[Array, "*b out"]) -> Float[Array, "*b out"]:
        if self.change.factor is None:
            return y
        return y * (1.0 + self._of_slot(self.change.factor, y))

    def _of_slot(self, values: Float[Array, "slots size"], like: Float[Array, "*b size"]) -> Float[Array, "*#b size"]:
        """Each row's values, in the dtype of `like`, which may have more axes than the gates before its last."""
        slot = jnp.argmax(self.gates, axis=-1)
        found = _gated(values[slot], self.gates.sum(-1, keepdims=True)).astype(like.dtype)
        return found.reshape(*found.shape[:-1], *(1,) * (like.ndim - found.ndim), found.shape[-1])

    def _own(self, hidden: Float[Array, "*b slots*r"]) -> Float[Array, "*b slots*r"]:
        """The part of each row's own slot, zeros elsewhere; another adapter's overflow does not reach the row."""
        num_slots = self.gates.shape[-1]
        return _gated(hidden, jnp.repeat(self.gates, hidden.shape[-1] // num_slots, axis=-1))

    def _whole_gates(self, like: Array) -> Float[Array, "*b k"]:
        assert self.change.whole_slot is not None
        return self.gates[..., self.change.whole_slot]


def _gated(x: Array, gates: Array) -> Array:
    return jnp.where(gates != 0, x, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapters:
    """The changes by module name: "layers.0.attention.q"; the output layer's is "lm_head" even if it is tied."""

    changes: Mapping[str, Change]
    num_slots: int = dataclasses.field(metadata=dict(static=True))
    dropout: Dropout | None = None

    def scope(self, slot: Int[Array, "*b"]) -> "Scope":
        """The scope of a whole decoder, for tokens or rows with these slots."""
        return Scope(self.changes, jax.nn.one_hot(slot, self.num_slots), dropout=self.dropout)


class Scope(NamedTuple):
    """The changes of the modules inside of one."""

    changes: Mapping[str, Change] = {}
    gates: Float[Array, "*b slots"] | None = None
    path: str = ""
    dropout: Dropout | None = None

    def inside(self, name: str) -> "Scope":
        """The scope of a module in this one."""
        return self._replace(path=f"{self.path}{name}.") if self.changes else self

    def map(self, function: Callable[[Array], Array]) -> "Scope":
        """The same for other tokens: the function is applied to what each has."""
        return self if self.gates is None else self._replace(gates=function(self.gates))

    def flat(self) -> "Scope":
        """The same for tokens in one axis."""
        return self.map(lambda gates: gates.reshape(-1, gates.shape[-1]))

    def at_expert(self, name: str, expert: Int[Array, ""]) -> Applied | None:
        """The change of one of the experts whose weights are stacked in this module."""
        if (found := self.at(name)) is None:
            return None
        return found._replace(change=jax.tree.map(lambda x: x[expert], found.change))

    def at(self, name: str) -> Applied | None:
        """The change of a module without others inside; None: there is none."""
        change = self.changes.get(self.path + name)
        if change is None or self.gates is None:
            return None
        own = None if self.dropout is None else self.dropout.at(zlib.crc32(f"{self.path}{name}".encode()))
        return Applied(change, self.gates, own)


UNCHANGED = Scope()
