"""What layers without attention keep of a text: a state of a fixed size for each row, however long the text is."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jfa.rules import with_default_rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StateCache:
    """The states of all layers of one model that have one. Every method returns a new cache.

    A state is that after a row's last token, and cannot be taken back to an earlier one. Donate the cache to the jitted
    function that returns the new one.

    Attributes:
      conv: for each layer, the last inputs of its causal convolution.
      state: for each layer, the states of its heads.
      pending: None: layers write the states after a step's tokens. Otherwise the states stay those before the step,
        and each layer adds here what its tokens would bring: for steps of which some tokens may be dropped again.
    """

    conv: tuple[Float[Array, "rows width-1 channels"], ...]
    state: tuple[Float[Array, "rows heads dk dv"], ...]
    pending: tuple[Float[Array, "n inputs"], ...] | None = None

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        rows: int,
        conv_width: int,
        channels: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: DTypeLike,
    ) -> "StateCache":
        """The states before the first token: zeros.

        Args:
          num_layers: of the layers that have a state.
          dtype: of the inputs of the convolutions; the states are float32.
        """
        # a separate array for each layer: a buffer that two leaves share cannot be donated
        layers = range(num_layers)
        return cls(
            conv=tuple(jnp.zeros((rows, conv_width - 1, channels), dtype) for _ in layers),
            state=tuple(jnp.zeros((rows, num_heads, key_dim, value_dim), jnp.float32) for _ in layers),
        )

    @property
    def num_rows(self) -> int:
        """Rows that have states."""
        return self.state[0].shape[0]

    @property
    def num_bytes(self) -> int:
        """Total size in bytes."""
        return sum(x.size * x.dtype.itemsize for x in (*self.conv, *self.state))

    def write(
        self, layer: int, conv: Float[Array, "rows width-1 channels"], state: Float[Array, "rows heads dk dv"]
    ) -> "StateCache":
        """With the new states of one layer."""
        return dataclasses.replace(
            self,
            conv=(*self.conv[:layer], conv, *self.conv[layer + 1 :]),
            state=(*self.state[:layer], state, *self.state[layer + 1 :]),
        )

    def take(self, rows: Int[Array, " n"]) -> "StateCache":
        """The states of these rows, in their order; any states for one that is out of range."""
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), self)

    @with_default_rules
    def copy(self, source: Int[Array, " n"], destination: Int[Array, " n"]) -> "StateCache":
        """Copies the states of rows source to rows destination, in all layers. All are read before any is written.

        A destination out of range is not written: such pairs serve as padding.
        """

        def copied(x: Array) -> Array:
            return x.at[destination].set(jnp.take(x, source, axis=0, mode="clip"), mode="drop")

        return jax.tree.map(copied, self)


def check_no_states(states: StateCache | None) -> None:
    if states is not None:
        raise ValueError("a cache with states cannot drop tokens: a state cannot be taken back; start with a new cache")
