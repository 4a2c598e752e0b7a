"""DMD2's mathematics: the matching gradient, the fake score's loss, the GAN pair, the steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import RequestError
from compressor.methods.generation.dmd2 import (
    adversarial_losses,
    distribution_matching_loss,
    fake_score_loss,
    student_timesteps,
)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@settings(max_examples=15, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0))
def test_matching_gradient_is_fake_minus_real_over_each_samples_mean_distance(shape: list[int], seed: int) -> None:
    latents, real, fake = np.random.default_rng(seed).normal(size=(3, *shape))
    expected = np.stack([(f - r) / np.mean(abs(x - r)) for x, r, f in zip(latents, real, fake, strict=True)])

    loss, gradient = distribution_matching_loss(*map(torch.tensor, (latents, real, fake)))

    np.testing.assert_allclose(gradient, expected, rtol=1e-9)
    assert loss.item() == pytest.approx(0.5 * np.mean(expected**2), rel=1e-9)


def test_matching_loss_has_the_gradient_as_its_derivative_and_reaches_the_latents_alone() -> None:
    latents, real, fake = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(3))

    loss, gradient = distribution_matching_loss(latents, real, fake)
    loss.backward()

    torch.testing.assert_close(latents.grad, gradient / 24)
    assert not gradient.requires_grad
    assert real.grad is None
    assert fake.grad is None


def test_descending_the_matching_loss_moves_samples_from_the_fake_to_the_real_estimate() -> None:
    latents = torch.zeros(1, 2, requires_grad=True)

    loss, _ = distribution_matching_loss(latents, torch.full((1, 2), 3.0), torch.full((1, 2), -1.0))
    loss.backward()

    assert (latents.grad < 0).all()


def test_matching_gradient_is_finite_when_the_teacher_returns_the_sample() -> None:
    latents = torch.zeros(2, 3)
    fake = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]])

    _, gradient = distribution_matching_loss(latents, torch.zeros(2, 3), fake)

    assert gradient.isfinite().all()
    assert torch.equal(gradient[0], torch.zeros(3))
    assert gradient[1, 0] == torch.finfo(torch.float32).max


def test_matching_loss_computes_in_the_wider_type() -> None:
    latents = torch.randn(2, 3, requires_grad=True)

    loss, gradient = distribution_matching_loss(
        latents, torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    )
    loss.backward()

    assert loss.dtype == gradient.dtype == torch.float64
    assert latents.grad.dtype == torch.float32


def test_matching_loss_of_bfloat16_is_at_least_float32() -> None:
    loss, _ = distribution_matching_loss(*torch.randn(3, 2, 4).to(torch.bfloat16))

    assert loss.dtype == torch.float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "velocity", "x0"])
def test_fake_score_loss_is_zero_for_a_perfect_prediction(prediction_type: str) -> None:
    latents, noise, sigma = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0.5, 2.0])
    perfect = {"epsilon": noise, "velocity": noise - latents, "x0": latents}[prediction_type]

    loss = fake_score_loss(perfect, latents, noise=noise, sigma=sigma, prediction_type=prediction_type)

    assert loss.item() == 0


def test_fake_score_loss_of_x0_predictions_weighs_samples_by_their_noise() -> None:
    latents, prediction = torch.zeros(2, 1, 1), torch.tensor([1.0, 2.0]).reshape(2, 1, 1)

    loss = fake_score_loss(prediction, latents, sigma=torch.tensor([0.5, 2.0]), prediction_type="x0", sigma_data=1.0)

    assert loss.item() == pytest.approx(((4 + 1) * 1 + (0.25 + 1) * 4) / 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "velocity", "x0"])
def test_fake_score_loss_does_not_reach_the_generator(prediction_type: str) -> None:
    latents, prediction = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)

    fake_score_loss(
        prediction, latents, noise=torch.randn(2, 3), sigma=torch.ones(2), prediction_type=prediction_type
    ).backward()

    assert latents.grad is None
    assert prediction.grad.abs().sum() > 0


def test_fake_score_loss_refuses_an_unknown_prediction_type_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean epsilon"):
        fake_score_loss(torch.zeros(1, 1), torch.zeros(1, 1), prediction_type="epsilom")


@pytest.mark.parametrize(("prediction_type", "missing"), [("epsilon", "noise"), ("velocity", "noise"), ("x0", "sigma")])
def test_fake_score_loss_names_what_is_missing(prediction_type: str, missing: str) -> None:
    with pytest.raises(RequestError, match=missing):
        fake_score_loss(torch.zeros(1, 1), torch.zeros(1, 1), prediction_type=prediction_type)


def test_adversarial_generator_gradient_passes_through_a_frozen_discriminator() -> None:
    discriminator = torch.nn.Linear(3, 1).requires_grad_(False)
    sample = torch.randn(2, 3, requires_grad=True)

    generator, _ = adversarial_losses(torch.zeros(2, 1), discriminator(sample))
    generator.backward()

    assert sample.grad.abs().sum() > 0
    assert discriminator.weight.grad is None


def test_adversarial_losses_pull_the_fake_logits_in_opposite_directions() -> None:
    fake = torch.zeros(2, 1, requires_grad=True)
    generator, discriminator = adversarial_losses(torch.zeros(2, 1), fake)

    (of_generator,) = torch.autograd.grad(generator, fake)
    (of_discriminator,) = torch.autograd.grad(discriminator, fake)

    assert (of_generator < 0).all()
    assert (of_discriminator > 0).all()


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [999]), (2, [999, 499]), (3, [999, 666, 333]), (4, [999, 749, 499, 249])]
)
def test_student_timesteps_start_at_the_noisiest_and_are_evenly_apart(steps: int, expected: list[int]) -> None:
    timesteps = student_timesteps(steps)

    assert timesteps.dtype == torch.int64
    assert timesteps.tolist() == expected


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_student_timesteps_refuse_an_impossible_number(steps: int) -> None:
    with pytest.raises(RequestError, match="num_inference_steps"):
        student_timesteps(steps)
