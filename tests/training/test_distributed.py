"""Two processes do what one does with the whole batch, and decide everything together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_methods import run_toy

from compressor.errors import RequestError
from compressor.training.distributed import Distributed


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("launched")
    # What `accelerate launch` itself calls for several processes; on CPUs it would want MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("two_processes.py")), str(directory)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.fixture(scope="module")
def found(launched: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((launched / "found.json").read_text())
    assert loaded["processes"] == 2 and loaded["device"] == "cpu"
    return loaded


def test_two_processes_learn_what_one_learns_with_the_whole_batch(
    launched: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    toy, engine = run_toy(tmp_path, batch=8, dropout=0.0)
    together = load_file(launched / "result.safetensors")
    assert found["equal_on_all"]
    for name, value in toy.result().items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-6, msg=name)
    for phase, curves in engine.history.items():
        for loss, points in curves.items():
            assert [tuple(point) for point in found["history"][phase][loss]] == [
                (step, pytest.approx(value, abs=1e-5)) for step, value in points
            ]


def test_collectives_join_what_the_processes_have(found: dict[str, Any]) -> None:
    assert found["collectives"] == {
        "mean": [1.0, 1.0],
        "sum": 3,
        "half": [1.5],
        "gather": [0, 10, 11],
        "gather_flags": [False, True],
        "gather_scalar": [0.0, 1.0],
        "broadcast": {"rank": 0},
        "shard": list(range(7)),
        "all": [True, False],
    }


def test_failure_of_the_main_process_is_raised_on_all(found: dict[str, Any]) -> None:
    assert found["failure"]


def test_all_skip_an_update_when_one_process_is_not_finite(found: dict[str, Any]) -> None:
    assert found["guard"] == {"answers": [True, False, True], "equal": True, "weight": 0.5}
    assert found["diverged"]


def test_gradient_of_one_process_alone_is_averaged_with_zeros(found: dict[str, Any]) -> None:
    assert found["partial"] == -2.0


def test_running_statistics_stay_equal_on_all_processes(found: dict[str, Any]) -> None:
    assert found["norms"]


def test_different_starting_weights_are_refused(found: dict[str, Any]) -> None:
    assert "True" in found["start"]


def test_two_processes_go_on_to_the_same_bits_when_killed_or_interrupted(found: dict[str, Any]) -> None:
    assert found["resumed"] == [True] * 4


def test_sharded_modules_learn_the_same_without_a_leak(found: dict[str, Any]) -> None:
    assert found["sharded"]["difference"] < 1e-6 and not found["sharded"]["leak"]


def test_process_alone_reduces_gathers_and_shards_trivially() -> None:
    alone = Distributed.single()
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.equal(alone.reduce(x), x) and not alone.reduce(x).requires_grad
    assert torch.equal(alone.gather(x), x) and alone.gather(torch.tensor(1.0)).shape == (1,)
    assert alone.reduce(torch.tensor([1, 2])).dtype == torch.float32
    assert list(alone.shard(5)) == [0, 1, 2, 3, 4] and alone.broadcast_object("x") == "x" and alone.is_main
    layer = nn.Linear(2, 2)
    alone.reduce_gradients(layer.parameters())
    assert layer.weight.grad is None
    with pytest.raises(RequestError, match="'mean' or 'sum'"):
        alone.reduce(x, "max")  # type: ignore[arg-type]


def test_shards_cover_everything_once_and_evenly() -> None:
    for n in (0, 1, 7, 64):
        parts = []
        for rank in range(3):
            process = Distributed.single()
            process.rank, process.processes = rank, 3
            parts.append(process.shard(n))
        assert [k for part in parts for k in part] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
