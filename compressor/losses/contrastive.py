"""Contrastive losses: telling a pair that belongs together from drawn ones."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from compressor.losses.precision import at_least_float32

__all__ = ["noise_contrastive_loss"]


def noise_contrastive_loss(log_probabilities: Tensor, num_samples: int) -> Tensor:
    """Noise-contrastive estimation with uniform noise over a data set (Gutmann & Hyvarinen 2010; Wu et al. 2018).

    With ``h = P / (P + K / n)`` it is ``- mean_b (log h[b, 0] + sum_k log(1 - h[b, k]))``, computed from logarithms, so
    that it needs no small constant against log 0.

    Args:
        log_probabilities: ``(B, 1 + K)``: ``log P`` of the positive (column 0) and of K negatives, normalised over the
            data set (up to an estimate of the constant), so about ``- log n`` for a pair that does not fit.
        num_samples: n, the number of samples that negatives are drawn from.

    Returns:
        Scalar at least 0, float32 or wider.
    """
    log_noise = math.log((log_probabilities.shape[1] - 1) / num_samples)
    log_odds = at_least_float32(log_probabilities) - log_noise
    positive, negative = log_odds[:, 0], log_odds[:, 1:]
    return -(F.logsigmoid(positive) + F.logsigmoid(-negative).sum(dim=1)).mean()
