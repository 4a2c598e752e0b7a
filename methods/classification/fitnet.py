"""FitNet (Romero et al. 2015, arXiv 1412.6550): let a middle layer of the teacher guide a middle layer of the student.

First the student up to its guided layer, with a regressor on top, predicts the teacher's hint layer; then the whole
student is trained with knowledge distillation. Trained: the student, and the regressor in the first stage. Exported:
the student.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import RequestError
from compressor.losses.precision import at_least_float32

__all__ = ["hint_loss", "hint_regressor", "soft_target_weight"]


def hint_loss(regressed_features: Tensor, hint_features: Tensor) -> Tensor:
    """Half the squared error between the regressor's output and the hint (eq. 3).

    Eq. 3 sums over the entries of a feature map; here it is their mean, as in the usual re-implementations, so that a
    weight does not depend on the layer's size.

    Args:
        regressed_features: Regressor on the student's guided layer, any shape, float.
        hint_features: The teacher's hint layer, the same shape; detached.

    Returns:
        Scalar at least 0, float32 or wider.

    Raises:
        RequestError: The shapes differ.
    """
    if regressed_features.shape != hint_features.shape:
        raise RequestError(
            f"guided features {tuple(regressed_features.shape)} and hint {tuple(hint_features.shape)} differ: put a "
            "regressor between them"
        )
    return 0.5 * F.mse_loss(at_least_float32(regressed_features), at_least_float32(hint_features.detach()))


def hint_regressor(guided_shape: tuple[int, int, int], hint_shape: tuple[int, int, int]) -> nn.Conv2d:
    """The convolution that carries a guided feature map to the hint's channels and size.

    Section 2.2: a convolution without padding, whose kernel makes the sizes meet (``N_g - k + 1 = N_h``), because it
    needs far fewer weights than a dense regressor.

    Args:
        guided_shape: ``(C, H, W)`` of the student's guided layer.
        hint_shape: ``(C, H, W)`` of the teacher's hint layer.

    Returns:
        A trainable convolution.

    Raises:
        RequestError: The guided map is smaller than the hint's.
    """
    channels, *size = guided_shape
    hint_channels, *hint_size = hint_shape
    if any(guided < hint for guided, hint in zip(size, hint_size, strict=True)):
        raise RequestError(
            f"the guided layer's map {size} is smaller than the hint's {hint_size}: choose an earlier guided layer or "
            "a later hint"
        )
    kernel = (size[0] - hint_size[0] + 1, size[1] - hint_size[1] + 1)
    return nn.Conv2d(channels, hint_channels, kernel_size=kernel)


def soft_target_weight(step: int, steps: int, *, start: float = 4.0, end: float = 1.0) -> float:
    """The weight lambda of the soft targets in the second stage (eq. 2), which decays linearly during training.

    Args:
        step: From 0 on.
        steps: Steps of the stage; from ``steps - 1`` on the weight is ``end``.
        start: Weight at the first step; the paper starts at 4.
        end: Weight at the last step; the paper ends at 1.

    Returns:
        The weight.
    """
    progress = min(step / max(steps - 1, 1), 1.0)
    return start + (end - start) * progress
