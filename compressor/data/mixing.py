"""Mixed images: parts of one picture in another."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["cutmix"]


def cutmix(images: Tensor, rng: np.random.Generator, *, beta: float = 1.0) -> Tensor:
    """Replace one box in all images by the same box of other images of the batch (Yun et al. 2019, section 3.1).

    The box keeps the share ``lam ~ Beta(beta, beta)`` of each image, has the image's shape and a uniform centre, and is
    cut off at the border.

    Args:
        images: ``(B, C, H, W)``.
        rng: Draws the share, the centre and the other images.
        beta: Both parameters of the beta distribution, above 0.

    Returns:
        A new tensor of the same shape.
    """
    height, width = images.shape[-2:]
    cut = math.sqrt(1 - rng.beta(beta, beta))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    half_height, half_width = int(height * cut) // 2, int(width * cut) // 2
    rows = slice(max(y - half_height, 0), min(y + half_height, height))
    columns = slice(max(x - half_width, 0), min(x + half_width, width))
    partners = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    mixed = images.clone()
    mixed[..., rows, columns] = images[partners][..., rows, columns]
    return mixed
