"""Adversarial losses, and the gradient reversal that makes a game of one backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.losses.precision import at_least_float32

__all__ = ["non_saturating_losses", "reverse_gradient"]


def non_saturating_losses(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The non-saturating pair of losses (Goodfellow et al. 2014), from logits.

    Nothing is detached here: hand over logits of detached fakes to train the discriminator alone.

    Args:
        real_logits: Any shape: the discriminator's logits on real samples; high means "real".
        fake_logits: Any shape: its logits on generated ones.

    Returns:
        ``(generator, discriminator)``: ``mean softplus(-fake)`` and ``mean softplus(fake) + mean softplus(-real)``,
        scalars, float32 or wider.
    """
    real, fake = at_least_float32(real_logits), at_least_float32(fake_logits)
    return F.softplus(-fake).mean(), F.softplus(fake).mean() + F.softplus(-real).mean()


def reverse_gradient(x: Tensor) -> Tensor:
    """The identity, whose gradient is multiplied by -1 (Ganin & Lempitsky 2015).

    Args:
        x: Any shape, float.

    Returns:
        The same values.
    """
    return _ReverseGradient.apply(x)


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient
