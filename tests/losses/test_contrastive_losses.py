"""Noise-contrastive estimation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compressor.losses.contrastive import noise_contrastive_loss


def test_noise_contrastive_loss_equals_its_definition() -> None:
    random = np.random.default_rng(0)
    probabilities, samples, negatives = random.uniform(0.001, 0.2, size=(3, 8)), 50, 7
    total = 0.0
    for row in probabilities:
        truth = [column == 0 for column in range(8)]
        for p, is_pair in zip(row, truth, strict=True):
            posterior = p / (p + negatives / samples)
            total -= math.log(posterior if is_pair else 1 - posterior)

    loss = noise_contrastive_loss(torch.tensor(np.log(probabilities)), samples)

    assert loss.item() == pytest.approx(total / 3, rel=1e-9)


def test_noise_contrastive_loss_stays_finite_for_vanishing_probabilities() -> None:
    log_probabilities = torch.tensor([[-200.0, 50.0]], requires_grad=True)

    loss = noise_contrastive_loss(log_probabilities, 10)
    loss.backward()

    assert loss.isfinite()
    assert log_probabilities.grad.isfinite().all()
    assert log_probabilities.grad[0, 0] < 0 < log_probabilities.grad[0, 1]
