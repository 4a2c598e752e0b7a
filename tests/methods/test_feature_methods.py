"""FitNet, AT, RKD and CRD: which layers they read, and what each trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compressor.errors import RequestError
from compressor.training.phase import Train

Distil = Callable[..., Any]


def phases_of(distil: Distil, name: str, config: dict[str, Any]) -> dict[str, Train]:
    seen: dict[str, Train] = {}

    def watch(phase: Train) -> None:
        seen[phase.name] = phase

    distil(name, {"steps": 1} | config, watch=watch)
    return seen


def test_the_hint_stage_of_fitnet_trains_the_student_up_to_its_guided_layer(distil: Distil) -> None:
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}

    def watch(phase: Train) -> None:
        module = phase.state["student"]
        target = before if phase.name == "hint" else after
        target.update({name: value.detach().clone() for name, value in module.named_parameters()})

    config = {"hint": {"steps": 2, "batch": 8}, "guided_layer": "layer2", "hint_layer": "layer2"}
    distil("fitnet", config, watch=watch)
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"conv1", "bn1", "layer1", "layer2"}


def test_fitnet_without_a_hint_stage_is_distillation_alone(distil: Distil) -> None:
    assert list(phases_of(distil, "fitnet", {"hint": {"steps": 0}})) == ["distil"]


def test_fitnet_regresses_a_smaller_hint_with_a_kernel_and_refuses_a_larger_one(distil: Distil) -> None:
    config = {"hint": {"steps": 1, "batch": 4}, "guided_layer": "layer1", "hint_layer": "layer2"}
    regressor = phases_of(distil, "fitnet", config)["hint"].state["regressor"]
    assert regressor.kernel_size == (3, 3)
    with pytest.raises(RequestError, match="smaller than the hint's"):
        distil("fitnet", {"hint": {"steps": 1}, "guided_layer": "layer3", "hint_layer": "layer1"})


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("fitnet", {"hint_layer": "layer9"}, "no layer 'layer9'.*layer"),
        ("at", {"student_layers": ["layer1"], "teacher_layers": ["layer1", "layer2"]}, "1 layers, teacher_layers 2"),
        ("at", {"student_layers": ["fc"], "teacher_layers": ["layer1"]}, "no map"),
    ],
)
def test_wrong_layers_are_refused_by_name(distil: Distil, name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        distil(name, config)


def test_attention_transfer_uses_the_layers_that_are_named(distil: Distil) -> None:
    usual = distil("at", {"lr": 0.1}, directory="usual").weights
    named = {"student_layers": ["layer1"], "teacher_layers": ["layer1"], "lr": 0.1}
    other = distil("at", named, directory="named").weights
    assert not torch.equal(usual["layer1.0.conv1.weight"], other["layer1.0.conv1.weight"])


def test_without_attention_or_relations_only_the_labels_teach(distil: Distil) -> None:
    at = distil("at", {"beta": 0}, directory="at").weights
    rkd = distil("rkd", {"distance_weight": 0, "angle_weight": 0, "data_seed": 5}, directory="rkd").weights
    again = distil("at", {"beta": 0, "data_seed": 5}, directory="again").weights
    assert all(torch.equal(rkd[key], again[key]) for key in rkd)
    assert not all(torch.equal(at[key], again[key]) for key in at)


def test_the_memory_of_crd_moves_for_the_seen_samples_alone(distil: Distil) -> None:
    start: dict[str, torch.Tensor] = {}
    seen: set[int] = set()

    def watch(phase: Train) -> None:
        start["bank"] = phase.state["memory"].student_bank.clone()
        memory.append(phase.state["memory"])
        step = phase.step

        def watched(batches: Any, i: int) -> Any:
            seen.update(batches["train"]["index"].tolist())
            return step(batches, i)

        phase.step = watched

    memory: list[Any] = []
    distil("crd", {"negatives": 8, "dimension": 4}, watch=watch)
    changed = (memory[0].student_bank != start["bank"]).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) == seen
    assert torch.isfinite(memory[0].log_normalizers).all()


def test_crd_trains_both_projections(distil: Distil) -> None:
    start: list[torch.Tensor] = []

    def watch(phase: Train) -> None:
        projections.append(phase.state["projections"])
        start.extend(p.detach().clone() for p in projections[0].parameters())

    projections: list[Any] = []
    distil("crd", {"negatives": 8, "dimension": 4}, watch=watch)
    assert all(not torch.equal(old, new) for old, new in zip(start, projections[0].parameters(), strict=True))
