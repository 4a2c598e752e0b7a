"""KD, FitNet and AT on segmenters: pixel by pixel, with cached logits, resumed, across libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.methods.classification.kd import kd_objective
from compressor.models.spec import load_model_spec
from compressor.registry import load_method
from compressor.tasks.segmentation import Segmentation
from compressor.training.teacher_cache import keep_top, restore_top
from tests.method_runs import Killed, run_method

METHODS = ("kd", "fitnet", "at")
SMALL: dict[str, dict[str, Any]] = {"fitnet": {"hint": {"steps": 1, "batch": 4}}}
CNN = "timm:resnet18?layers=[1,1,1,1],channels=[4,4,8,8],width=16"
VIT = (
    "transformers:segformer?depths=[1,1,1,1],hidden_sizes=[8,8,16,16],num_attention_heads=[1,1,2,2],"
    "mlp_ratios=[2,2,2,2],decoder_hidden_size=16"
)


def distil(
    directory: Path, name: str, config: dict[str, Any] | None = None, *, kill_at: int | None = None, student: str = CNN
) -> dict[str, torch.Tensor]:
    task = Segmentation({"train": "scenes:32?masks=true"}, {})
    defaults = task.student_defaults()
    torch.manual_seed(1)
    teacher = load_model_spec(VIT, defaults=defaults, task="segmentation")
    learner = load_model_spec(student, defaults=defaults, task="segmentation")
    kind = load_method(name)
    method = kind(kind.Config.model_validate({"steps": 3, "batch": 4, **SMALL.get(name, {}), **(config or {})}))
    torch.manual_seed(2)
    kill = None if kill_at is None else ("distil", kill_at)
    students = {"student": learner.copy}
    return run_method(directory, method, task, teachers=[teacher], students=students, kill=kill).weights


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_training_of_a_segmenter_goes_on_to_the_same_bits(tmp_path: Path, name: str) -> None:
    whole = distil(tmp_path / "whole", name)
    with pytest.raises(Killed):
        distil(tmp_path / "killed", name, kill_at=1)
    resumed = distil(tmp_path / "killed", name)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert any("running_mean" in key for key in whole)


def test_the_teachers_maps_can_be_kept_on_disk_without_changing_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    plain = distil(tmp_path / "plain", "kd", {"teacher_top_k": 3})
    for directory in ("first", "second"):
        kept = distil(tmp_path / directory, "kd", {"teacher_top_k": 3, "cache_teacher": True})
        assert all(torch.equal(kept[key], plain[key]) for key in plain)
    assert list((tmp_path / "cache").rglob("outputs"))


def test_the_largest_logits_of_every_pixel_are_kept_and_the_mass_of_the_others() -> None:
    logits = torch.randn(2, 6, 3, 5)
    restored = restore_top(keep_top(logits, 2), 6)
    assert restored.shape == logits.shape
    per_pixel = restore_top(keep_top(logits.permute(0, 2, 3, 1).reshape(-1, 6), 2), 6)
    torch.testing.assert_close(restored.permute(0, 2, 3, 1).reshape(-1, 6), per_pixel)
    torch.testing.assert_close(restored.logsumexp(dim=1), logits.logsumexp(dim=1))


def test_the_objective_of_maps_is_that_of_their_pixels_and_the_teacher_speaks_of_unlabelled_ones() -> None:
    student, teacher = torch.randn(2, 2, 5, 4, 3)
    labels = torch.randint(0, 5, (2, 4, 3))
    rows = [maps.permute(0, 2, 3, 1).reshape(-1, 5) for maps in (student, teacher)]
    torch.testing.assert_close(kd_objective(student, teacher, labels), kd_objective(*rows, labels.flatten()))
    ignored = torch.full_like(labels, 255)
    soft = kd_objective(student, teacher, ignored, ignore_index=255)
    torch.testing.assert_close(soft, kd_objective(*rows, labels.flatten(), soft_weight=1.0) * 0.9)
