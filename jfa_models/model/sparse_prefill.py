"""Prefill of a whole prompt in which layers without a window compute only a part of the tiles of scores."""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import jfa
from jfa.rules import with_default_rules
from jfa_models.model.config import DecoderConfig

Pattern = Literal["vertical-slash", "top-k", "window"]

BLOCK = 128  # queries and keys of a tile
LAST_QUERIES = 64  # whose scores choose the lines of vertical-slash

_FIRST = 1e9  # more than any sum of weights
_LEAST = -1e30  # a score; rows without keys have no infinities


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsePrefill:
    """Which tiles of keys the queries of a prompt see in layers that see the whole context.

    Hashable. Written as "vertical-slash:0.1".

    Attributes:
      pattern: "vertical-slash": for each head, columns and diagonals of tiles, those with the largest weights in the
        rows of the last 64 queries (arXiv:2407.02490, section 3.2; there, lines of single tokens). "top-k": for each
        head and tile of queries, the tiles with the best pooled scores (jfa.BlockMask.top_k). "window": the last
        tokens. All see the tile of their own, and the first one as far as the fraction allows.
      fraction: of the tiles that a causal mask leaves, those that are computed: at most by vertical-slash, in long
        prompts about as many by the others. 1: all, the exact result.

    Raises:
      ValueError: an unknown pattern, or a fraction that is not above 0 and up to 1.
    """

    pattern: Pattern
    fraction: float

    def __post_init__(self) -> None:
        if self.pattern not in get_args(Pattern):
            raise ValueError(
                f"the pattern of a sparse prefill must be one of {', '.join(get_args(Pattern))}, got {self.pattern!r}"
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"the fraction of a sparse prefill must be above 0 and at most 1, got {self.fraction:g}; 0.1 computes "
                "a tenth of the scores"
            )

    @classmethod
    def of(cls, text: "str | SparsePrefill") -> "SparsePrefill":
        """Reads PATTERN:FRACTION, such as "vertical-slash:0.1".

        Raises:
          ValueError: it has another form, or see the class.
        """
        if isinstance(text, cls):
            return text
        pattern, colon, number = str(text).partition(":")
        try:
            fraction = float(number)
        except ValueError:
            fraction = math.nan
        if not colon or math.isnan(fraction):
            raise ValueError(f"a sparse prefill must be PATTERN:FRACTION, such as vertical-slash:0.1, got {text!r}")
        return cls(pattern=pattern, fraction=fraction)  # type: ignore[arg-type]  # checked there

    def check(self, config: DecoderConfig) -> None:
        """Checks that a decoder has layers that it changes.

        Raises:
          ValueError: it has none.
        """
        if all(config.window(layer) is not None for layer in config.attention_layers):
            has = "layers with a state" if not config.attention_layers else "layers with a window"
            raise ValueError(
                f"sparse_prefill={self}: this {config.architecture} model has only {has}, whose time does not grow "
                "with the square of the prompt's length; leave it out"
            )

    def __str__(self) -> str:
        return f"{self.pattern}:{self.fraction:g}"

    def attention(
        self,
        q: Float[Array, "b t hq d"],
        k: Float[Array, "b t hkv d"],
        v: Float[Array, "b t hkv d"],
        lengths: Int[Array, " b"] | None,
        *,
        scale: float | None,
        logits_soft_cap: float | None,
        implementation: Any,
    ) -> Float[Array, "b t hq d"]:
        """Causal attention of whole prompts.

        Args:
          lengths: valid tokens of each row. None: all.
          scale, logits_soft_cap, implementation: as of jfa.block_sparse_attention.
        """
        options: dict[str, Any] = dict(scale=scale, logits_soft_cap=logits_soft_cap, implementation=implementation)
        options |= dict(is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
        if self.fraction == 1:
            return jfa.dot_product_attention(q, k, v, **options)
        valid = jnp.full(q.shape[0], q.shape[1]) if lengths is None else lengths
        mask = self.mask(q, k, valid, scale=q.shape[3] ** -0.5 if scale is None else scale)
        return jfa.block_sparse_attention(q, k, v, mask, **options)

    @with_default_rules
    def mask(
        self, q: Float[Array, "b t hq d"], k: Float[Array, "b t hkv d"], lengths: Int[Array, " b"], *, scale: float
    ) -> jfa.BlockMask:
        """The tiles that a causal mask leaves and that are computed, and others. The arrays may be traced."""
        t, blocks = q.shape[1], dict(block_q=BLOCK, block_kv=BLOCK)
        # as many of the last tiles, or of the tiles of each row, leave the fraction of a triangle
        share = 1 - math.sqrt(1 - self.fraction)
        if self.pattern == "window":
            return jfa.BlockMask.sliding_window(t, t, (int(share * t), 0), sinks=BLOCK, **blocks)
        if self.pattern == "vertical-slash":
            return jfa.BlockMask.from_tiles(_vertical_slash(q, k, lengths, self.fraction, scale), t, t, **blocks)
        is_valid = (jnp.arange(t) < lengths[:, None])[..., None, None]
        most = max(1, int(share * -(-t // BLOCK)))
        best = jfa.BlockMask.top_k(jnp.where(is_valid, q, 0), jnp.where(is_valid, k, 0), most, is_causal=True, **blocks)
        return jfa.BlockMask.from_tiles((best.grid() >= 0).at[..., 0].set(True), t, t, **blocks)


def _vertical_slash(
    q: Float[Array, "b t hq d"], k: Float[Array, "b t hkv d"], lengths: Int[Array, " b"], fraction: float, scale: float
) -> Bool[Array, "b hq n n"]:
    """The columns and diagonals of tiles with the largest weights, as many as the fraction has room for."""
    vertical, slash = _weights_of_lines(q, k, lengths, scale)
    n = vertical.shape[2]
    # the diagonal is always chosen, then the first column and the diagonal before the tile's own
    slash = slash.at[..., 0].set(jnp.inf).at[..., 1:2].set(_FIRST)
    vertical = vertical.at[..., 0].set(_FIRST)
    place = jnp.argsort(jnp.argsort(-jnp.concatenate([vertical, slash], axis=-1), axis=-1), axis=-1)
    row, column = jnp.ogrid[:n, :n]
    of_slash = jnp.take(place[..., n:], jnp.maximum(row - column, 0), axis=-1)
    first = jnp.minimum(place[..., None, :n], of_slash)  # place of the first line that crosses a tile
    tiles = -(-lengths // BLOCK)[:, None, None, None]
    first = jnp.where((column <= row) & (row < tiles), first, 2 * n)
    room = jnp.floor(fraction * tiles[..., 0] * (tiles[..., 0] + 1) / 2).astype(jnp.int32)
    in_order = jnp.sort(first.reshape(*first.shape[:2], -1), axis=-1)
    left_out = jnp.take_along_axis(in_order, jnp.minimum(room, n * n - 1), axis=-1)[..., None]
    return (first < left_out) | (row == column)


def _weights_of_lines(
    q: Float[Array, "b t hq d"], k: Float[Array, "b t hkv d"], lengths: Int[Array, " b"], scale: float
) -> tuple[Float[Array, "b hq n"], Float[Array, "b hq n"]]:
    """For columns and for diagonals of tiles, the largest sum of the last queries' weights over a line of tokens.

    Not the sum over all lines: the tokens of one diagonal are all in a few columns of tiles, and would choose these.
    """
    (b, t, hq, d), hkv = q.shape, k.shape[2]
    rows, n = min(LAST_QUERIES, t), -(-t // BLOCK)
    start = jnp.maximum(lengths - rows, 0)
    last = jax.vmap(lambda x, at: lax.dynamic_slice_in_dim(x, at, rows))(q, start).reshape(b, rows, hkv, hq // hkv, d)
    scores = jnp.einsum("brhgd,bjhd->bhgrj", last, k, preferred_element_type=jnp.float32).reshape(b, hq, rows, t)
    position = (start[:, None] + jnp.arange(rows))[:, None, :, None]
    seen = (jnp.arange(t) <= position) & (position < lengths[:, None, None, None])
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scale * scores, _LEAST), axis=-1), 0.0)
    vertical = jnp.pad(weights.sum(2), ((0, 0), (0, 0), (0, n * BLOCK - t))).reshape(b, hq, n, BLOCK)
    # the r-th row from below is moved right by r, so that the sum of a column is that of a distance
    moved = jnp.pad(weights[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, rows))).reshape(b, hq, -1)
    by_distance = moved[..., :-rows].reshape(b, hq, rows, t + rows - 1).sum(2)
    place = (start + rows - 1)[:, None, None] - jnp.arange(n * BLOCK)
    found = jnp.take_along_axis(by_distance, jnp.clip(place, 0, t + rows - 2), axis=-1)
    found = jnp.where(place >= 0, found, 0.0).reshape(b, hq, n, BLOCK)
    # keys at a distance of a BLOCK + r are in the a-th diagonal of tiles, or for a share r / BLOCK of the queries in
    # the next one
    share = jnp.arange(BLOCK) / BLOCK
    slash, following = (found * (1 - share)).max(-1), (found * share).max(-1)
    return vertical.max(-1), jnp.maximum(slash, jnp.pad(following, ((0, 0), (0, 0), (1, 0)))[..., :-1])
