"""The numerics contract (docs/attention.md): tolerances are computed from the dtype, never hard-coded in a test."""

from collections.abc import Callable

import ml_dtypes
import numpy as np

ROUNDINGS = 4  # of the output dtype, per product, in addition to twice the error of the plain formula


def rounding_to(dtype) -> Callable[[np.ndarray], np.ndarray]:
    """A function that rounds a product to dtype, as a model without fused attention does."""
    return lambda x: np.asarray(x, np.float64).astype(dtype).astype(np.float64)


def limit(want, plain, dtype, *, products: int = 1) -> float:
    """The largest error that the contract allows: twice the plain formula's, plus a few roundings of the output.

    products: number of consecutive matrix products that a value is the result of.
    """
    finite = np.isfinite(want)
    scale = max(1.0, np.abs(want[finite]).max(initial=0.0))
    rounding = float(ml_dtypes.finfo(dtype).eps) * scale
    return 2 * np.abs(plain[finite] - want[finite]).max(initial=0.0) + ROUNDINGS * products * rounding


def assert_within(got, want, allowed: float) -> float:
    """Checks that every element is within allowed of want, with equal infinities and no NaN; returns the worst error.

    Raises:
      AssertionError: otherwise; the message names the worst element.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    assert not np.isnan(got).any(), f"NaN at {np.argwhere(np.isnan(got))[0]}"
    infinite = np.isinf(want)
    assert np.array_equal(np.isinf(got), infinite), "infinities are in different places"
    error = np.abs(np.where(infinite, 0, got) - np.where(infinite, 0, want))
    worst = np.unravel_index(error.argmax(), error.shape) if error.size else ()
    largest = float(error[worst]) if error.size else 0.0
    place = tuple(map(int, worst))
    assert largest <= allowed, (
        f"at {place}: {got[worst]} instead of {want[worst]}, an error of {largest:.2e}, above the allowed {allowed:.2e}"
    )
    return largest
