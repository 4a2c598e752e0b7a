"""The non-saturating GAN pair and the gradient reversal."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.losses.adversarial import non_saturating_losses, reverse_gradient


def test_non_saturating_losses_are_the_negative_log_probabilities() -> None:
    real, fake = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.5], [-3.0]])

    generator, discriminator = non_saturating_losses(real, fake)

    probability = torch.sigmoid
    assert generator.item() == pytest.approx(-probability(fake).log().mean().item())
    expected = -probability(real).log().mean() - (1 - probability(fake)).log().mean()
    assert discriminator.item() == pytest.approx(expected.item())


def test_non_saturating_losses_of_undecided_logits_are_log_two() -> None:
    generator, discriminator = non_saturating_losses(torch.zeros(3, 1), torch.zeros(5, 1))

    assert generator.item() == pytest.approx(math.log(2))
    assert discriminator.item() == pytest.approx(2 * math.log(2))


def test_non_saturating_losses_stay_finite_for_large_logits() -> None:
    fake = torch.tensor([-1e6], requires_grad=True)

    generator, discriminator = non_saturating_losses(torch.tensor([-1e6]), fake)
    generator.backward()

    assert generator.item() == pytest.approx(1e6)
    assert discriminator.item() == pytest.approx(1e6)
    assert fake.grad.item() == -1


def test_reverse_gradient_keeps_the_values_and_negates_the_gradient() -> None:
    x = torch.randn(3, requires_grad=True)

    y = reverse_gradient(x)
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()

    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.tensor([-1.0, -2.0, -3.0]))
