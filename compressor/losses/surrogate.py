"""Losses that exist for their gradient: a direction known in closed form, handed to autograd."""

from __future__ import annotations

from torch import Tensor

from compressor.losses.precision import at_least_float32

__all__ = ["gradient_as_loss"]


def gradient_as_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose derivative by ``x`` is ``gradient / numel(x)``.

    Papers write ``0.5 * mean((x - sg(x - gradient)) ** 2)``. Value and derivative are the same here, but ``gradient``
    is never added to ``x``, which would round away the small ones.

    Args:
        x: Any shape, float.
        gradient: The same shape; detached.

    Returns:
        Scalar ``0.5 * mean(gradient ** 2)``, float32 or wider.
    """
    direction = at_least_float32(gradient.detach())
    return 0.5 * direction.square().mean() + (direction * (x - x.detach())).mean()
