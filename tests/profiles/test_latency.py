"""Latency: interleaved rounds, statistics, ratios."""

import gc
import time

import numpy as np
import pytest

from compressor.errors import RequestError
from compressor.profiles.latency import Latency, WarmUp, measure_interleaved, ratio, summarise, timed

QUICK = WarmUp(window=2, max_seconds=0.05)


def sleeper(seconds: float):
    return lambda: time.sleep(seconds)


def test_measuring_tells_a_slow_candidate_from_a_fast_one_by_their_ratio():
    found = measure_interleaved(
        {"slow": sleeper(0.006), "fast": sleeper(0.002)}, rounds=6, budget_seconds=0.4, warmup=QUICK
    )
    assert 2.0 <= found["fast"].min <= found["fast"].p50 < found["slow"].p50
    result = ratio(found["slow"], found["fast"])
    assert 1.5 < result.value < 4.5 and result.low <= result.value <= result.high


def test_rounds_rotate_the_order_so_that_no_candidate_is_always_first():
    calls: list[str] = []
    candidates = {name: (lambda name=name: calls.append(name) or time.sleep(0.002)) for name in "abc"}
    measure_interleaved(candidates, rounds=3, budget_seconds=0.001, warmup=WarmUp(window=1, max_seconds=0, min_calls=1))
    assert calls[:3] == ["a", "b", "c"]
    assert calls[3:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_measuring_stops_after_three_rounds_when_the_budget_is_spent():
    found = measure_interleaved({"a": sleeper(0.01)}, rounds=100, budget_seconds=0.01, warmup=QUICK)
    assert len(found["a"].round_medians_ms) == 3


def test_garbage_collection_is_off_while_measuring_and_on_again_when_a_candidate_fails():
    seen: list[bool] = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise OSError("device lost")

    with pytest.raises(OSError, match="device lost"):
        measure_interleaved({"a": fail}, warmup=QUICK)
    assert seen == [False] and gc.isenabled()


def test_warm_up_lasts_until_two_windows_agree():
    durations = iter([0.02] * 4 + [0.004] * 1000)
    found = measure_interleaved(
        {"a": lambda: time.sleep(next(durations))}, rounds=3, budget_seconds=0.03, warmup=WarmUp(4, 0.3, 2, 5.0)
    )
    assert found["a"].warmup >= 12
    assert found["a"].p50 < 10


def test_samples_are_thinned_to_400_but_statistics_use_all():
    rounds = np.arange(1.0, 2001.0).reshape(20, 100).tolist()
    latency = summarise(rounds, warmup=7)
    assert len(latency.samples_ms) == 400 and latency.count == 2000 and latency.warmup == 7
    assert (latency.min, latency.samples_ms[0], latency.samples_ms[-1]) == (1.0, 1.0, 2000.0)
    assert latency.p50 == 1000.5 and latency.p99 == pytest.approx(1980.01) and latency.mean == 1000.5


def test_latency_is_noisy_when_the_rounds_disagree_and_not_when_single_calls_do():
    steady = summarise([[1.0, 1.0, 1.0, 9.0]] * 10)
    drifting = summarise([[1.0 + 0.1 * number] * 4 for number in range(10)])
    assert not steady.noisy and steady.reason == ""
    assert drifting.noisy and "10 rounds spread by" in drifting.reason


def test_ratio_is_not_fooled_by_a_machine_that_drifts():
    drift = [1.0 + 0.3 * number for number in range(10)]
    slow, fast = summarise([[2 * d] * 3 for d in drift]), summarise([[d] * 3 for d in drift])
    assert ratio(slow, fast) == pytest.approx((2.0, 2.0, 2.0))


def test_ratio_refuses_latencies_that_were_not_measured_together():
    with pytest.raises(RequestError, match="measure both in one call"):
        ratio(summarise([[1.0]] * 3), summarise([[1.0]] * 4))


def test_throughput_counts_the_items_of_a_batch():
    assert summarise([[4.0]] * 3).throughput(8) == 2000.0


def test_latency_survives_json():
    latency = summarise([[1.25, 1.5], [1.125, 2.0]])
    assert Latency.model_validate_json(latency.model_dump_json()) == latency


@pytest.mark.parametrize(
    "arguments",
    [{"candidates": {}}, {"candidates": {"a": int}, "rounds": 2}, {"candidates": {"a": int}, "budget_seconds": 0}],
)
def test_measuring_refuses_what_cannot_be_measured(arguments):
    with pytest.raises(RequestError, match="measuring needs"):
        measure_interleaved(**arguments)


def test_timed_returns_the_result_and_the_milliseconds():
    value, milliseconds = timed(lambda: time.sleep(0.01) or "engine")
    assert value == "engine" and 10 <= milliseconds < 100
