"""The figures of a run are functions of time stamps, with vLLM's definitions."""

import pytest

from jfa_bench.measure.latencies import Answer, figures


def answer(sent, times, **fields):
    fields = {"end": times[-1], "input_tokens": 3, "output_tokens": len(times)} | fields
    return Answer(sent=sent, times=list(times), **fields)


TWO = [answer(0.0, (0.5, 0.75, 1.5)), answer(1.0, (1.25, 1.5), end=2.25, output_tokens=4)]


def test_definitions():
    found = figures(TWO, seconds=2.0, percentiles=(50, 99))
    assert {name: found[name] for name in ("completed", "failed", "rejected")} == dict(
        completed=2, failed=0, rejected=0
    )
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (6, 7)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (1, 3.5, 6.5)
    assert found["mean_ttft_ms"] == found["median_ttft_ms"] == found["p50_ttft_ms"] == 375
    assert found["std_ttft_ms"] == 125 and found["p99_ttft_ms"] == pytest.approx(250 + 0.99 * 250)
    # (1.5 - 0.5) / 2 later tokens, and (2.25 - 1.25) / 3: of two parts, but four tokens, until the end
    assert found["mean_tpot_ms"] == pytest.approx((500 + 1000 / 3) / 2)
    assert found["mean_itl_ms"] == pytest.approx((250 + 750 + 250) / 3)
    assert found["mean_e2el_ms"] == 1375
    assert found["request_goodput"] is None


def test_peaks_are_those_of_a_second_and_of_an_instant():
    found = figures(TWO, seconds=2.0)
    assert found["max_output_tokens_per_s"] == 3, "from 1 s to 2 s: one of the first answer, two of the other"
    assert found["max_concurrent_requests"] == 2
    one_after_the_other = [answer(0.0, (1.0,)), answer(1.0, (2.0,))]
    assert figures(one_after_the_other, seconds=2.0)["max_concurrent_requests"] == 1


@pytest.mark.parametrize(
    ("goodput", "good"),
    [
        ({"ttft": 500}, 2),
        ({"ttft": 499}, 1),
        ({"tpot": 400}, 1),
        ({"ttft": 499, "tpot": 499}, 1),
        ({"ttft": 499, "e2el": 1249}, 0),
    ],
)
def test_a_good_answer_keeps_all_limits(goodput, good):
    assert figures(TWO, seconds=4.0, goodput=goodput)["request_goodput"] == good / 4


def test_an_answer_of_one_token_has_no_tpot_and_keeps_any_limit():
    found = figures([answer(0.0, (1.0,))], seconds=1.0, goodput={"tpot": 1})
    assert found["mean_tpot_ms"] is None and found["mean_itl_ms"] is None
    assert found["request_goodput"] == 1


def test_failures_are_in_no_latency_and_refusals_in_no_failure():
    failed = answer(0.0, (9.0,), error="HTTP 500")
    refused = Answer(sent=0.0, error="HTTP 429", is_refused=True, num_retries=2)
    found = figures([TWO[0], failed, refused], seconds=2.0)
    assert (found["completed"], found["failed"], found["rejected"], found["retries"]) == (1, 1, 1, 2)
    assert found["mean_ttft_ms"] == 500 and found["total_output_tokens"] == 3
    assert figures([failed], seconds=1.0)["mean_ttft_ms"] is None


def test_without_usage_the_parts_are_the_tokens():
    assert figures([answer(0.0, (1.0, 2.0, 3.0), output_tokens=None)], seconds=1.0)["total_output_tokens"] == 3
