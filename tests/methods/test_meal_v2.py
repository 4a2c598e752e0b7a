"""MEAL V2 as a method: what it reads, what it trains, and its variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compressor.errors import RequestError
from compressor.models.model import Model
from compressor.models.spec import load_model_spec
from compressor.training.phase import Train

Distil = Callable[..., Any]

TEACHER = "timm:resnet18?layers=[1,1,1,1],channels=[8,8,16,16],num_classes=10,in_chans=1"


def two_teachers() -> list[Model]:
    torch.manual_seed(3)
    return [load_model_spec(TEACHER), load_model_spec(TEACHER)]


def phase_of(distil: Distil, config: dict[str, Any], **arguments: Any) -> Train:
    seen: list[Train] = []
    distil("meal-v2", {"steps": 1} | config, watch=lambda phase: seen.append(phase), **arguments)
    return seen[0]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


def test_labels_are_not_used(distil: Distil) -> None:
    def other_labels(phase: Train) -> None:
        step = phase.step
        phase.step = lambda batches, i: step(
            {"train": batches["train"] | {"label": (batches["train"]["label"] + 3) % 10}}, i
        )

    usual = distil("meal-v2", directory="usual").weights
    assert same(usual, distil("meal-v2", directory="other", watch=other_labels).weights)


def test_nothing_is_decayed_by_default(distil: Distil) -> None:
    groups = phase_of(distil, {}).optimizers["student"].params
    assert {group["weight_decay"] for group in groups} == {0.0}


def test_every_teacher_counts(distil: Distil) -> None:
    first, second = two_teachers()
    both = distil("meal-v2", teachers=[first, second], directory="both").weights
    alone = distil("meal-v2", teachers=[first], directory="alone").weights
    assert not same(both, alone)


def test_each_teacher_sees_the_crop_with_its_own_normalisation(distil: Distil) -> None:
    first, second = two_teachers()
    usual = distil("meal-v2", teachers=[first, second], directory="usual").weights
    second.info.extra["mean"] = [0.9]
    assert not same(usual, distil("meal-v2", teachers=[first, second], directory="other").weights)


def test_teachers_stay_in_eval_mode_while_the_student_trains(distil: Distil) -> None:
    teachers, modes = two_teachers(), []

    def watch(phase: Train) -> None:
        teachers[0].module.train()  # what another method may have left
        teachers[0].module.bn1.register_forward_hook(lambda layer, args, output: modes.append(layer.training))

    before = teachers[0].module.bn1.running_mean.clone()
    distil("meal-v2", teachers=teachers, watch=watch)
    assert modes and not any(modes)
    assert torch.equal(teachers[0].module.bn1.running_mean, before)


def test_the_discriminator_is_trained_beside_the_student_unless_it_is_off(distil: Distil) -> None:
    assert "discriminator" in phase_of(distil, {"discriminator": "joint"}, directory="joint").state
    assert "discriminator" not in phase_of(distil, {"discriminator": "off"}, directory="off").state


def test_adversary_and_joint_discriminator_push_the_student_in_different_directions(distil: Distil) -> None:
    weights = {
        kind: distil("meal-v2", {"discriminator": kind, "lr": 0.1}, directory=kind).weights
        for kind in ("joint", "adversarial", "off")
    }
    joint, game, off = (weights[kind]["fc.weight"] for kind in ("joint", "adversarial", "off"))
    assert torch.dot((joint - off).flatten(), (game - off).flatten()) < 0


def test_a_learning_rate_of_its_own_gives_the_discriminator_an_optimiser(distil: Distil) -> None:
    phase = phase_of(distil, {"discriminator_lr": 1e-4})
    assert phase.optimizers["discriminator"].lr == 1e-4
    assert phase.optimizers["student"].lr == 0.01


def test_one_teacher_a_step_is_drawn_anew_each_step(distil: Distil) -> None:
    teachers, calls = two_teachers(), [0, 0]

    def counter(place: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[place] += 1

        return count

    def watch(phase: Train) -> None:
        for place, teacher in enumerate(teachers):
            teacher.module.register_forward_hook(counter(place))

    distil("meal-v2", {"teachers_per_step": "one", "steps": 12}, teachers=teachers, watch=watch)
    assert sum(calls) == 12
    assert min(calls) > 0


def test_cutmix_changes_what_is_learnt_and_cannot_be_cached(distil: Distil) -> None:
    plain = distil("meal-v2", directory="plain").weights
    assert not same(plain, distil("meal-v2", {"cutmix": True}, directory="mixed").weights)
    with pytest.raises(RequestError, match="cutmix"):
        distil("meal-v2", {"cutmix": True, "cache_teacher": True}, directory="cached")
