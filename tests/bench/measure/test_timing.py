"""Warm-up, interleaving, statistics and rotation of inputs, on a simulated clock."""

import dataclasses
import types

import pytest

from jfa_bench import names
from jfa_bench.measure import timing


@dataclasses.dataclass
class Clock:
    """A simulated clock in seconds, which the runs advance."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, milliseconds):
        """A run that takes the next of these times at each call, and the last one after that."""
        left = list(milliseconds)

        def call():
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1e3

        return call


@pytest.mark.parametrize(
    ("milliseconds", "calls"),
    [
        ([5, 5], 2),
        ([900, 80, 40, 20, 10, 10.5, 10], 6),  # the first within a tenth of the one before
        ([10, 5] * 9, names.WARM_UP_CALLS),  # never stable
        ([3000, 1500, 1500], 1),  # too slow to wait for
    ],
)
def test_a_run_is_warm_when_two_calls_take_the_same_time(milliseconds, calls):
    clock = Clock()
    assert timing.warm_up(clock.run(milliseconds), clock=clock) == calls


def test_runs_are_interleaved_and_warm_up_is_not_counted():
    clock, order = Clock(), []

    def named(name, run):
        return lambda: (order.append(name), run())[1]

    runs = {"slow": named("slow", clock.run([90, 20, 20, 30])), "fast": named("fast", clock.run([5, 5, 5, 7]))}
    taken = timing.in_turns(runs, samples=3, clock=clock)
    assert taken == {"slow": pytest.approx([30, 30, 30]), "fast": pytest.approx([5, 7, 7])}
    assert order[-6:] == ["slow", "fast"] * 3


def test_summary_has_the_median_and_percentiles():
    found = timing.summary([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (found["time_ms_p20"], found["time_ms_p50"], found["time_ms_p80"]) == (2.0, 3.5, 5.0)
    assert found["samples_ms"] == [5.0, 1.0, 2.0, 4.0, 3.0, 100.0]


def test_rate_has_a_median_mean_and_deviation():
    found = timing.rate(10, [1.0, 2.0, 4.0])
    assert found["tokens_per_s"] == pytest.approx(5000)
    assert found["tokens_per_s_mean"] == pytest.approx((10000 + 5000 + 2500) / 3)
    assert found["tokens_per_s_deviation"] == pytest.approx(3818.8, rel=1e-4)
    assert timing.rate(10, [2.0])["tokens_per_s_deviation"] == 0


def test_rotated_inputs_exceed_every_cache():
    assert timing.copies_past_cache(timing.CACHE_BYTES) == 1
    for num_bytes in (2**23, 10**7, timing.CACHE_BYTES - 1):
        copies = timing.copies_past_cache(num_bytes)
        assert copies * num_bytes > timing.CACHE_BYTES and copies > 1
    assert timing.copies_past_cache(8) == timing.MOST_COPIES
    run = timing.rotating(lambda a, b: (a, b), [(1, 2), (3, 4)])
    assert [run(), run(), run()] == [(1, 2), (3, 4), (1, 2)]


def test_a_device_is_busy_while_any_stream_is():
    def plane(name, **lines):
        events = {
            line: [types.SimpleNamespace(start_ns=start, duration_ns=end - start) for start, end in spans]
            for line, spans in lines.items()
        }
        return types.SimpleNamespace(
            name=name, lines=[types.SimpleNamespace(name=line, events=found) for line, found in events.items()]
        )

    streams = {"Stream #1": [(0, 2e6), (5e6, 6e6)], "Stream #2": [(1e6, 3e6)], "XLA Ops": [(0, 9e6)]}
    planes = [plane("/device:GPU:0", **streams), plane("/host:CPU", **{"Stream": [(0, 5e7)]})]
    assert timing.busy_ms(planes) == pytest.approx(4.0)
    assert timing.busy_ms(planes[1:]) == 0


def test_a_run_settles_before_each_sample():
    clock = Clock()
    runs = {"slow at first": clock.run([9, 9, 30, 20, 10, 30, 20, 10]), "steady": clock.run([5])}
    taken = timing.in_turns(runs, samples=2, settle=0.045, clock=clock)
    assert taken == {"slow at first": [pytest.approx(10)] * 2, "steady": [pytest.approx(5)] * 2}


def test_a_run_may_time_itself():
    clock = Clock()
    taken = timing.in_turns({"elsewhere": lambda: timing.Took(7.0)}, samples=2, clock=clock)
    assert taken == {"elsewhere": [7.0, 7.0]}
