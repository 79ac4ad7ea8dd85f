"""Marks the cases of a parametrized test as quick, or as run only by `pytest -m exhaustive`."""

import pytest


def run(*values, quick: bool):
    """A parameter set, with the values as its id."""
    marks = () if quick else pytest.mark.exhaustive
    return pytest.param(*values, id="-".join(map(str, values)), marks=marks)
