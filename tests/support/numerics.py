"""The numerics contract (README, "Numerics"): tolerances follow from the dtype and are never typed into a test."""

import ml_dtypes
import numpy as np
import oracle

ROUNDINGS = 4  # of the output dtype, on top of twice the error of the plain formula


def rounded_plain(q, k, v, *, dtype, **options):
    """Attention whose every product is rounded to dtype, as a model without fused attention computes it."""

    def rounding(x):
        return np.asarray(x, np.float64).astype(dtype).astype(np.float64)

    return oracle.attention(q, k, v, rounding=rounding, **options)


def limit(want, plain, dtype) -> float:
    """The largest error that the contract allows: twice the plain formula's, plus a few roundings of the output."""
    finite = np.isfinite(want)
    scale = max(1.0, np.abs(want[finite]).max(initial=0.0))
    rounding = float(ml_dtypes.finfo(dtype).eps) * scale
    return 2 * np.abs(plain[finite] - want[finite]).max(initial=0.0) + ROUNDINGS * rounding


def assert_within(got, want, allowed: float) -> None:
    """Every element within allowed of what is wanted, infinities in place, no NaN; names the worst element."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, wanted {want.shape}"
    assert not np.isnan(got).any(), f"NaN at {np.argwhere(np.isnan(got))[0]}"
    infinite = np.isinf(want)
    assert np.array_equal(np.isinf(got), infinite), "infinities in other places"
    error = np.abs(np.where(infinite, 0, got) - np.where(infinite, 0, want))
    worst = np.unravel_index(error.argmax(), error.shape) if error.size else ()
    assert not error.size or error[worst] <= allowed, (
        f"at {worst}: {got[worst]} instead of {want[worst]}, {error[worst]:.2e} off where {allowed:.2e} is allowed"
    )
