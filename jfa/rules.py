"""How this library is traced, whatever the caller has set for the rest of a program."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
from jax.core import Tracer


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


def compiled_alone[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """function(plan, *arrays) as one program where the caller compiles nothing; plan is static.

    The infinities of its masks then stay inside it (jax.debug_infs), and it takes a fraction of the time.
    """
    compiled = jax.jit(function, static_argnums=0)

    @functools.wraps(function)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        is_traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(args[1:]))
        return (function if is_traced else compiled)(*args, **options)

    return wrapper
