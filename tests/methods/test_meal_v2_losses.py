"""MEAL V2's mathematics: targets, similarity, discriminator."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.losses.adversarial import reverse_gradient
from compressor.methods.classification.meal_v2 import (
    Discriminator,
    discriminator_loss,
    discriminator_scores,
    discriminator_widths,
    ensemble_targets,
    similarity_loss,
)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def test_ensemble_targets_average_probabilities_and_not_logits() -> None:
    logits = torch.tensor([[[0.0, 10.0]], [[0.0, -2.0]]])
    sure, unsure = 1 / (1 + math.exp(-10)), 1 / (1 + math.exp(2))

    soft_labels, mean_logits = ensemble_targets(logits)

    assert soft_labels[0, 1].item() == pytest.approx((sure + unsure) / 2)
    assert torch.equal(mean_logits, torch.tensor([[0.0, 4.0]]))


def test_ensemble_targets_carry_no_gradient() -> None:
    soft_labels, mean_logits = ensemble_targets(torch.randn(2, 3, 4, requires_grad=True))

    assert not soft_labels.requires_grad
    assert not mean_logits.requires_grad


def test_similarity_gradient_is_the_difference_of_the_probabilities() -> None:
    student, soft_labels = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4).softmax(dim=1)

    similarity_loss(student, soft_labels).backward()

    torch.testing.assert_close(student.grad, (student.softmax(dim=1) - soft_labels).detach() / 5)


def test_discriminator_loss_stays_above_its_floor() -> None:
    """Scores behind a ReLU can tell [1, 0] no better than (large, 0)."""
    student, teacher = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])

    assert discriminator_loss(student, teacher).item() == pytest.approx(math.log(2) / 2)


def test_discriminator_loss_of_dead_scores_is_log_two_without_gradient() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    dead = [torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, 2), torch.zeros(2), torch.zeros(2, 2), -torch.ones(2)]

    loss = discriminator_loss(discriminator_scores(logits, *dead), torch.zeros(3, 2))
    loss.backward()

    assert loss.item() == pytest.approx(math.log(2))
    assert torch.equal(logits.grad, torch.zeros(3, 4))


def alive_discriminator() -> Discriminator:
    discriminator = Discriminator(10)
    for layer in (discriminator.linear1, discriminator.linear2, discriminator.linear3):
        torch.nn.init.uniform_(layer.weight, 0.1, 0.5)
    return discriminator


def gradients(student: torch.Tensor, *, adversarial: bool) -> tuple[torch.Tensor, torch.Tensor]:
    discriminator = alive_discriminator()
    student = student.clone().requires_grad_()
    seen = reverse_gradient(student) if adversarial else student
    loss = discriminator_loss(discriminator(seen), discriminator(torch.ones(3, 10)))
    student_gradient, weight_gradient = torch.autograd.grad(loss, [student, discriminator.linear1.weight])
    return student_gradient, weight_gradient


def test_reversal_turns_the_students_gradient_alone() -> None:
    student = torch.rand(3, 10)
    torch.manual_seed(1)
    joint = gradients(student, adversarial=False)
    torch.manual_seed(1)
    adversarial = gradients(student, adversarial=True)

    assert joint[0].abs().sum() > 0
    torch.testing.assert_close(adversarial[0], -joint[0])
    torch.testing.assert_close(adversarial[1], joint[1])


@pytest.mark.parametrize(("classes", "widths"), [(1000, (125, 15)), (10, (5, 2)), (100, (14, 2)), (3, (2, 2))])
def test_discriminator_widths_divide_the_classes_and_never_fall_below_two(
    classes: int, widths: tuple[int, int]
) -> None:
    assert discriminator_widths(classes) == widths


def test_discriminator_module_scores_rows_as_the_function_does() -> None:
    discriminator, logits = Discriminator(10), torch.randn(4, 10)

    assert torch.equal(discriminator(logits), discriminator_scores(logits, *discriminator.parameters()))
