"""Kept teacher outputs: the same bits, fewer questions, and nothing that does not belong to the batch."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.data.sources import load_data
from compressor.data.stream import Stream
from compressor.models.classifier import Classifier
from compressor.models.spec import load_model_spec
from compressor.training.teacher_cache import OutputCache, TeacherLogits, keep_top, model_hash, restore_top
from compressor.training.training_config import TrainingConfig, stream_key

SPEC = "timm:resnet18?layers=[1,1,1,1],channels=[4,4,8,8],num_classes=10,in_chans=1"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counting(Classifier):
    calls = 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().__call__(pixels)


def teacher(seed: int = 0) -> Counting:
    torch.manual_seed(seed)
    return Counting(load_model_spec(SPEC))


def stream(**changes: Any) -> Stream:
    return replace(Stream(load_data("scenes", "val"), 6, seed=4), **changes)


def logits(of: Counting, source: Stream, numbers: range, **options: Any) -> torch.Tensor:
    key = stream_key(TrainingConfig(), source)
    targets = TeacherLogits([of], 10, source, key, **options)
    return torch.stack([targets(source[i]["image"], i)[0] for i in numbers])


@pytest.mark.parametrize("top_k", [None, 3, 10, 99])
def test_what_is_read_back_has_the_bits_of_what_is_computed(top_k: int | None) -> None:
    one = teacher()
    plain = logits(one, stream(), range(3), top_k=top_k)
    written = logits(one, stream(), range(3), cache=True, top_k=top_k)
    asked = one.calls
    read = logits(one, stream(), range(3), cache=True, top_k=top_k)
    assert torch.equal(plain, written) and torch.equal(plain, read)
    assert one.calls == asked


def test_batches_that_repeat_are_asked_for_once() -> None:
    one, source = teacher(), stream(period=4)
    plain = logits(one, source, range(12))
    one.calls = 0
    assert torch.equal(logits(one, source, range(12), cache=True), plain)
    assert one.calls == 4


@pytest.mark.parametrize("change", [{"seed": 5}, {"size": 5}, {"period": 7}, {"shard": (0, 2)}])
def test_another_batch_is_never_answered_from_the_cache(change: dict[str, Any]) -> None:
    one = teacher()
    logits(one, stream(), range(2), cache=True)
    asked = one.calls
    logits(one, stream(**change), range(2), cache=True)
    assert one.calls == asked + 2


def test_another_teacher_is_never_answered_from_the_cache() -> None:
    first, second = teacher(), teacher(1)
    logits(first, stream(), range(1), cache=True)
    logits(second, stream(), range(1), cache=True)
    assert second.calls == 1
    assert model_hash(first.model) == model_hash(teacher().model) != model_hash(second.model)
    other_mean = teacher()
    other_mean.model.info.extra["mean"] = [0.1]
    assert model_hash(other_mean.model) != model_hash(first.model)


def test_two_teachers_have_files_of_their_own() -> None:
    pair, source = [teacher(), teacher(1)], stream()
    key = stream_key(TrainingConfig(), source)
    plain = TeacherLogits(pair, 10, source, key)(source[0]["image"], 0)
    cached = TeacherLogits(pair, 10, source, key, cache=True)
    assert torch.equal(cached(source[0]["image"], 0), plain)
    assert torch.equal(cached(source[0]["image"], 0), plain)
    assert [one.calls for one in pair] == [2, 2]


@pytest.mark.parametrize("method", ["kd", "dkd", "dist", "fitnet", "meal-v2"])
@pytest.mark.parametrize("views", [None, 1])
def test_a_training_ends_at_the_same_bits_with_and_without_the_cache(
    tmp_path: Path, method: str, views: int | None
) -> None:
    from compressor.context import RunContext
    from compressor.registry import load_method
    from compressor.tasks.classification import Classification
    from compressor.training.distributed import Distributed
    from compressor.training.engine import Engine
    from compressor.training.random import Randomness

    def run(cache: bool, directory: str) -> dict[str, torch.Tensor]:
        task, randomness, distributed = (
            Classification({"train": "scenes"}, {}),
            Randomness(0),
            Distributed.single("cpu"),
        )
        students = {"student": lambda: load_model_spec(SPEC)}
        ctx = RunContext(task, {"teacher": [teacher().model]}, randomness, distributed, students=students)
        config: dict[str, Any] = {"steps": 3, "batch": 8, "cache_teacher": cache, "views": views, "augment": "shift"}
        if method == "fitnet":
            config["hint"] = {"steps": 0}
        made: Any = load_method(method)
        made = made(made.Config(**config))
        engine = Engine(tmp_path / directory, distributed=distributed, randomness=randomness, fingerprint="x")
        engine.run(made.phases(ctx))
        weights: dict[str, torch.Tensor] = made.student().module.state_dict()
        return weights

    plain, written, read = run(False, "plain"), run(True, "written"), run(True, "read")
    assert all(torch.equal(plain[key], written[key]) and torch.equal(plain[key], read[key]) for key in plain)


def test_a_record_that_was_cut_short_or_damaged_is_computed_again(own_cache: Path) -> None:
    one = teacher()
    plain = logits(one, stream(), range(3), cache=True)
    path = next(own_cache.rglob("outputs"))
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content[:-7])
    one.calls = 0
    assert torch.equal(logits(one, stream(), range(3), cache=True), plain)
    assert one.calls == 2


def test_training_goes_on_without_the_cache_when_the_disk_is_full(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    one = teacher()
    plain = logits(one, stream(), range(2))
    monkeypatch.setattr(OutputCache, "write", full)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(one, stream(), range(2), cache=True), plain)
    assert "no longer kept" in caplog.text and "No space left" in caplog.text


def test_records_may_be_written_in_any_order(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path / "c", (2, 3))
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert cache.read(0) is None
    cache.write(5, value)
    assert cache.read(4) is None and cache.read(6) is None
    assert np.array_equal(OutputCache(tmp_path / "c", (2, 3)).read(5), value)


def test_the_top_logits_keep_their_probabilities_and_the_others_share_the_rest() -> None:
    full = torch.randn(4, 9) * 3
    kept = restore_top(keep_top(full, 3), 9)
    probabilities, expected = kept.softmax(1), full.softmax(1)
    top = full.topk(3, dim=1).indices
    assert torch.allclose(probabilities.gather(1, top), expected.gather(1, top), atol=1e-6)
    others = probabilities.scatter(1, top, 0)
    rest = (1 - expected.gather(1, top).sum(1, keepdim=True)) / 6
    assert torch.allclose(others[others > 0].view(4, 6), rest.expand(4, 6), atol=1e-6)
