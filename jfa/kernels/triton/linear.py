"""Linear attention as a Pallas-Triton kernel, for AMD and NVIDIA GPUs.

One program computes one row and some value columns of one head, chunk after chunk, and keeps the state in registers:
every token is read once, and a state once per row. Rows of a batch and rows that are concatenated are the same to it:
each has a first token, a number of tokens and a slot for its state.

Within a chunk, exponents are differences of sums of logarithms, as in kernels/xla/linear.py. With the delta rule, what
the tokens of a chunk add is found by forward substitution, a token at a time; chunks are then short.

With a decay for each column of a key, decays are no factor of a matrix product: a chunk's weights are summed over the
columns, one query after another. Chunks are short here too.

Decayed queries, keys and values, and the state where queries read it, are rounded to the dtype of the inputs before a
product, as the weights of attention are. The state itself is float32.

Sources: arXiv:2405.21060, section 6; arXiv:2412.06464, section 3; arXiv:2312.06635, section 4. Tested in
tests/jfa/test_linear_attention.py.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jfa.kernels.common import output
from jfa.kernels.triton._pallas import CompilerParams, load, pl, store
from jfa.kernels.triton._primitives import exp2
from jfa.kernels.triton.tile import (
    LOG2_E,
    MAX_HEAD_DIM,
    chunks,
    kind_of,
    later,
    load_rows,
    once,
    padded,
    product,
    sum_of_products,
    whole_tiles,
)
from jfa.types import DeviceInfo, LinearKernelConfig, LinearOperands, LinearRows, LinearSpec

NAMES = ("linear_attention", "delta_attention", "gated_linear_attention")  # with the delta rule; decays of columns

_FORGETS = -1e4  # 2^-10,000 is 0, and sums of such logarithms are exact

Tiles = tuple[int, int, int, int | None]  # (chunk_size, block_v, num_warps, block_d)

# For each kernel of NAMES. Two of them have a loop over the tokens of a chunk.
_SAFE: dict[tuple[str, str], tuple[Tiles, Tiles, Tiles]] = {
    ("cdna", "16 bits"): ((64, 64, 4, 64), (16, 64, 4, None), (16, 64, 4, 64)),
    ("cdna", "float32"): ((32, 32, 4, None), (16, 32, 4, None), (16, 32, 4, 64)),
    ("rdna", "16 bits"): ((32, 32, 4, 32), (16, 16, 4, 16), (16, 16, 4, 32)),
    ("rdna", "float32"): ((16, 16, 8, None), (16, 16, 8, None), (16, 16, 8, 32)),
    ("cuda", "16 bits"): ((64, 32, 4, 64), (16, 32, 4, 64), (16, 32, 4, 64)),
    ("cuda", "float32"): ((16, 16, 8, 32), (16, 16, 8, 64), (16, 16, 8, 64)),
}
# key columns on RDNA: wider tiles spill, in float32 for lack of matrix instructions
_WIDEST_ON_RDNA = {"float32": 64, "decays of columns in float32": 128, "delta rule": 128, "16 bits": MAX_HEAD_DIM}


def default_config(operands: LinearOperands, device: DeviceInfo) -> LinearKernelConfig:
    """Tile sizes with few or no spills on all tested architectures of this kind."""
    return safe_config(_SAFE, operands, device)


def safe_config(
    tiles: Mapping[tuple[str, str], tuple[Tiles, Tiles, Tiles]], operands: LinearOperands, device: DeviceInfo
) -> LinearKernelConfig:
    """The entry of tiles {(kind of architecture, precision): (tiles for each of NAMES)} for a call."""
    precision = "float32" if operands.q.dtype == jnp.float32 else "16 bits"
    chunk, block_v, warps, block_d = tiles[kind_of(device), precision][NAMES.index(name_of(operands))]
    block_v = min(block_v, padded(operands.v.shape[3]))
    return LinearKernelConfig(chunk_size=chunk, block_v=block_v, num_warps=warps, num_stages=1, block_d=block_d)


def name_of(operands: LinearOperands) -> str:
    """Which of NAMES computes a call."""
    if operands.log_decay.ndim == 4:
        return "gated_linear_attention"
    return "linear_attention" if operands.beta is None else "delta_attention"


def why_not(operands: LinearOperands, spec: LinearSpec, device: DeviceInfo) -> str | None:
    """The reason why the kernel does not support this call; None if it does."""
    if device.platform not in ("rocm", "cuda", "cpu"):
        return f"Triton kernels run on AMD and NVIDIA GPUs (and interpreted on the CPU), not on {device.platform}"
    if operands.log_decay.ndim == 4 and operands.beta is not None:
        return "the kernels have the delta rule with one decay per head, not with one for each column of a key"
    if device.platform == "rocm" and kind_of(device) == "rdna":
        of = "float32" if operands.q.dtype == jnp.float32 else "16 bits" if operands.beta is None else "delta rule"
        if of == "float32" and operands.log_decay.ndim == 4:
            of = "decays of columns in float32"
        if operands.k.shape[3] > (widest := _WIDEST_ON_RDNA[of]):
            return f"{of}: keys of more than {widest} columns do not fit in the registers of {device.arch}"
    if operands.q.dtype == jnp.float16:
        return "states are rounded to the dtype of the inputs for products, and float16 ends at 65,504"
    for name, x in (("key", operands.k), ("value", operands.v)):
        if not all(isinstance(n, int) for n in x.shape):
            return f"a kernel's grid has a static size, but {name} has the symbolic shape {x.shape}"
        if x.shape[3] > MAX_HEAD_DIM:
            return f"the head_dim of {name} must be at most {MAX_HEAD_DIM}, got {x.shape[3]}"
    return None


def linear_attention(
    operands: LinearOperands, *, spec: LinearSpec, config: LinearKernelConfig, interpret: bool
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    """The output of each token and the state after the last one, as reference.linear_attention defines them.

    Not differentiable by itself: the backend pairs it with linear_bwd.py.
    """
    b, t = operands.v.shape[:2]

    def one_row(x: Array) -> Array:
        return x.reshape(1, b * t, *x.shape[2:])

    flat = {name: one_row(x) for name, x in operands._asdict().items() if name != "state" and x is not None}
    rows = LinearRows(
        slot=jnp.arange(b, dtype=jnp.int32),
        query_start=jnp.arange(b + 1, dtype=jnp.int32) * t,
        is_new=jnp.zeros(b, bool),
    )
    flat = operands._replace(**flat)
    out, state = ragged_linear_attention(flat, rows, spec=spec, config=config, interpret=interpret)
    return out.reshape(operands.v.shape), state


def ragged_linear_attention(
    operands: LinearOperands, rows: LinearRows, *, spec: LinearSpec, config: LinearKernelConfig, interpret: bool
) -> tuple[Float[Array, "1 n h dv"], Float[Array, "slots h dk dv"]]:
    """The output of each token and all states, as reference.ragged_linear_attention defines them."""
    _, n, h, dv = operands.v.shape
    chunk, dk = config.chunk_size, operands.k.shape[3]
    whole, rest = parts_of(operands.log_decay[0])
    arrays: dict[str, Any] = {
        "q": operands.q[0],
        "k": operands.k[0],
        "v": operands.v[0],
        "whole": whole,
        "rest": rest,
        "states": operands.state,
        "slot": rows.slot,
        "query_start": rows.query_start,
        "is_new": rows.is_new.astype(jnp.int32),
    }
    if operands.beta is not None:
        arrays["beta"] = operands.beta[0]
    # a chunk may start at any token and reach past the last one; loads and stores there are masked
    tokens, columns = whole_tiles(n, chunk) + chunk, whole_tiles(dv, config.block_v)
    keys = (tokens, operands.k.shape[2], padded(dk))
    numbers, values, states = (tokens, h), (tokens, h, columns), (*operands.state.shape[:2], padded(dk), columns)
    decays = numbers if whole.ndim == 2 else (*numbers, padded(dk))
    blocks: dict[str, tuple[int, ...]] = dict(
        q=keys, k=keys, v=values, whole=decays, rest=decays, beta=numbers, states=states
    )

    def whole_array(shape: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *grid: (0,) * len(shape))

    outs = jax.ShapeDtypeStruct((n, h, dv), operands.v.dtype), operands.state
    call = pl.pallas_call(
        functools.partial(_kernel, names=tuple(arrays), spec=spec, config=config, sizes=(n, dk, dv)),
        name=name_of(operands),
        grid=(h, pl.cdiv(dv, config.block_v), rows.slot.shape[0]),
        in_specs=[whole_array(blocks.get(name, x.shape)) for name, x in arrays.items()],
        out_specs=[whole_array(values), whole_array(states)],
        out_shape=[output(x.shape, x.dtype, like=operands.v) for x in outs],
        input_output_aliases={list(arrays).index("states"): 1},
        compiler_params=CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        out, after = call(*arrays.values())
    is_real = jnp.arange(n) < rows.query_start[-1]  # no program writes tokens that belong to no row
    return jnp.where(is_real[:, None, None], out, 0)[None], after


def parts_of(log_decay: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """The logarithms to base 2, as integers and fractions: see _sums in kernels/xla/linear.py."""
    log_decay = jnp.maximum(log_decay * LOG2_E, _FORGETS)
    whole = jnp.round(log_decay)
    return whole, log_decay - whole


def forgets(log_decay: Float[Array, "*n"]) -> Bool[Array, "*n"]:
    """Whether a token drops the state, as -inf does."""
    return log_decay * LOG2_E <= _FORGETS


class Decays(NamedTuple):
    """The decays of a chunk. Each property is computed where it is read."""

    whole: Float[Array, " chunk"]  # parts_of a head's logarithms
    rest: Float[Array, " chunk"]
    wholes: Float[Array, " chunk"]  # their sums up to each token
    rests: Float[Array, " chunk"]

    @classmethod
    def of(cls, whole: Float[Array, " chunk"], rest: Float[Array, " chunk"]) -> "Decays":
        """The decays by parts_of the logarithms of a chunk's tokens."""
        return cls(whole, rest, jnp.cumsum(whole), jnp.cumsum(rest))

    @property
    def between(self) -> Float[Array, "chunk chunk"]:
        """[i, j]: after token j up to token i; 0 if j is after i."""
        token = jnp.arange(self.whole.shape[0])
        sums = (self.wholes[:, None] - self.wholes[None, :]) + (self.rests[:, None] - self.rests[None, :])
        return exp2(jnp.where(token[:, None] >= token[None, :], sums, -jnp.inf))

    @property
    def since(self) -> Float[Array, " chunk"]:
        """From the chunk's start up to each token."""
        return exp2(self.wholes + self.rests)

    @property
    def until_end(self) -> Float[Array, " chunk"]:
        """After each token."""
        return exp2((self.whole.sum() - self.wholes) + (self.rest.sum() - self.rests))

    @property
    def all(self) -> Float[Array, "1 1"]:
        """Of the whole chunk."""
        return exp2(jnp.full((1, 1), self.whole.sum() + self.rest.sum()))


class ColumnDecays(NamedTuple):
    """The decays of a chunk, for each column of its keys. Each property is computed where it is read."""

    wholes: Float[Array, "chunk columns"]  # sums of parts_of the logarithms up to each token
    rests: Float[Array, "chunk columns"]
    whole: Float[Array, " columns"]  # and of all tokens
    rest: Float[Array, " columns"]

    @classmethod
    def of(cls, whole: Float[Array, "chunk columns"], rest: Float[Array, "chunk columns"]) -> "ColumnDecays":
        """The decays by parts_of the logarithms of a chunk's tokens."""
        return cls(jnp.cumsum(whole, axis=0), jnp.cumsum(rest, axis=0), whole.sum(0), rest.sum(0))

    def up_to(self, i) -> Float[Array, "chunk columns"]:
        """After each token up to token i; 0 for later tokens."""
        sums = (row_of(self.wholes, i)[None, :] - self.wholes) + (row_of(self.rests, i)[None, :] - self.rests)
        return exp2(jnp.where(jnp.arange(sums.shape[0])[:, None] <= i, sums, -jnp.inf))

    @property
    def since(self) -> Float[Array, "chunk columns"]:
        """From the chunk's start up to each token."""
        return exp2(self.wholes + self.rests)

    @property
    def until_end(self) -> Float[Array, "chunk columns"]:
        """After each token."""
        return exp2((self.whole[None, :] - self.wholes) + (self.rest[None, :] - self.rests))

    @property
    def all(self) -> Float[Array, " columns"]:
        """Of the whole chunk."""
        return exp2(self.whole + self.rest)


def row_of(x: Float[Array, "rows columns"], i) -> Float[Array, " columns"]:
    """Row i of a tile in registers."""
    return jnp.where(jnp.arange(x.shape[0])[:, None] == i, x, 0.0).sum(0)


def with_row(x: Float[Array, "rows columns"], i, row: Float[Array, " columns"]) -> Float[Array, "rows columns"]:
    """x with another row i."""
    return jnp.where(jnp.arange(x.shape[0])[:, None] == i, row[None, :], x)


Place = tuple[Any, Array]  # some columns of a ref, and which of them there are


class Chunk(NamedTuple):
    """What a program for one chunk reads and writes, in pieces: the arrays of its tokens, and states [dk, dv]."""

    ref: Mapping[str, Any]
    inside: Bool[Array, " chunk"]  # which tokens there are
    dk: int
    dv: int
    config: LinearKernelConfig

    @property
    def block_d(self) -> int:
        """Columns of a piece of keys."""
        return chunks(self.dk, self.config.block_d)[0][1]

    @property
    def num_keys(self) -> int:
        """Pieces of keys."""
        return pl.cdiv(self.dk, self.block_d)

    @property
    def num_values(self) -> int:
        """Pieces of values."""
        return pl.cdiv(self.dv, self.config.block_v)

    def keys_at(self, n) -> Place:
        """The n-th piece of keys."""
        return pl.ds(n * self.block_d, self.block_d), n * self.block_d + jnp.arange(self.block_d) < self.dk

    def values_at(self, p) -> Place:
        """The p-th piece of values."""
        block_v = self.config.block_v
        return pl.ds(p * block_v, block_v), p * block_v + jnp.arange(block_v) < self.dv

    def rows(self, name: str, at: Place) -> Float[Array, "chunk block"]:
        """Some columns of the tokens."""
        return load(self.ref[name].at[:, at[0]], mask=self.inside[:, None] & at[1][None, :], other=0.0)

    def state(self, name: str, keys: Place, values: Place) -> Float[Array, "block_d block_v"]:
        """A piece of a state."""
        return load(self.ref[name].at[keys[0], values[0]], mask=keys[1][:, None] & values[1][None, :], other=0.0)

    def number(self, name: str) -> Float[Array, " chunk"]:
        """Numbers of the tokens."""
        return load(self.ref[name], mask=self.inside, other=0.0)

    def put(self, to, at: Place, x: Float[Array, "chunk block"]) -> None:
        """Stores some columns of the tokens."""
        store(to.at[:, at[0]], x.astype(to.dtype), mask=self.inside[:, None] & at[1][None, :])


def each(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """A loop; a single turn is none."""
    return body(0, carry) if count == 1 else lax.fori_loop(0, count, body, carry)


def _weights(
    q: Float[Array, "chunk columns"], k: Float[Array, "chunk columns"], decays: ColumnDecays
) -> Float[Array, "chunk chunk"]:
    """Sums over columns of products of queries with the keys up to their own, and of the decays from then on."""
    size = q.shape[0]

    def of_query(i, found):
        return with_row(found, i, (decays.up_to(i) * k * row_of(q, i)[None, :]).sum(1))

    return lax.fori_loop(0, size, of_query, jnp.zeros((size, size), jnp.float32))


def _kernel(
    *refs,  # the arrays by `names`, then outputs: o [n, h, dv], the new states [slots, h, dk, dv]
    names: tuple[str, ...],
    spec: LinearSpec,
    config: LinearKernelConfig,
    sizes: tuple[int, int, int],
):
    *inputs, o_ref, new_states = refs
    ref = dict(zip(names, inputs, strict=True))
    (_, dk, dv), size, block_v, dtype = sizes, config.chunk_size, config.block_v, ref["v"].dtype
    head, column, row = pl.program_id(0), pl.program_id(1) * block_v, pl.program_id(2)
    key_head = lax.div(head, jnp.int32(ref["v"].shape[1] // ref["k"].shape[1]))
    begin, end = ref["query_start"][row], ref["query_start"][row + 1]
    pieces = chunks(dk, config.block_d)
    columns, token = column + jnp.arange(block_v), jnp.arange(size)

    def place(piece: tuple[int, int]) -> tuple[tuple[Any, ...], Array]:
        first, width = piece
        keys = (first + jnp.arange(width))[:, None]
        # a row without tokens may have any slot: it neither reads nor writes it
        used = (keys < dk) & (columns < dv)[None, :] & (end > begin)
        return (ref["slot"][row], head, keys, columns[None, :]), used

    def load_state(piece: tuple[int, int]) -> Float[Array, "piece block_v"]:
        at, used = place(piece)
        return load(ref["states"].at[at], mask=used & (ref["is_new"][row] == 0), other=0.0)

    def chunk(c, state):
        start = begin + c * size
        inside = start + token < end
        mask = inside[:, None] & (columns < dv)[None, :]
        values = (start + token)[:, None], head, columns[None, :]
        v = load(ref["v"].at[values], mask=mask, other=0.0)
        if ref["whole"].ndim == 3:
            out, state = by_columns(start, inside, v, state)
            store(o_ref.at[values], out.astype(dtype), mask=mask)
            return state

        def keys_of(name: str):
            def piece_of(columns, zero):
                return load_rows(ref[name], start + zero, size, columns, width=dk, inside=inside, head=key_head)

            return once(piece_of, pieces)

        def number(name: str) -> Float[Array, " chunk"]:
            return load(ref[name].at[pl.ds(start, size), head], mask=inside, other=0.0)

        q_of, k_of = keys_of("q"), keys_of("k")
        at = functools.partial(later, c, pieces)  # of each use of a piece: several are loaded again for each

        def with_keys(x_of, use: int) -> Float[Array, "chunk chunk"]:
            return sum_of_products((x_of(piece, at(use=use)), k_of(piece, at(use=use))) for piece in pieces)

        def with_state(x_of, use: int) -> Float[Array, "chunk block_v"]:
            parts = (
                product(x_of(piece, at(use=use)), part.astype(dtype)) for piece, part in zip(pieces, state, strict=True)
            )
            return functools.reduce(jnp.add, parts)

        decays = Decays.of(number("whole"), number("rest"))
        decay, since = decays.between, decays.since[:, None]
        if "beta" in ref:
            beta = number("beta")[:, None]
            before = token[:, None] > token[None, :]
            added_before = jnp.where(before, with_keys(k_of, 1) * decay * beta, 0.0)
            v = beta * (v.astype(jnp.float32) - since * with_state(k_of, 2))

            def substitute(i, v):
                # token i is known: take what it adds out of the later ones
                factor = jnp.where(token[None, :] == i, added_before, 0.0).sum(1)
                known = jnp.where(token[:, None] == i, v, 0.0).sum(0)
                return v - factor[:, None] * known[None, :]

            v = lax.fori_loop(0, size - 1, substitute, v)
        weights = (with_keys(q_of, 3) * decay).astype(dtype)
        out = (product(weights, v.astype(dtype)) + since * with_state(q_of, 4)) * spec.scale
        store(o_ref.at[values], out.astype(dtype), mask=mask)
        decayed = (v.astype(jnp.float32) * decays.until_end[:, None]).astype(dtype)
        factor = decays.all
        return tuple(
            part * factor + product(k_of(piece, at(use=5)), decayed, trans_a=True)
            for piece, part in zip(pieces, state, strict=True)
        )

    def by_columns(start, inside, v, state):
        """The outputs of a chunk and the state after it, with a decay for each column of a key."""
        weights = jnp.zeros((size, size), jnp.float32)
        read, after = jnp.zeros((size, block_v), jnp.float32), []
        for piece, part in zip(pieces, state, strict=True):
            q, k, whole, rest = (
                load_rows(ref[name], start, size, piece, width=dk, inside=inside, head=at).astype(jnp.float32)
                for name, at in (("q", key_head), ("k", key_head), ("whole", head), ("rest", head))
            )
            decays = ColumnDecays.of(whole, rest)
            weights = weights + _weights(q, k, decays)
            read = read + product((q * decays.since).astype(dtype), part.astype(dtype))
            kept = product((k * decays.until_end).astype(dtype), v, trans_a=True)
            after.append(part * decays.all[:, None] + kept)
        return (product(weights.astype(dtype), v) + read) * spec.scale, tuple(after)

    num_chunks = lax.div(end - begin + size - 1, jnp.int32(size))
    state = lax.fori_loop(0, num_chunks, chunk, tuple(map(load_state, pieces)))
    for piece, part in zip(pieces, state, strict=True):
        at, used = place(piece)
        store(new_states.at[at], part, mask=used)
