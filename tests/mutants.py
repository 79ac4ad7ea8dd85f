"""Mutation testing: seeded one-line changes to the code, for each of which the tests of that code are run.

    uv run python tests/mutants.py                        # all of them, two at a time: about an hour
    uv run python tests/mutants.py --group allocator      # of one group; --list shows them without running anything

A change alters a comparison, increments a constant, drops a branch, shifts an index, or exchanges plus and minus or
`and` and `or`. It is noticed when a test fails or the tests run far too long. Some changes have no effect on results:
SURVIVORS says why.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT_S = 900


class Group(NamedTuple):
    """Files that are changed, and the tests that cover them, those that fail soonest first."""

    files: str
    tests: str


GROUPS = {
    "kernels": Group(
        """jfa/kernels/triton/tile.py jfa/kernels/triton/flash.py jfa/kernels/triton/flash_bwd.py
        jfa/kernels/triton/paged.py jfa/kernels/xla/flash.py jfa/kernels/xla/paged.py""",
        """tests/jfa/test_attention.py tests/jfa/test_paged_attention.py tests/jfa/test_attention_gradients.py
        tests/jfa/test_attention_transforms.py tests/jfa/test_attention_refusals.py tests/jfa/test_paged_refusals.py
        tests/jfa/test_lowering.py tests/jfa/test_paged_lowering.py tests/jfa/test_tuning.py tests/jfa/test_flax.py""",
    ),
    "decode": Group(
        "jfa/kernels/triton/few_rows.py jfa/kernels/triton/write.py jfa/kernels/triton/merge.py",
        """tests/jfa/test_row_ops.py tests/jfa/test_write.py tests/jfa/test_paged_lowering.py
        tests/jfa/test_paged_attention.py tests/jfa_models/model/test_decoder.py""",
    ),
    "tpu": Group(
        """jfa/kernels/tpu/tile.py jfa/kernels/tpu/columns.py jfa/kernels/tpu/paged.py jfa/kernels/tpu/flash.py
        jfa/kernels/tpu/flash_bwd.py jfa/kernels/tpu/products.py""",
        "tests/jfa/test_tpu.py tests/jfa/test_tpu_products.py",
    ),
    "caches": Group(
        "jfa/cache/contiguous.py jfa/cache/paged.py jfa/quant.py jfa_models/decoding/caches.py",
        """tests/jfa/test_cache.py tests/jfa/test_paged_cache.py tests/jfa/test_quant.py
        tests/jfa/test_paged_attention.py tests/jfa_models/decoding/test_windows.py
        tests/jfa_models/decoding/test_paged_generate.py tests/jfa_models/decoding/test_generate.py""",
    ),
    "allocator": Group("jfa/pages.py", "tests/jfa/test_pages.py tests/jfa/test_pages_random.py"),
    "scheduler": Group(
        """jfa_models/engine/scheduler.py jfa_models/engine/pools.py jfa_models/engine/beams.py
        jfa_models/engine/launch.py jfa_models/engine/results.py jfa_models/engine/request.py
        jfa_models/engine/snapshots.py""",
        "tests/jfa_models/engine tests/jfa_models/test_llm.py tests/jfa_models/test_batch.py",
    ),
    "sampling": Group(
        """jfa_models/decoding/sampling.py jfa_models/decoding/params.py jfa_models/decoding/completion.py
        jfa_models/decoding/steps.py""",
        """tests/jfa_models/decoding/test_sampling.py tests/jfa_models/decoding/test_generate.py
        tests/jfa_models/engine/test_engine.py""",
    ),
    "checkpoints": Group(
        """jfa_models/checkpoints/tensors.py jfa_models/checkpoints/names.py jfa_models/checkpoints/load.py
        jfa_models/checkpoints/gguf.py jfa_models/checkpoints/safetensors.py jfa_models/checkpoints/save.py
        jfa_models/checkpoints/hf_config.py jfa_models/checkpoints/gguf_config.py jfa_models/checkpoints/fields.py
        jfa_models/model/rope.py jfa_models/text/gguf_vocabulary.py""",
        "tests/jfa_models/model tests/jfa_models/text tests/jfa_models/checkpoints",
    ),
}
PER_GROUP = 14

SURVIVORS = {  # the changed line: why no test can notice it
    "if operands.q_segments is not None or operands.kv_segments is not None:": "both are given, or neither",
    "if tile.has_data_mask or visible is not None:": "weights that are already zero are masked again",
    "if operands.q_segments is None and operands.kv_segments is None:": "both are given, or neither",
    "keys, values = jnp.where(inside, keys, 0), jnp.where(inside, values, 1)": "any finite value has a weight of 0",
    "stored = block[:, pl.ds(start if False else pl.multiple_of(start, LANES), width)]": "a hint, for traced numbers",
    "num_pages=[1 + int(table.max(initial=1)) for table in own],": "an empty table gets a pool of one page more",
    "return hashlib.blake2b(parent + page, digest_size=33).digest()": "any size that avoids collisions will do",
}

_COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
_COMPARISONS |= {ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A line of a file and its replacement."""

    group: str
    file: str
    number: int  # of the line, from 1
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.before.strip()}  ->  {self.after.strip()}"


def mutants(group: str, *, count: int = PER_GROUP, seed: int = 0) -> list[Mutant]:
    """Changes of a group, cycling through the kinds; they depend only on the seed and the files."""
    draw = random.Random(f"{seed} {group}")
    kinds: dict[str, list[Mutant]] = defaultdict(list)
    for file in GROUPS[group].files.split():
        lines = (ROOT / file).read_text().splitlines(keepends=True)
        for kind, node, start, end, text in _replacements(ast.parse("".join(lines)), lines):
            if node.lineno == node.end_lineno:
                line = lines[node.lineno - 1].encode()
                changed = (line[:start] + text.encode() + line[end:]).decode()
                kinds[kind].append(Mutant(group, file, node.lineno, line.decode(), changed))
    chosen: dict[tuple[str, int], Mutant] = {}  # at most one per line
    for found in kinds.values():
        draw.shuffle(found)
    while len(chosen) < count and any(kinds.values()):
        for found in kinds.values():
            while found and (found[-1].file, found[-1].number) in chosen:
                found.pop()
            if found and len(chosen) < count:
                mutant = found.pop()
                chosen[mutant.file, mutant.number] = mutant
    return list(chosen.values())


# Variables that are shifted when used as an index: in this code they are integers, not keys.
_NUMBERS = {"i", "j", "n", "page", "row", "place", "layer", "index", "slot", "start", "turn", "table", "cut", "at"}


def _replacements(tree: ast.AST, lines: Sequence[str]) -> Iterator[tuple[str, Any, int, int, str]]:
    """(kind of change, the expression, start and end columns in its line, the text that replaces them)."""
    for node in _computed(tree):
        match node:
            case ast.Compare(ops=[op]):
                start, end = node.left.end_col_offset, node.comparators[0].col_offset
                yield "comparison", node, start, end, f" {_COMPARISONS[type(op)]} "
            case ast.Constant(value=value) if type(value) is int:
                yield "constant", node, node.col_offset, node.end_col_offset, str(value + 1)
            case ast.BinOp(op=ast.Add() | ast.Sub()):
                start, end = node.left.end_col_offset, node.right.col_offset
                if lines[node.lineno - 1].encode()[start:end].strip() in (b"+", b"-"):
                    yield "sign", node, start, end, " - " if isinstance(node.op, ast.Add) else " + "
            case ast.BoolOp(op=op, values=[first, second]):
                word = " or " if isinstance(op, ast.And) else " and "
                yield "and or", node, first.end_col_offset, second.col_offset, word
            case ast.If(test=test) | ast.IfExp(test=test):
                yield "branch", test, test.col_offset, test.end_col_offset, "False"
            case ast.Subscript(slice=ast.Name(id=name) as place) if name in _NUMBERS:
                yield "index", place, place.col_offset, place.end_col_offset, f"{name} + 1"


def _computed(tree: ast.AST) -> Iterator[ast.AST]:
    """Expressions and statements that functions execute: without annotations, messages and decorators."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            waiting: list[ast.AST] = list(function.body)
            while waiting:
                node = waiting.pop()
                if isinstance(node, ast.Raise | ast.Assert | ast.FunctionDef | ast.JoinedStr):
                    continue
                yield node
                for name, value in ast.iter_fields(node):
                    if name != "annotation":
                        waiting += [
                            one for one in (value if isinstance(value, list) else [value]) if isinstance(one, ast.AST)
                        ]


def noticed(mutant: Mutant, *, root: Path = ROOT, options: Sequence[str] = ()) -> str | None:
    """The first test that fails, "too long", or None. The files of the repository stay as they are."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "results"))
        (copy / "jfa_bench").symlink_to("bench")
        lines = (copy / mutant.file).read_text().splitlines(keepends=True)
        assert lines[mutant.number - 1] == mutant.before
        lines[mutant.number - 1] = mutant.after
        (copy / mutant.file).write_text("".join(lines))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *options]
        environment = {**os.environ, "PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}
        tests = GROUPS[mutant.group].tests.split()
        try:
            done = subprocess.run(
                [*command, *tests], cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return "too long"
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0][:150] if failed else f"pytest ended with {done.returncode}: {done.stderr[-150:]}"


def main() -> int:
    """Prints which changes were noticed and which survived; exit status 1 if less than nine in ten were noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=GROUPS, action="append")
    parser.add_argument("--count", type=int, default=PER_GROUP, help="changes per group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="show the changes and run nothing")
    parser.add_argument("--json", type=Path, help="also write the results to a file")
    asked = parser.parse_args()
    chosen = [one for group in asked.group or GROUPS for one in mutants(group, count=asked.count, seed=asked.seed)]
    if asked.list:
        print(*chosen, sep="\n")
        return 0
    found = {}
    with concurrent.futures.ThreadPoolExecutor(asked.jobs) as pool:
        for mutant, by in zip(chosen, pool.map(noticed, chosen), strict=True):
            found[mutant] = by
            print(f"{'noticed ' if by else 'SURVIVED'} {mutant}\n         {by or ''}", flush=True)
    for group in asked.group or GROUPS:
        own = [by for mutant, by in found.items() if mutant.group == group]
        print(f"{group}: {sum(map(bool, own))} of {len(own)} noticed")
    survivors = [mutant for mutant, by in found.items() if not by]
    print(f"{len(found) - len(survivors)} of {len(found)} noticed")
    for mutant in survivors:
        print(f"{mutant}\n         {SURVIVORS.get(mutant.after.strip(), 'not explained')}")
    if asked.json:
        rows = [dataclasses.asdict(mutant) | {"noticed": by} for mutant, by in found.items()]
        asked.json.write_text(json.dumps(rows, indent=1))
    return int(len(survivors) > len(found) / 10)


if __name__ == "__main__":
    sys.exit(main())
