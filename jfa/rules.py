"""The rules of promotion that this library is written for, whatever the caller has set for the rest of a program."""

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
