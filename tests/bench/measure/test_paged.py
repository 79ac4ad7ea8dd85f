"""`jfa-bench paged`, `memory` and `accuracy`: the contents of their records."""

import json
import math

import jax
import numpy as np
import pytest
import tiny_model
from click.testing import CliRunner
from golden import LLAMA3

import jfa
import jfa_models
from jfa_bench import cli
from jfa_bench.measure import accuracy, memory


def records(*arguments):
    done = CliRunner().invoke(cli.commands, [*map(str, arguments), "-o", "json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_pages_are_compared_with_a_copy_and_the_contiguous_cache():
    found = records(
        *("paged", "--batch", 2, "--context", 40, "--page-size", "16,3", "--kv-dtype", "same,int4"),
        *("--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--samples", 2),
    )
    assert [(r["implementation"], r["case"]["page_size"], r["case"]["kv_dtype"]) for r in found] == [
        ("copy", None, None),
        ("contiguous", None, None),
        *(("pages", page_size, kv_dtype) for page_size in (16, 3) for kv_dtype in ("same", "int4")),
    ]
    for r in found:
        assert r["status"] == "ok" and len(r["samples_ms"]) == 2 and r["gb_per_s"] > 0
    assert {r["config"]["backend"] for r in found[2:]} == {"xla"} and "config" not in found[0]
    assert found[0]["share_of_peak"] == 1 and found[1]["slowdown"] == 1
    # keys and values of 2 rows of 40 tokens, 2 heads of 16 float32
    assert found[1]["gb_per_s"] == pytest.approx(2 * 2 * 40 * 2 * 16 * 4 / found[1]["time_ms_p50"] / 1e6, rel=0.01)


def test_an_unsupported_call_is_a_row_with_a_reason():
    found = records(
        *("paged", "--batch", 1, "--context", 16, "--heads", 2, "--kv-heads", 1, "--head-dim", 8, "--samples", 1),
        *("--kv-dtype", "int8", "--implementation", "triton"),
    )
    assert [r["status"] for r in found] == ["ok", "unsupported", "unsupported"]
    assert "head_dim must be 16 to 256, got 8" in found[-1]["reason"]


def test_heads_that_do_not_divide_are_refused():
    done = CliRunner().invoke(cli.commands, ["paged", "--heads", "8", "--kv-heads", "3"])
    assert done.exit_code == 2 and "3 key heads do not divide 8 query heads" in done.stderr


def test_pages_waste_little_and_sharing_saves_much():
    found = {
        (r["case"]["sampling"], r["case"]["width"]): r
        for r in memory.measure(data_sets=("ShareGPT",), page_sizes=(16,), steps=60)
    }
    assert found["one", 1]["wasted_share"] < 0.04 and found["one", 1]["saved_share"] == 0
    assert 0.15 < found["parallel", 2]["saved_share"] < found["beams", 2]["saved_share"]
    assert found["beams", 4]["saved_share"] > found["beams", 2]["saved_share"]
    assert found["one", 1]["reserved_share"] < 0.3


def test_a_smaller_page_wastes_less():
    found = [
        next(iter(memory.measure(data_sets=("Alpaca",), page_sizes=(size,), steps=40)))["wasted_share"]
        for size in (1, 16, 64)
    ]
    assert found[0] == 0 < found[1] < found[2]


@pytest.mark.exhaustive
@pytest.mark.soak
def test_accuracy_compares_every_kind_of_page_with_floats(tmp_path):
    model = tiny_model.folder_with_text(LLAMA3, tmp_path / "model")
    text = tmp_path / "text"
    text.write_text("a text of some words, and some more words, and then the same words again " * 3)
    found = records(
        *("accuracy", "--model", model, "--kv-dtype", "int8,int4", "--text", text, "--tokens", 40, "--new-tokens", 4),
        *("--dtype", "float32"),
    )
    assert [r["implementation"] for r in found] == ["float", "int8", "int4"]
    floats, int8, int4 = found
    assert floats["perplexity_ratio"] == 1 and floats["greedy_same"] == "4/4 4/4 4/4"
    assert 0.9 < int8["perplexity_ratio"] < 1.1 and int4["perplexity"] > 1
    assert int4["bytes_ratio"] < int8["bytes_ratio"] < 0.5


def test_perplexity_agrees_with_the_logits_without_a_cache():
    model = jfa_models.from_pretrained(LLAMA3, dtype="float32", cache="paged", page_size=4)
    ids = [3, 17, 200, 5, 9, 44, 8]
    log_probs = jax.nn.log_softmax(model.logits(np.array([ids]))[0])
    surprise = -np.mean([log_probs[i, ids[i + 1]] for i in range(len(ids) - 1)])
    assert accuracy.perplexity(model, ids) == pytest.approx(math.exp(surprise), rel=1e-4)
    with pytest.raises(ValueError, match="at least two tokens, got 1"):
        accuracy.perplexity(model, ids[:1])
    assert isinstance(model.new_cache(batch=1, capacity=1), jfa.PagedKVCache)
