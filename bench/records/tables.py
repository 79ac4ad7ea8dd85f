"""The columns of each benchmark's records, as a table that fits into 80 columns for any values, and as csv."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from . import record
from .record import Record


class View(NamedTuple):
    """The columns of a benchmark: field (with dots for nested fields) to heading.

    more: additional columns of csv. above: the text above the table that contains a record; consecutive records with
    the same text share a table.
    """

    columns: Mapping[str, str]
    more: Mapping[str, str] = {}
    above: Callable[[Mapping[str, Any]], str] = lambda one: ""

    @property
    def csv(self) -> dict[str, str]:
        """All columns."""
        return {**self.more, **self.columns}

    def table(self, records: Sequence[Record]) -> str:
        """Markdown tables, followed by the reasons why some rows have no results."""
        parts = []
        for above, rows in itertools.groupby(records, self.above):
            parts += [above, record.render(list(rows), "md", self.columns)]
        return "\n\n".join(part for part in (*parts, record.refusals(records)) if part)


# Short names of dtypes for tables.
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float8_e4m3fn": "fp8", "uint8": "int4"}


def short_dtype(name: str) -> str:
    """The short name of a dtype or of a pair such as "bfloat16 on int8"."""
    return " ".join(_SHORT.get(word, word) for word in name.split(" "))


def call(case: Mapping[str, Any]) -> str:
    """The dtype, heads and mask of an attention call."""
    return f"{case['dtype']}, {heads(case)}, {'causal' if case['causal'] else 'all keys'}"


def heads(case: Mapping[str, Any]) -> str:
    """The numbers of heads and the head_dim of a case."""
    over = f" over {case['kv_heads']}" if case["kv_heads"] != case["heads"] else ""
    return f"{case['heads']} heads{over} of {case['head_dim']}"


def layers(case: Mapping[str, Any]) -> str:
    """The number of layers of a case, out of its model's."""
    return "all layers" if case["layers"] == case["of_layers"] else f"{case['layers']} of {case['of_layers']} layers"


def _above_attention(one: Mapping[str, Any]) -> str:
    peak = record.field(one, "ceilings.matrix_tflops")
    measured = f"; peak {record.number(peak)} TFLOP/s" if peak else ""
    return f"{call(one['case'])}, batch {one['case']['batch']}{measured}"


def _above_model(one: Mapping[str, Any]) -> str:
    return f"{one['case']['model']}, {layers(one['case'])}, {one['case']['dtype']}"


def _above_paged(one: Mapping[str, Any]) -> str:
    return f"{one['case']['batch']} x {one['case']['context']:,} tokens, {one['case']['dtype']}, {heads(one['case'])}"


VIEWS: Mapping[str, View] = {
    "attention": View(
        {
            "case.length": "length",
            "dir": "dir",
            "what": "what",
            "ms": "ms",
            "spread": "±",
            "tflops": "TFLOP/s",
            "peak": "peak",
            "speedup": "x ref",
            "peak_mib": "MiB",
        },
        {"case.batch": "batch"},
        _above_attention,
    ),
    "prefill": View(
        {
            "case.seq_len": "tokens",
            "what": "what",
            "ms": "ms",
            "spread": "±",
            "tokens_per_s": "t/s",
            "share_of_peak": "of limit",
            "speedup": "x ref",
        },
        {"tokens_per_s_deviation": "t/s ±"},
        _above_model,
    ),
    "decode": View(
        {
            "case.batch": "batch",
            "what": "what",
            "ms": "ms",
            "spread": "±",
            "tokens_per_s": "t/s",
            "share_of_bandwidth": "of copy",
            "share_of_peak": "of limit",
            "host_ms_per_step": "host ms",
        },
        {"case.context": "context", "tokens_per_s_deviation": "t/s ±"},
        lambda one: f"{_above_model(one)}, {one['case']['context']:,} tokens of context",
    ),
    "paged": View(
        {
            "what": "what",
            "case.page_size": "page",
            "case.kv_dtype": "kv",
            "ms": "ms",
            "spread": "±",
            "gb_per_s": "GB/s",
            "share_of_peak": "of copy",
            "slowdown": "x contig.",
        },
        {"case.batch": "batch", "case.context": "context"},
        _above_paged,
    ),
    "throughput": View(
        {
            "what": "what",
            "tokens_per_s": "t/s",
            "speedup": "x static",
            "ttft_ms.p50": "TTFT",
            "tpot_ms.p50": "TPOT",
            "itl_ms.p99": "ITL p99",
            "wasted_share": "wasted",
            "saved_share": "shared",
        },
        {"seconds": "s", "ttft_ms.p99": "TTFT p99"},
    ),
    "speculation": View(
        {
            "case.task": "task",
            "what": "drafts",
            "tokens_per_s": "t/s",
            "speedup": "x none",
            "tokens_per_step": "t/step",
            "accepted": "right",
        },
        {
            "case.kind": "kind",
            "case.batch": "batch",
            "proposed": "drafted",
            "least": "least",
            "same_as_plain": "same tokens",
        },
        lambda one: f"{one['case']['kind']} prompts, {one['case']['batch']} at a time",
    ),
    "memory": View(
        {
            "case.data": "data",
            "case.page_size": "page",
            "case.sampling": "sampling",
            "case.width": "width",
            "wasted_share": "wasted",
            "saved_share": "shared",
            "reserved_share": "of reserved",
        }
    ),
    "accuracy": View(
        {
            "what": "kind",
            "perplexity": "perplexity",
            "perplexity_ratio": "x float",
            "greedy_same": "greedy as float",
            "bytes_per_token": "bytes",
            "bytes_ratio": "of float",
        },
        above=lambda one: f"{one['case']['tokens']:,} tokens of text; bytes of each token in the cache",
    ),
}
