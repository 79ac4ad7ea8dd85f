"""Marks the cases of a parametrized test as quick, or as run only by `pytest -m exhaustive`."""

import pytest


def run(*values, quick: bool, soak: bool = False):
    """A parameter set, with the values as its id. soak: it is one of the longest, which .ci/run leaves out."""
    marks = () if quick else (pytest.mark.exhaustive, pytest.mark.soak) if soak else pytest.mark.exhaustive
    return pytest.param(*values, id="-".join(map(str, values)), marks=marks)
