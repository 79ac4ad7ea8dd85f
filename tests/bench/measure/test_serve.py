"""`jfa-bench serve`: the trace, a scripted server, and an engine."""

import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from golden import GOLDEN
from scripted_server import complete, event, part, scripted_server, usage
from tiny_model import folder_with_text

from jfa_bench import cli
from jfa_bench.measure import serve
from jfa_bench.records import record, tables
from jfa_models import SamplingParams

ROOT = Path(__file__).parents[3]
RANDOM = dict(num_prompts=50, input_len=20, output_len=10, range_ratio=0.0, alphabet=range(100, 200), seed=3)


def test_a_trace_is_determined_by_seed_and_rate():
    def trace(**changes):
        return serve.random_requests(**RANDOM | {"request_rate": 1.0} | changes)

    assert trace() == trace() != trace(seed=4)
    spread = trace(range_ratio=0.5)
    assert {(one.input_len, one.output_len) for one in trace()} == {(20, 10)}
    assert {len(one.prompt) for one in spread} <= set(range(10, 31)) and len({one.output_len for one in spread}) > 5
    other = trace(range_ratio=0.5, request_rate=2.0)
    assert [one.input_len for one in other] == [one.input_len for one in spread]
    assert all(a.prompt[:4] != b.prompt[:4] for a, b in zip(spread, other, strict=True)), "its prefixes are not known"
    assert trace(alphabet=("a",), num_prompts=1)[0].prompt == " ".join(["a"] * 20)


def test_arrivals():
    def times(**changes):
        return serve.arrival_times(1000, **{"request_rate": 50.0, "burstiness": 1.0, "seed": 3} | changes)

    assert times() == times() != times(seed=4)
    assert times(request_rate=math.inf) == [0.0] * 1000
    assert times(request_rate=25.0) == pytest.approx([2 * one for one in times()])
    for burstiness, deviation in ((0.25, 2.0), (1.0, 1.0), (4.0, 0.5), (math.inf, 0.0)):
        found = times(burstiness=burstiness)
        gaps = [b - a for a, b in itertools.pairwise(found)]
        assert found[-1] == pytest.approx(20) and statistics.stdev(gaps) * 50 == pytest.approx(deviation, abs=0.2)


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "a", "task": "t"}\n{"prompt": "b", "output_tokens": 4}\n')
    found = serve.dataset_requests(file, num_prompts=5, output_len=9, seed=0)
    assert sorted(one.prompt for one in found[:2]) == ["a", "b"] and found[:2] == found[2:4]
    assert {(one.prompt, one.output_len) for one in found} == {("a", 9), ("b", 4)}
    for line in ('{"text": "a"}', "[]", "x", '{"prompt": ""}'):
        file.write_text(line)
        with pytest.raises(ValueError, match=r"x\.jsonl:1: not a JSON object with a text as prompt"):
            serve.dataset_requests(file, num_prompts=1, output_len=9, seed=0)


@pytest.fixture(scope="module")
def served():
    with scripted_server() as scripted:
        yield scripted


@pytest.fixture
def bench(monkeypatch, capsys, served):
    served.reset()

    def run(*arguments, small=True):
        few = ("--num-prompts", 4, "--random-input-len", 6, "--random-output-len", 3) if small else ()
        at = () if "--base-url" in arguments or "--offline" in arguments else ("--base-url", served.url)
        monkeypatch.setattr(sys, "argv", ["jfa-bench", "serve", *map(str, (*few, *at, *arguments))])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return run


def records(bench, *arguments):
    status, out, err = bench(*arguments, "-o", "json")
    assert status == 0, err
    return json.loads(out)


def test_a_record_for_each_rate(bench, served):
    limits = ("--max-concurrency", 2, "--goodput", "ttft:60000", "e2el:60000", "--metadata", "a=b", "c=d e")
    slow, fast = records(bench, "--request-rate", "200,inf", *limits)
    assert (slow["case"]["request_rate"], fast["case"]["request_rate"]) == (200, "inf")
    for one in (slow, fast):
        assert one["status"] == "ok" and one["notes"] == [] and one["metadata"] == {"a": "b", "c": "d e"}
        assert (one["completed"], one["total_input_tokens"], one["total_output_tokens"]) == (4, 24, 12)
        assert one["request_goodput"] == one["request_throughput"] and one["max_concurrent_requests"] <= 2
        assert 0 < one["mean_ttft_ms"] <= one["mean_e2el_ms"]
    first = served.asked[0]
    assert first["model"] == "first" and first["ignore_eos"] and first["stream_options"] == {"include_usage": True}
    assert set(itertools.chain(*(one["prompt"] for one in served.asked))) <= {5, 6, 7}
    prompts = [tuple(one["prompt"]) for one in served.asked[1:5]]
    records(bench, "--request-rate", "200")
    assert sorted(prompts) == sorted(tuple(one["prompt"]) for one in served.asked[-4:])


def test_the_block_is_that_of_vllm(bench):
    status, out, _ = bench(
        "--metric-percentiles", "90,99.9", "--percentile-metrics", "ttft,tpot", "--max-concurrency", 2
    )
    block, table = out.split("=" * 50 + "\n")
    lines = block.splitlines()
    assert status == 0 and "| what   | rate |" in table
    assert lines[:3] == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     4",
        "Failed requests:                         0",
    ]
    labels = [line.partition(":")[0] for line in lines if ":" in line]
    assert labels[2:8] == [
        "Maximum request concurrency",
        "Request rate configured (RPS)",
        "Benchmark duration (s)",
        "Total input tokens",
        "Total generated tokens",
        "Request throughput (req/s)",
    ]
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert labels[-4:] == ["Mean TPOT (ms)", "Median TPOT (ms)", "P90 TPOT (ms)", "P99.9 TPOT (ms)"]
    assert max(map(len, out.splitlines())) <= 80


def test_failures_are_counted_by_their_causes(bench, served):
    kinds = itertools.cycle(
        [
            lambda body: (500, {"error": {"message": "out of memory"}}),
            lambda body: (200, [part("a")]),
            lambda body: (200, [part("a"), event({"error": {"message": "broken"}})]),
            complete,
        ]
    )
    served.answer = lambda body: complete(body) if len(served.asked) == 1 else next(kinds)(body)
    [one] = records(bench, "--max-concurrency", 1)
    assert (one["completed"], one["failed"], one["status"]) == (1, 3, "ok")
    assert one["notes"] == [
        "1 failed: HTTP 500: out of memory",
        "1 failed: the stream ended without finish_reason",
        "1 failed: error in the stream: broken",
    ]
    served.reset()
    served.answer = lambda body: complete(body) if len(served.asked) == 1 else (503, {"detail": "full"})
    [one] = records(bench)
    assert one["status"] == "failed" and "all failed, the first one: HTTP 503" in one["reason"]
    assert tables.VIEWS["serve"].table([one])


def test_refused_requests_are_sent_again_only_if_asked(bench, served):
    served.headers = {"retry-after": "0"}
    served.answer = lambda body: (429, {}) if len(served.asked) in (2, 3) else complete(body)
    [one] = records(bench)
    assert (one["completed"], one["rejected"], one["failed"], one["retries"]) == (2, 2, 0, 0)
    served.asked.clear()
    [one] = records(bench, "--retry-429")
    assert (one["completed"], one["rejected"], one["retries"]) == (4, 0, 2)


def test_other_lengths_than_asked_for_are_said(bench, served):
    served.answer = lambda body: (200, [part("a", "stop", usage=usage(7, 2))])
    [one] = records(bench)
    assert one["notes"] == [
        "4 of 4 prompts have other lengths than asked for: 7.0 tokens on average instead of 6.0",
        "4 of 4 answers have other lengths than asked for: 2.0 tokens on average instead of 3.0",
    ]
    [one] = records(bench, "--no-ignore-eos")
    assert len(one["notes"]) == 1 and "ignore_eos" not in served.asked[-1]
    served.answer = lambda body: (200, [part("a"), part("a"), part("a", "stop")])
    [one] = records(bench)
    assert one["notes"] == ["4 answers without usage: the parts of their streams are counted as tokens"]
    assert one["total_output_tokens"] == 12


def test_prompts_are_ids_if_the_server_takes_them_else_words(bench, served, tmp_path):
    served.ids = None
    records(bench)
    assert all(one in serve.PLAIN_IDS for one in served.asked[-1]["prompt"])
    served.answer = lambda body: complete(body) if isinstance(body["prompt"], str) else (400, {})
    records(bench)
    assert set(served.asked[-1]["prompt"].split()) <= set(serve.WORDS)
    served.answer = lambda body: (200, [event({"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]})])
    records(bench, "--endpoint", "/v1/chat/completions", "--model", "second")
    [message] = served.asked[-1]["messages"]
    assert message["role"] == "user" and len(message["content"].split()) == 6
    assert served.asked[-1]["max_completion_tokens"] == 3 and served.asked[-1]["model"] == "second"


def test_what_the_user_can_fix_is_one_line(bench, served, tmp_path):
    def refused(*arguments):
        status, out, err = bench(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        return err

    assert "has no model 'third'; it has first, second" in refused("--model", "third")
    assert "no server answers at http://127.0.0.1:1" in refused("--base-url", "http://127.0.0.1:1")
    served.key = "secret"
    assert "/v1/models: HTTP 401: send a valid key" in refused()
    (tmp_path / "key").write_text("secret\n")
    assert bench("--api-key-file", tmp_path / "key")[0] == 0
    assert bench("--header", "authorization=Bearer secret")[0] == 0
    served.reset()
    served.answer = lambda body: (400, {"error": {"message": "no"}})
    assert "/v1/completions: HTTP 400: no" in refused()
    for arguments, message in (
        (("--max-num-seqs", 4), "--max-num-seqs belongs to the engine of --offline"),
        (("--offline", "--base-url", "http://x"), "--base-url belongs to a server"),
        (("--offline", "--endpoint", "/v1/chat/completions"), "there is no chat without a server"),
        (("--goodput", "itl:3"), "must be of ttft, tpot or e2el, got 'itl'"),
        (("--request-rate", "1,0"), "'1,0' is not a list of rates above 0"),
        (("--metric-percentiles", "101"), "'101' is not a list of percentiles"),
    ):
        assert message in refused(*arguments)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class TwoTokens:
    """An engine whose steps take a second and give each of its requests a token; each has two."""

    def __init__(self, clock):
        self.clock, self.requests = clock, []

    def add_request(self, prompt, params, *, on_output):
        if len(prompt) > 9:
            raise ValueError("prompt is too long")
        self.requests.append([prompt, on_output, 0])

    @property
    def has_unfinished(self):
        return bool(self.requests)

    def step(self):
        self.clock.now += 1.0
        for one in self.requests:
            one[2] += 1
            outputs = [SimpleNamespace(token_ids=[0] * one[2])]
            one[1](SimpleNamespace(prompt_token_ids=one[0], outputs=outputs, error=None))
        finished = [one for one in self.requests if one[2] == 2]
        self.requests = [one for one in self.requests if one[2] < 2]
        return finished


@pytest.mark.parametrize(
    ("most", "sent", "times"),
    [(None, [0.0, 0.5], [(1.0, 2.0), (2.0, 3.0)]), (1, [0.0, 2.0], [(1.0, 2.0), (3.0, 4.0)])],
)
def test_a_request_to_an_engine_counts_from_its_arrival(most, sent, times):
    clock = Clock()
    asked = [serve.Asked((1, 2), 2, 2)] * 2
    answers, seconds = serve.run_engine(
        TwoTokens(clock), asked, [0.0, 0.5], params=SamplingParams(), max_concurrency=most, clock=clock
    )
    assert [one.sent - 100 for one in answers] == sent and seconds == times[-1][-1]
    assert [tuple(time - 100 for time in one.times) for one in answers] == times
    assert {(one.input_tokens, one.output_tokens, one.error) for one in answers} == {(2, 2, None)}


def test_an_engine_may_refuse_a_request():
    clock = Clock()
    asked = [serve.Asked((1,) * 10, 10, 2), serve.Asked((1,), 1, 2)]
    answers, _ = serve.run_engine(
        TwoTokens(clock), asked, [0.0, 0.0], params=SamplingParams(), max_concurrency=1, clock=clock
    )
    assert [one.error for one in answers] == ["prompt is too long", None]


@pytest.mark.exhaustive
def test_the_same_trace_in_an_engine(bench, tmp_path):
    folder = folder_with_text(GOLDEN / "llama3", tmp_path / "tiny")
    [one] = records(bench, "--offline", "--model", folder, "--max-num-seqs", 2, "--request-rate", "50")
    assert one["implementation"] == "engine" and one["notes"] == [] and one["case"]["max_num_seqs"] == 2
    assert (one["completed"], one["total_input_tokens"], one["total_output_tokens"]) == (4, 24, 12)


def test_the_block_and_the_table_of_the_guide_are_the_record():
    rows = record.load(ROOT / "bench/results/serve-cpu-epyc-avx512.json")
    guide = (ROOT / "docs/benchmarks.md").read_text()
    [at_two] = [one for one in rows if (one["implementation"], one["case"]["request_rate"]) == ("server", 2)]
    assert tables.serving_block(at_two) in guide
    assert record.render(rows, "md", tables.VIEWS["serve"].columns) in guide
