"""The library's flash attention kernel as machine code, with inputs that exercise all of its paths."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import jfa
from jfa_bench.proof import aot, compilers
from jfa_bench.truth import oracle
from jfa_bench.truth.numerics import assert_within, limit, rounding_to

from .support import Built, poisoned

SHAPE = (2, 70, 180, 2, 1, 16)  # batch, tq, tk, hq, hkv, head_dim
WINDOW = (160, 0)
CONFIG = jfa.FlashConfig(block_q=64, block_kv=32, num_warps=4, num_stages=1)

# The arguments of each call that differ between rows. First: whole tiles, tiles at both edges of the window, at the
# diagonal and at the end of the keys. Then: no keys at all, a single query, steep scores, lengths that end with a tile.
ROWS = [
    dict(query_seq_lengths=(70, 41), key_value_seq_lengths=(173, 150), query_offset=(120, -3)),
    dict(query_seq_lengths=(64, 70), key_value_seq_lengths=(160, 0), query_offset=(110, 100)),
    dict(query_seq_lengths=(1, 70), key_value_seq_lengths=(96, 17), query_offset=(95, -40)),
]
STEEPNESS = (1, 1, 8)  # of the scores


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of the kernel, and the expected outputs."""

    args: tuple[np.ndarray, ...]  # inputs, then the two outputs, poisoned
    wanted: tuple[np.ndarray, np.ndarray]  # out and lse of the oracle
    allowed: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Flash:
    """jfa.dot_product_attention, causal and with a window, compiled; and calls of it."""

    built: Built
    grid: tuple[int, int, int]
    calls: tuple[Call, ...]

    def run(self, asm: str | None = None, call: int = 0, **limits):
        """Runs the kernel, or the assembly `asm` in its place, with the arguments of a call."""
        built = self.built if asm is None else self.built.replaced(asm)
        return built.run(*self.calls[call].args, grid=self.grid, **limits)

    def check(self, asm: str | None = None, **limits) -> None:
        """Checks that the outputs of every call meet the numerics contract and that there are no races."""
        for number, call in enumerate(self.calls):
            done = self.run(asm, number, **limits)
            for got, want, allowed in zip(done.outputs[-2:], call.wanted, call.allowed, strict=True):
                with np.errstate(invalid="ignore"):  # unwritten elements may be signalling NaN
                    assert_within(got, want, allowed)
            assert not done.races, done.races[0]


def call_of(dtype: str, rows: dict[str, np.ndarray], steepness: float, seed: int) -> Call:
    """A call whose inputs past the lengths are NaN and infinities, which the kernel must not read."""
    b, tq, tk, hq, hkv, d = SHAPE
    random = np.random.default_rng(seed)
    sizes = (b, tq, hq, d), (b, tk, hkv, d), (b, tk, hkv, d)
    q, k, v = (np.array(jnp.asarray(random.standard_normal(size), dtype)) for size in sizes)
    q *= np.asarray(steepness, q.dtype)
    q_len, kv_len, q_offset = rows.values()
    named = dict(scale=d**-0.5, causal=True, window=WINDOW, q_len=q_len, kv_len=kv_len, q_offset=q_offset)
    wanted = oracle.attention(q, k, v, **named)
    plain = oracle.attention(q, k, v, **named, rounding=rounding_to(jnp.dtype(dtype)))
    dtypes = q.dtype, np.dtype(np.float32)
    for row in range(b):
        q[row, q_len[row] :] = np.nan
        k[row, kv_len[row] :], v[row, kv_len[row] :] = np.nan, np.inf
    return Call(
        args=(q, k, v, *rows.values(), *(poisoned(x.shape, to) for x, to in zip(wanted, dtypes, strict=True))),
        wanted=wanted,
        allowed=tuple(limit(*each) for each in zip(wanted, plain, dtypes, strict=True)),
    )


@functools.cache
def flash(arch: str, dtype: str = "bfloat16") -> Flash:
    """The kernel for arch, and three calls."""
    rows = [{name: np.asarray(x, np.int32) for name, x in each.items()} for each in ROWS]
    calls = tuple(map(call_of, itertools.repeat(dtype), rows, STEEPNESS, itertools.count()))
    return Flash(*compiled(arch, dtype), calls)


def compiled(arch: str, dtype: str) -> tuple[Built, tuple[int, int, int]]:
    """The kernel as the library makes it now, and its grid."""
    b, tq, tk, hq, hkv, d = SHAPE
    q, k = jax.ShapeDtypeStruct((b, tq, hq, d), dtype), jax.ShapeDtypeStruct((b, tk, hkv, d), dtype)

    def attention(q, k, v, rows):
        return jfa.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            local_window_size=WINDOW,
            implementation="triton",
            return_residual=True,
            config=CONFIG,
            **rows,
        )

    rows = dict.fromkeys(ROWS[0], jax.ShapeDtypeStruct((b,), np.int32))
    [kernel] = aot.lower(attention, q, k, k, rows, arch=arch)
    built = compilers.compile_kernel(kernel, arch=arch)
    return Built(built.asm, kernel.num_warps, built.lds_bytes), kernel.grid
