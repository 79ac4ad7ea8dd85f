"""The columns of each benchmark's records, as a table that fits into 80 columns for any values, and as csv."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .. import names
from . import record
from .record import Record


class View(NamedTuple):
    """The columns of a benchmark: field (with dots for nested fields) to heading.

    more: additional columns of csv. above: the text above the table that contains a record; consecutive records with
    the same text share a table. details: text about a record before the tables.
    """

    columns: Mapping[str, str]
    more: Mapping[str, str] = {}
    above: Callable[[Mapping[str, Any]], str] = lambda one: ""
    details: Callable[[Mapping[str, Any]], str] = lambda one: ""

    @property
    def csv(self) -> dict[str, str]:
        """All columns."""
        return {**self.more, **self.columns}

    def table(self, records: Sequence[Record]) -> str:
        """Markdown tables, followed by the reasons why some rows have no results."""
        parts = [self.details(one) for one in records]
        for above, rows in itertools.groupby(records, self.above):
            parts += [above, record.render(list(rows), "md", self.columns)]
        return "\n\n".join(part for part in (*parts, record.refusals(records)) if part)


# Short names of dtypes for tables.
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float8_e4m3fn": "fp8", "uint8": "int4"}


def short_dtype(name: str) -> str:
    """The short name of a dtype or of a pair such as "bfloat16 on int8"."""
    return " ".join(_SHORT.get(word, word) for word in name.split(" "))


# What the rules of linear attention are called in headings.
RULES = {"scalar": "a decay per head", "vector": "a decay per column", "delta": "delta rule"}


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


def _above_linear(one: Mapping[str, Any]) -> str:
    case = one["case"]
    keys = f"over {case['key_heads']} " if case["key_heads"] != case["heads"] else ""
    sizes = f"keys of {case['key_dim']}, values of {case['value_dim']}"
    return f"{RULES[case['rule']]}, {case['dtype']}, {case['heads']} heads {keys}with {sizes}"


def _above_model(one: Mapping[str, Any]) -> str:
    return f"{one['case']['model']}, {layers(one['case'])}, {one['case']['dtype']}"


def _above_paged(one: Mapping[str, Any]) -> str:
    return f"{one['case']['batch']} x {one['case']['context']:,} tokens, {one['case']['dtype']}, {heads(one['case'])}"


# The lines of vLLM's block: field to label.
_BLOCK = {
    "completed": "Successful requests:",
    "failed": "Failed requests:",
    "rejected": "Rejected requests (429):",
    "retries": "Retries after 429:",
    "case.max_concurrency": "Maximum request concurrency:",
    "case.request_rate": "Request rate configured (RPS):",
    "duration": "Benchmark duration (s):",
    "total_input_tokens": "Total input tokens:",
    "total_output_tokens": "Total generated tokens:",
    "request_throughput": "Request throughput (req/s):",
    "request_goodput": "Request goodput (req/s):",
    "output_throughput": "Output token throughput (tok/s):",
    "max_output_tokens_per_s": "Peak output token throughput (tok/s):",
    "max_concurrent_requests": "Peak concurrent requests:",
    "total_token_throughput": "Total token throughput (tok/s):",
}
_NOT_USUAL = ("rejected", "retries")  # left out if 0


def serving_block(one: Mapping[str, Any]) -> str:
    """The figures of a run in the form of `vllm bench serve`, and what must be known about them."""
    values = {
        label: record.field(one, path) for path, label in _BLOCK.items() if path not in _NOT_USUAL or one.get(path)
    }
    lines = [f"{' Serving Benchmark Result ':=^50}", *_block_lines(values)]
    for name in one.get("percentile_metrics", ()):
        ending = f"_{name}_ms"
        kinds = [key.removesuffix(ending) for key in one if key.endswith(ending) and not key.startswith("std")]
        labels = {f"{kind.capitalize()} {name.upper()} (ms):": one[kind + ending] for kind in kinds}
        lines += [f"{names.LATENCIES[name]:-^50}", *_block_lines(labels)]
    return "\n".join([*lines, "=" * 50, *one.get("notes", ())])


def _block_lines(values: Mapping[str, Any]) -> list[str]:
    shown = {label: f"{value:.2f}" if isinstance(value, float) else value for label, value in values.items()}
    return [f"{label:<40} {value}" for label, value in shown.items() if value is not None]


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
    "sparse": View(
        {
            "visited": "visited",
            "dir": "dir",
            "what": "what",
            "ms": "ms",
            "spread": "±",
            "tflops": "TFLOP/s",
            "peak": "peak",
            "speedup": "x dense",
            "peak_mib": "MiB",
        },
        {"case.mask": "mask", "case.density": "density", "case.length": "length", "case.batch": "batch"},
        lambda one: f"{one['case']['mask']}, {one['case']['length']:,} tokens, {call(one['case'])}",
    ),
    "linear": View(
        {
            "case.length": "length",
            "dir": "dir",
            "what": "what",
            "ms": "ms",
            "spread": "±",
            "tokens_per_s": "t/s",
            "speedup": "x attn.",
            "peak_mib": "MiB",
        },
        {"case.rule": "rule", "case.batch": "batch"},
        _above_linear,
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
    "serve": View(
        {
            "what": "what",
            "case.request_rate": "rate",
            "output_throughput": "t/s",
            "median_ttft_ms": "TTFT",
            "p99_ttft_ms": "TTFT p99",
            "median_tpot_ms": "TPOT",
            "p99_tpot_ms": "TPOT p99",
            "request_goodput": "good/s",
        },
        {
            "completed": "completed",
            "failed": "failed",
            "rejected": "rejected",
            "duration": "s",
            "total_input_tokens": "input tokens",
            "total_output_tokens": "output tokens",
            "request_throughput": "requests/s",
            "total_token_throughput": "total t/s",
            "max_output_tokens_per_s": "peak t/s",
            "max_concurrent_requests": "peak requests",
            **{
                f"{kind}_{name}_ms": f"{name.upper()} {kind}"
                for name in names.LATENCIES
                for kind in ("mean", "std", "median", "p99")
                if name not in ("ttft", "tpot") or kind in ("mean", "std")
            },
        },
        lambda one: f"{one['case']['model']}; milliseconds",
        serving_block,
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
            "case.arch": "arch",
            "computed_speedup": "x none there",
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
