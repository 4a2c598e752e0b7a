"""A run killed at any moment goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_methods import Countdown, Killed, kill_at, run_toy, same_bits

from compressor.errors import InterruptedRunError, RequestError


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to the disk guards against power cuts, not against kills, and takes most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The uninterrupted run: its result, history and number of events."""
    counter = Countdown(-1, Killed)
    toy, engine = run_toy(tmp_path_factory.mktemp("whole"), counter)
    return {"result": toy.result(), "history": engine.history, "events": counter.seen}


def test_run_gives_the_same_bits_when_repeated(tmp_path: Path, whole: dict[str, Any]) -> None:
    toy, engine = run_toy(tmp_path)
    assert same_bits(toy.result(), whole["result"])
    assert engine.history == whole["history"]


@pytest.mark.parametrize("checkpoint_steps", [1, 2, None])
def test_run_goes_on_to_the_same_bits_when_killed_at_any_event(
    tmp_path: Path, whole: dict[str, Any], checkpoint_steps: int | None
) -> None:
    assert whole["events"] > 30
    for event in range(whole["events"]):
        directory = tmp_path / str(event)
        with pytest.raises(Killed):
            run_toy(directory, kill_at(event), checkpoint_steps=checkpoint_steps)
        toy, engine = run_toy(directory, checkpoint_steps=checkpoint_steps)
        assert same_bits(toy.result(), whole["result"]), f"killed at event {event}"
        assert engine.history == whole["history"], f"killed at event {event}"


@pytest.mark.parametrize("threads", [1, 3])
def test_run_gives_the_same_bits_when_threads_make_its_batches(
    tmp_path: Path, whole: dict[str, Any], threads: int
) -> None:
    with pytest.raises(Killed):
        run_toy(tmp_path, kill_at(9), loader_threads=threads)
    toy, _ = run_toy(tmp_path, loader_threads=threads)
    assert same_bits(toy.result(), whole["result"])


def test_replay_loads_what_was_trained_and_refuses_to_train(tmp_path: Path, whole: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="phase '0-toy/adversarial' would have to be trained anew"):
        run_toy(tmp_path, replay=True)
    assert not list(tmp_path.rglob("finished"))
    run_toy(tmp_path)
    toy, engine = run_toy(tmp_path, replay=True)
    assert same_bits(toy.result(), whole["result"]) and engine.history == whole["history"]


def test_run_goes_on_to_the_same_bits_when_killed_again_and_again(tmp_path: Path, whole: dict[str, Any]) -> None:
    kills = 0
    while True:
        try:
            toy, engine = run_toy(tmp_path, kill_at(4), checkpoint_steps=1)
            break
        except Killed:
            kills += 1
    assert kills > 5
    assert same_bits(toy.result(), whole["result"])
    assert engine.history == whole["history"]
    assert json.loads((tmp_path / "history.json").read_text()) == json.loads(json.dumps(whole["history"]))


def test_run_does_nothing_again_when_it_was_done(tmp_path: Path, whole: dict[str, Any]) -> None:
    run_toy(tmp_path)
    toy, engine = run_toy(tmp_path, kill_at(0))  # the first event would kill
    assert same_bits(toy.result(), whole["result"])
    assert engine.history == whole["history"]


def test_run_keeps_no_checkpoints_nor_optimizers_when_it_is_done(tmp_path: Path) -> None:
    run_toy(tmp_path)
    left = {path.name for path in tmp_path.rglob("*") if path.is_dir()}
    assert not any(name.startswith(("step-", ".", "optimizers")) for name in left)


@pytest.mark.parametrize("event", [6, 20])
def test_run_goes_on_to_the_same_bits_when_its_process_is_killed(
    tmp_path: Path, whole: dict[str, Any], event: int
) -> None:
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import toy_methods as t\n"
        "t.run_toy(Path(sys.argv[2]), t.Countdown(int(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL)))"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path), str(event)]
    assert subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
    (tmp_path / "0-toy" / "01-adversarial" / ".step-00000009.x.tmp").mkdir(parents=True)  # a half-written checkpoint
    toy, engine = run_toy(tmp_path)
    assert same_bits(toy.result(), whole["result"])
    assert engine.history == whole["history"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_saves_at_the_end_of_the_step_when_interrupted(
    tmp_path: Path, whole: dict[str, Any], number: signal.Signals
) -> None:
    handler = signal.getsignal(number)
    with pytest.raises(InterruptedRunError, match=r"saved at step 1 of phase '0-toy/together'; run the same command"):
        run_toy(tmp_path, Countdown(15, lambda: signal.raise_signal(number)), checkpoint_steps=None)
    assert signal.getsignal(number) is handler
    assert InterruptedRunError.exit_code == 130
    toy, _ = run_toy(tmp_path)
    assert same_bits(toy.result(), whole["result"])


def test_run_stops_at_once_when_interrupted_twice(tmp_path: Path, whole: dict[str, Any]) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRunError, match="stopped in phase '0-toy/together'"):
        run_toy(tmp_path, Countdown(15, twice))
    assert same_bits(run_toy(tmp_path)[0].result(), whole["result"])


def test_run_stops_at_once_when_interrupted_in_a_compute_phase(tmp_path: Path, whole: dict[str, Any]) -> None:
    with pytest.raises(InterruptedRunError, match="stopped in phase '0-toy/probe'"):
        run_toy(tmp_path, Countdown(0, lambda: signal.raise_signal(signal.SIGTERM)))
    assert same_bits(run_toy(tmp_path)[0].result(), whole["result"])


def test_phase_and_all_later_ones_are_done_again_when_the_fingerprint_changes(tmp_path: Path) -> None:
    run_toy(tmp_path)
    events: list[dict[str, Any]] = []
    run_toy(tmp_path, fingerprint="another", log=events.append)
    assert [event["phase"] for event in events if event["event"] == "phase-stale"] == [
        f"0-toy/{name}" for name in ("probe", "adversarial", "together", "features", "refine")
    ]
    assert not any(event["event"] == "phase-loaded" for event in events)


def test_checkpoint_of_another_configuration_is_not_used(tmp_path: Path, whole: dict[str, Any]) -> None:
    with pytest.raises(Killed):
        run_toy(tmp_path, kill_at(10), checkpoint_steps=1, dropout=0.0, fingerprint="other")
    toy, _ = run_toy(tmp_path)
    assert same_bits(toy.result(), whole["result"])


def test_result_of_a_compute_phase_is_the_same_when_fresh_and_when_loaded(tmp_path: Path) -> None:
    from compressor.training.distributed import Distributed
    from compressor.training.engine import Engine
    from compressor.training.phase import Compute, Phases
    from compressor.training.random import Randomness

    seen = []

    def phases() -> Phases:
        seen.append(
            (yield Compute("one", lambda: {"a": torch.arange(6.0).reshape(2, 3).T, "b": 3, "c": torch.ones(2).half()}))
        )

    for _ in range(2):
        engine = Engine(tmp_path, distributed=Distributed.single(), randomness=Randomness(0), fingerprint="")
        engine.run(phases())
    fresh, loaded = seen
    assert same_bits(fresh, loaded)
    for result in seen:
        assert result["a"].is_contiguous()
        assert [result[key].dtype for key in "abc"] == [torch.float32, torch.int64, torch.float16]
