"""CNN-ViT collaboration (Zhu et al. 2023, arXiv 2307.12574): two small segmenters teach each other while they learn.

A CNN and a vision transformer train together on the labels, without a teacher. Their early layers mimic each other's
features; deeper features and logits are passed on, region by region and pixel by pixel, from the student that is more
reliable there. Trained: both students and the adapters between their early layers. Exported: each student.

No official code was published. The structure is the paper's; distances, the criterion of reliability (the cross-entropy
with the labels) and the weights are the most direct reading of its abstract, so its figures must not be claimed for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import RequestError
from compressor.kernels import feature_distance
from compressor.losses.dense import pixel_cross_entropy, region_mean
from compressor.losses.divergence import kl_divergence
from compressor.losses.precision import at_least_float32

__all__ = ["hfd_loss", "pixel_bsd_loss", "region_bsd_loss", "region_reliability"]


def hfd_loss(projected_features: Tensor, target_features: Tensor) -> Tensor:
    """Heterogeneous feature distillation: mean cosine distance over batch and positions.

    Args:
        projected_features: ``(B, C, h, w)`` float: one student's low-layer features after its adapter. Resized
            bilinearly where its size differs from the target's.
        target_features: ``(B, C, H, W)`` float: the other student's low-layer features as they are; detached.

    Returns:
        Scalar in [0, 2]. Positions with a zero vector count as distance 1.
    """
    _check_channels(projected_features, target_features)
    size = target_features.shape[-2:]
    if projected_features.shape[-2:] != size:
        projected_features = F.interpolate(projected_features, size, mode="bilinear", align_corners=False)
    return feature_distance(projected_features, target_features, "cosine")


@torch.no_grad()
def region_reliability(
    cnn_logits: Tensor, vit_logits: Tensor, labels: Tensor, grid_size: tuple[int, int], ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Which student has the lower mean cross-entropy in each region of a grid.

    Args:
        cnn_logits: ``(B, K, H, W)`` float.
        vit_logits: ``(B, K, H, W)`` float.
        labels: ``(B, H, W)`` int64.
        grid_size: ``(gh, gw)``; regions are the bins of adaptive pooling.
        ignore_index: The label of pixels that leave the mean.

    Returns:
        ``(cnn_wins, valid)``, both ``(B, gh, gw)`` bool: the CNN teaches there (ties go to the transformer), and the
        region holds a labelled pixel. Where it does not, both are False.
    """
    height, width = grid_size
    cnn_error, labelled = pixel_cross_entropy(cnn_logits, labels, ignore_index=ignore_index)
    vit_error, _ = pixel_cross_entropy(vit_logits, labels, ignore_index=ignore_index)
    cnn_mean, valid = region_mean(cnn_error, labelled, (height, width))
    vit_mean, _ = region_mean(vit_error, labelled, (height, width))
    return (cnn_mean < vit_mean) & valid, valid


def region_bsd_loss(
    cnn_features: Tensor, vit_features: Tensor, cnn_wins: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Region-wise bidirectional selective distillation: cosine distance of pooled features, towards the better side.

    Args:
        cnn_features: ``(B, C, h, w)`` float, the last features before the classifier.
        vit_features: ``(B, C, h', w')`` float.
        cnn_wins: ``(B, gh, gw)`` bool, from `region_reliability`.
        valid: ``(B, gh, gw)`` bool, likewise.

    Returns:
        ``(loss_cnn, loss_vit)``, scalars in [0, 2]: mean over the regions that the transformer teaches, with gradient
        for the CNN alone; and the reverse. A mean over no regions is a differentiable 0.
    """
    _check_channels(cnn_features, vit_features)
    height, width = valid.shape[-2:]
    cnn = F.adaptive_avg_pool2d(at_least_float32(cnn_features), (height, width))
    vit = F.adaptive_avg_pool2d(at_least_float32(vit_features), (height, width))
    loss_cnn = feature_distance(cnn, vit, "cosine", valid & ~cnn_wins)
    loss_vit = feature_distance(vit, cnn, "cosine", valid & cnn_wins)
    return loss_cnn, loss_vit


def pixel_bsd_loss(
    cnn_logits: Tensor, vit_logits: Tensor, labels: Tensor, temperature: float = 1.0, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Pixel-wise bidirectional selective distillation: ``T ** 2 * KL`` towards the student that is better at a pixel.

    Args:
        cnn_logits: ``(B, K, H, W)`` float.
        vit_logits: ``(B, K, H, W)`` float.
        labels: ``(B, H, W)`` int64; they choose the direction, nothing else.
        temperature: T, above 0.
        ignore_index: The label of pixels that are left out.

    Returns:
        ``(loss_cnn, loss_vit)``, scalars in nats: mean over the pixels where the transformer's cross-entropy is
        strictly lower, with gradient for the CNN alone; and the reverse. A mean over no pixels is a differentiable 0.
    """
    with torch.no_grad():
        cnn_error, labelled = pixel_cross_entropy(cnn_logits, labels, ignore_index=ignore_index)
        vit_error, _ = pixel_cross_entropy(vit_logits, labels, ignore_index=ignore_index)
    vit_teaches, cnn_teaches = labelled & (vit_error < cnn_error), labelled & (cnn_error < vit_error)
    loss_cnn = kl_divergence(cnn_logits, vit_logits, temperature=temperature, mask=vit_teaches, dim=1)
    loss_vit = kl_divergence(vit_logits, cnn_logits, temperature=temperature, mask=cnn_teaches, dim=1)
    return temperature**2 * loss_cnn, temperature**2 * loss_vit


def _check_channels(x: Tensor, y: Tensor) -> None:
    if x.shape[:2] != y.shape[:2]:
        raise RequestError(
            f"features of {x.shape[1]} and {y.shape[1]} channels (batches of {x.shape[0]} and {y.shape[0]}) cannot be "
            "compared: project one side to the other's channels"
        )
