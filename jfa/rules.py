"""How this library is traced, whatever the caller has set for the rest of a program."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax


@contextlib.contextmanager
def default_rules() -> Iterator[None]:
    """JAX's default promotion of ranks and dtypes: the options that forbid it are meant for the caller's own code."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def with_default_rules[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """The function, traced under default_rules."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        with default_rules():
            return function(*args, **options)

    return wrapper


def compiled[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """function(plan, *arrays) as a program; plan is static.

    In a program of the caller it is traced and lowered once for all calls of equal shapes, such as those of a model's
    layers. So a test that changes a kernel calls jax.clear_caches(). Where the caller compiles nothing, it takes a
    fraction of the time, and the infinities of its masks stay inside of it (jax.debug_infs).
    """
    return jax.jit(function, static_argnums=0)
