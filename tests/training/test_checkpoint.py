"""States on disk: exact, whole or absent, and never quietly ignored when damaged."""

from __future__ import annotations

import math
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_methods import Killed, kill_at, run_toy, same_bits

from compressor.errors import CheckpointError
from compressor.training.checkpoint import describe, load, pack, save, unpack
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.phase import Optim, Phases, Train, Update
from compressor.training.random import Randomness

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {
        "tensors": {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES},
        "shapes": [torch.tensor(1.5), torch.empty(0, 3), torch.arange(12.0).reshape(3, 4).T],
        "numbers": [1, 2**70, -0.1, 1e-300, math.inf, -math.inf, math.nan, True, None, "text ü"],
        "keys": {0: "int", 1: torch.ones(1), (1, 2): "tuple", "$tensor": "like a mark", None: {}},
        "nested": ({"a": [(), [], {}]}, np.arange(3, dtype=np.int16)),
    }
    save(tmp_path / "state", value, {"step": 3})
    assert equal(value, load(tmp_path / "state"))
    assert describe(tmp_path / "state") == {"step": 3}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(json_values)
def test_json_values_come_back_as_they_were(value: Any) -> None:
    assert equal(value, unpack(*pack(value)))


def test_shared_tensors_are_stored_once_and_views_are_stored_apart(tmp_path: Path) -> None:
    x = torch.arange(6.0)
    value = {"one": x, "same": x, "view": x.view(2, 3), "part": x[2:4]}
    assert len(pack(value)[1]) == 3
    save(tmp_path / "state", value)
    assert equal(value, load(tmp_path / "state"))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_optimizer_state_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    layer = nn.Linear(3, 2)
    optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind](layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save(tmp_path / "state", optimizer.state_dict())
    assert equal(optimizer.state_dict(), load(tmp_path / "state"))


def test_state_is_refused_when_it_holds_something_else() -> None:
    with pytest.raises(CheckpointError, match=r"but a\.1\.b is a function"):
        pack({"a": [1, {"b": equal}]})
    with pytest.raises(CheckpointError, match=r"dense tensors only, but grid is torch\.sparse_coo"):
        pack({"grid": torch.eye(3).to_sparse()})


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The directory of a phase with two checkpoints, of steps 2 and 3."""
    with pytest.raises(Killed):
        run_toy(tmp_path, kill_at(10), checkpoint_steps=1)
    directory = tmp_path / "0-toy" / "01-adversarial"
    assert [path.name for path in sorted(directory.iterdir())] == ["step-00000002", "step-00000003"]
    return directory


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def change_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"done": 3', '"done": 1'))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tensors.safetensors", truncate),
        ("tensors.safetensors", flip),
        ("tensors.safetensors", empty),
        ("tensors.safetensors", Path.unlink),
        ("checkpoint.json", truncate),
        ("checkpoint.json", change_number),
        ("checkpoint.json", Path.unlink),
    ],
)
def test_damaged_checkpoint_is_named_with_what_to_do_about_it(
    tmp_path: Path, killed: Path, name: str, damage: Any
) -> None:
    newest = killed / "step-00000003"
    damage(newest / name)
    with pytest.raises(CheckpointError) as caught:
        run_toy(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(newest / name)) and "\n" not in message
    assert message.endswith(f"remove {newest} to go on from step 2")


def test_run_goes_on_from_the_checkpoint_before_when_the_damaged_one_is_removed(tmp_path: Path, killed: Path) -> None:
    whole, _ = run_toy(tmp_path / "whole")
    shutil.rmtree(killed / "step-00000003")
    toy, _ = run_toy(tmp_path)
    assert same_bits(toy.result(), whole.result())


def test_damaged_result_is_named_with_what_to_do(tmp_path: Path) -> None:
    run_toy(tmp_path)
    flip(tmp_path / "0-toy" / "02-together" / "finished" / "tensors.safetensors")
    with pytest.raises(CheckpointError, match=r"is damaged .*: remove \S+02-together to do the phase again"):
        run_toy(tmp_path)


def test_stored_state_is_refused_when_the_method_builds_something_else(tmp_path: Path) -> None:
    def run(width: int) -> None:
        weight = nn.Parameter(torch.zeros(1))

        def step(batch: dict[str, Any], i: int) -> Iterator[Update]:
            yield Update("weight", {"loss": weight.sum()})

        def phases() -> Phases:
            yield Train("train", 1, {"weight": Optim([weight])}, {}, step, {"memory": nn.Linear(width, 1)})

        Engine(tmp_path, distributed=Distributed.single(), randomness=Randomness(0), fingerprint="").run(phases())

    run(2)
    expected = r"the stored state 'memory' of phase 'train' does not fit .* remove the phase's directory to do it again"
    with pytest.raises(CheckpointError, match=expected) as caught:
        run(3)
    assert "\n" not in str(caught.value)


# --- no room ---------------------------------------------------------------------------------------------------------


@contextmanager
def no_room(size: int) -> Iterator[None]:
    """Files may not grow beyond ``size`` bytes: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_checkpoint_before_is_intact_when_the_disk_is_full(tmp_path: Path, killed: Path) -> None:
    whole, _ = run_toy(tmp_path / "whole")
    with pytest.raises(CheckpointError) as caught, no_room(3000):
        run_toy(tmp_path, checkpoint_steps=1)
    message = str(caught.value)
    assert message.startswith(f"cannot write {killed / 'step-00000004'}: ") and "File too large" in message
    assert "make room, then run the same command again" in message and "\n" not in message
    assert [path.name for path in sorted(killed.iterdir())] == ["step-00000002", "step-00000003"]
    toy, _ = run_toy(tmp_path)
    assert same_bits(toy.result(), whole.result())
