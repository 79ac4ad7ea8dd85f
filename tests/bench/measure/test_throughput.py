"""`jfa-bench throughput`: the trace, and the records."""

import itertools
import json
import math
import statistics
import sys

import pytest
from golden import GOLDEN
from tiny_model import counted_compilations, folder_with_text

from jfa_bench import cli, configs, names
from jfa_bench.measure import throughput
from jfa_models import LanguageModel, from_pretrained

ASKED = dict(num_prompts=400, input_len=512, output_len=1024, request_rate=math.inf, vocab_size=99, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_with_text(GOLDEN / "llama3", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def bench(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jfa-bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return run


def test_a_trace_is_determined_by_its_seed():
    assert throughput.trace(lengths="sharegpt", **ASKED) == throughput.trace(lengths="sharegpt", **ASKED)
    assert throughput.trace(lengths="sharegpt", **ASKED) != throughput.trace(lengths="sharegpt", **ASKED | dict(seed=4))


def test_lengths_have_the_named_distribution():
    lengths = {
        name: [(len(one.prompt), one.output_len) for one in throughput.trace(lengths=name, **ASKED)]
        for name in names.LENGTHS
    }
    assert set(lengths["fixed"]) == {(512, 1024)}
    prompts, answers = zip(*lengths["sharegpt"], strict=True)
    assert 130 < statistics.mean(prompts) < 175 and 280 < statistics.mean(answers) < 360
    prompts, answers = zip(*lengths["skewed"], strict=True)
    assert 8 <= min(prompts) and max(prompts) <= 512 and 55 < statistics.median(prompts) < 75
    assert 8 <= min(answers) and max(answers) <= 1024 and 80 < statistics.median(answers) < 105


def test_arrivals_are_a_poisson_process():
    arrivals = throughput.trace(lengths="fixed", **ASKED | dict(request_rate=50.0))
    gaps = [b.at - a.at for a, b in itertools.pairwise(arrivals)]
    assert arrivals[0].at == 0 and statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.15)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.2)


OPTIONS = ("--num-prompts", 6, "--input-len", 20, "--output-len", 12, "--max-num-seqs", 3, "-o", "json")


@pytest.mark.exhaustive
def test_records_of_all_implementations(bench, folder):
    everything = "engine,static,sequential"
    status, out, _ = bench("throughput", "--model", folder, *OPTIONS, "--implementation", everything)
    records = {one["implementation"]: one for one in json.loads(out)}
    assert status == 0 and set(records) == set(everything.split(","))
    engine = records["engine"]
    for one in records.values():
        assert one["status"] == "ok" and one["tokens_per_s"] > 0
        assert one["tokens_per_s"] * one["seconds"] == pytest.approx(engine["metrics"]["generated_tokens"])
    assert records["static"]["speedup"] == 1
    assert engine["ttft_ms"]["p50"] <= engine["e2e_ms"]["p50"] and engine["itl_ms"]["p99"] > 0
    assert 0 < engine["wasted_share"] < 1 and engine["reserved_share"] > 0 and engine["speedup"] > 0


@pytest.mark.exhaustive
def test_samples_share_pages_and_only_the_engine_supports_a_rate(bench, folder):
    options = ("--n", 3, "--request-rate", 500, "--max-concurrency", 2, "--implementation", "static,engine")
    status, out, _ = bench("throughput", "--model", folder, *OPTIONS, *options)
    static, engine = json.loads(out)
    assert status == 0 and static["status"] == "unsupported" and "single completions" in static["reason"]
    assert engine["saved_share"] > 0.05 and engine["case"]["n"] == 3


def test_a_preset_gets_random_weights(monkeypatch):
    made = []
    monkeypatch.setattr(LanguageModel, "random", lambda name, **options: made.append((name, options)))
    configs.load("llama-3-8b", "bfloat16", "int4")
    assert made == [("llama-3-8b", {"dtype": "bfloat16", "quantization": "int4", "mesh": None})]


def test_refuses(bench):
    status, _, err = bench("throughput", "--n", 2, "--beam-width", 2)
    assert (status, err) == (2, "jfa-bench: --n and --beam-width cannot be combined\n")


def test_static_batches_compile_before_they_are_timed(monkeypatch):
    model = from_pretrained(GOLDEN / "llama3", dtype="float32")
    arrivals = [throughput.Arrival(at=0.0, prompt=(3, 4, 5 + i), output_len=4) for i in range(2)]
    with counted_compilations() as compilations:
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: float(len(compilations)))
        figures = throughput._batches(model, arrivals, 2)
    assert compilations and figures["seconds"] == 0
