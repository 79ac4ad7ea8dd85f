"""`jfa-bench sparse`: block-sparse attention over density, compared with dense causal attention in the same run.

For each density a mask is made: the one of its kind that visits the closest number of tiles. Before timing, the
results of some query rows are checked against the oracle, as in `attention`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import jfa
from jfa import backends

from .. import names
from ..records import record
from . import attention, machine, peers, roofline, timing, used

DENSE = names.SPARSE[0]
SINKS = 4  # keys at the start that every query of a window sees


def measure(
    case: attention.Case,
    *,
    kinds: Sequence[str],
    densities: Sequence[float],
    block: int,
    directions: Sequence[str],
    implementations: Sequence[str],
    samples: int,
    clock: timing.Clock = time.perf_counter,
) -> Iterator[record.Record]:
    """A record of dense attention, and one for each implementation and density, for each kind of mask and direction;
    those of one kind and direction are measured interleaved.

    visited: the fraction of tiles that are visited, of those that a causal mask leaves. flop and tflops count these.
    speedup: over dense attention.
    """
    shared = machine.circumstances() | {"benchmark": "sparse"}
    ceilings = roofline.ceilings(case.dtype, clock=clock)
    peak = ceilings["matrix_tflops"]
    for kind in kinds:
        masks: dict[float, jfa.BlockMask] = {each: mask_of(kind, case, each, block) for each in densities}
        for direction in directions:
            about = dataclasses.asdict(case) | {"direction": direction, "mask": kind, "block": block}
            found, runs = _checked(case, direction, masks, implementations)
            taken = timing.in_turns(runs, samples=samples, clock=clock)
            dense = float(np.median(taken[DENSE, 1.0])) if (DENSE, 1.0) in taken else None
            for (name, density), own in found.items():
                if (ms := taken.get((name, density))) is not None:
                    median, flop = float(np.median(ms)), case.flop * own["visited"] * attention.FLOP[direction]
                    own |= timing.summary(ms) | {"flop": flop, "tflops": flop / median / 1e9}
                    own |= {"share_of_peak": peak and own["tflops"] / peak, "speedup": dense and dense / median}
                of = about | {"density": density}
                yield shared | {"case": of, "ceilings": ceilings, "implementation": name} | own


def _checked(
    case: attention.Case, direction: str, masks: dict[float, jfa.BlockMask], implementations: Sequence[str]
) -> tuple[dict[tuple[str, float], record.Record], dict[tuple[str, float], timing.Run]]:
    """The record fields of each (implementation, density) before timing, and a run of each that is correct."""
    arrays, some = attention.inputs(case)
    q, k, v, _ = arrays
    found: dict[tuple[str, float], record.Record] = {}
    runs: dict[tuple[str, float], timing.Run] = {}
    several = [name for name in implementations if name != DENSE]
    jobs = [(1.0, None, [DENSE])] if DENSE in implementations else []
    for density, mask, own in [*jobs, *((density, mask, several) for density, mask in masks.items())]:
        known = attention.truth(case, _seen(mask, case), gradients=direction != "forward")
        error = functools.partial(attention.error, case, direction, known)
        visited = 1.0 if mask is None else visited_share(mask)
        for name in own:
            call = peers.Call(causal=True, direction=direction, mask=mask)
            make = functools.partial(peers.program, name, call, *arrays, known=peers.SPARSE)
            fields, run = attention.checked(make, error, arrays, (q, k, v, some))
            if run is not None:
                runs[name, density] = run
                if mask is not None and name in backends.NAMES:
                    fields["config"] = used.sparse(name, q, k, v, mask)
            found[name, density] = fields | {"visited": visited}
    return found, runs


def _seen(mask: jfa.BlockMask | None, case: attention.Case) -> np.ndarray:
    """The keys that the checked rows see, [#b, #hq, rows, length]."""
    rows = attention.checked_rows(case)
    causal = (rows[:, None] >= np.arange(case.length))[None, None]
    if mask is None:
        return causal
    kinds = np.asarray(mask.grid())[:, :, rows // mask.block_q]
    tiles = np.asarray(mask.tiles)[np.maximum(kinds, 0), (rows % mask.block_q)[:, None]] & (kinds >= 0)[..., None]
    return causal & tiles.reshape(*kinds.shape[:3], -1)[..., : case.length]


def visited_share(mask: jfa.BlockMask) -> float:
    """The fraction of the tiles below or on the diagonal that a mask visits."""
    i, j = np.ogrid[: mask.num_axis_tiles[0], : mask.num_axis_tiles[1]]
    left = j * mask.block_kv < (i + 1) * mask.block_q
    return float((np.asarray(mask.grid() >= 0) & left).mean(axis=(0, 1)).sum() / left.sum())


def mask_of(kind: str, case: attention.Case, density: float, block: int) -> jfa.BlockMask:
    """The mask of a kind, one of names.SPARSE_MASKS, whose visited_share is the closest to density."""
    make, most = _MAKERS[kind](case, block)
    low, high = 1, most  # the size is in between; the larger, the more tiles
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if visited_share(make(middle)) >= density else (middle, high)
    return min((make(low), make(high)), key=lambda mask: abs(visited_share(mask) - density))


_Maker = tuple[Callable[[int], jfa.BlockMask], int]  # size -> mask, and the largest size


def _windows(case: attention.Case, block: int) -> _Maker:
    """Of size tokens."""
    n, tiles = case.length, {"block_q": block, "block_kv": block}
    return lambda size: jfa.BlockMask.sliding_window(n, n, (size - 1, 0), sinks=SINKS, **tiles), n


def _bigbird(case: attention.Case, block: int) -> _Maker:
    """The middle of three tiles, the one before it, the first one, and size - 1 random ones."""
    n, options = case.length, {"heads": case.heads, "block_q": block, "block_kv": block}
    return lambda size: jfa.BlockMask.bigbird(n, n, num_random=size - 1, **options), 1 + -(-n // block)


def _vertical_slash(case: attention.Case, block: int) -> _Maker:
    """size random lines of both kinds for each head, the diagonal among them."""
    n, rng = case.length, np.random.default_rng(0)
    vertical = np.stack([rng.permutation(n) for _ in range(case.heads)])[None]
    slash = np.stack([np.append(0, 1 + rng.permutation(n - 1)) for _ in range(case.heads)])[None]
    tiles = {"block_q": block, "block_kv": block}
    return lambda m: jfa.BlockMask.vertical_slash(vertical[..., :m], slash[..., :m], n, n, **tiles), n


def _top_k(case: attention.Case, block: int) -> _Maker:
    """size tiles for each tile of queries and each head."""
    q, k = attention.inputs(case)[0][:2]
    options: dict[str, Any] = {"is_causal": True, "block_q": block, "block_kv": block}
    return lambda size: jfa.BlockMask.top_k(q, k, size, **options), -(-case.length // block)


_MAKERS: dict[str, Callable[[attention.Case, int], _Maker]] = {
    "window": _windows,
    "bigbird": _bigbird,
    "vertical-slash": _vertical_slash,
    "top-k": _top_k,
}
assert tuple(_MAKERS) == names.SPARSE_MASKS
