"""Rows of `jfa-bench prove --model` that share what does not depend on the architecture; for a process of its own."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any
from unittest import mock

from jfa_bench.proof import model


def proven_together(rows: Sequence[model.Row]) -> list[dict[str, Any]]:
    """model.prove_row of each row. Their models, caches and results on this CPU are computed once for all."""
    made = functools.cache(model.case_of)
    with mock.patch.object(model, "case_of", lambda row: made(dataclasses.replace(row, arch=""))):
        return [model.prove_row(row) for row in rows]
