"""DeepLabV3+ on any backbone of timm: the segmenter behind `timm:` specs of the task segmentation.

Chen et al. 2018 (arXiv 1802.02611): atrous spatial pyramid pooling (torchvision's) on the deepest map, joined with the
map of stride 4 for the outlines. Backbones whose maps all have one size (plain vision transformers) are joined at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPP

from compressor.models.classifier_loading import create_timm

__all__ = ["TimmSegmenter"]

LOW_STRIDE = 4


class TimmSegmenter(nn.Module):
    """An encoder of timm with the decoder of DeepLabV3+.

    Args:
        backbone: timm's name of the encoder.
        num_classes: K.
        in_chans: Channels of the images.
        width: Channels of the decoder; the low map gets a quarter of them.
        atrous_rates: Dilations of the pyramid, for the size that the deepest map has.
        options: Further arguments of timm's constructor (``output_stride``, ``channels``, ...).
        pretrained: Download the encoder's weights.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        in_chans: int = 3,
        width: int = 64,
        atrous_rates: Sequence[int] = (2, 4),
        options: Mapping[str, Any] | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        config = {"features_only": True, "in_chans": in_chans, **(options or {})}
        self.backbone: Any = create_timm(backbone, config, pretrained)
        info: Any = self.backbone.feature_info
        strides, channels = list(info.reduction()), list(info.channels())
        self.channels_last = str(getattr(self.backbone, "output_fmt", "")).endswith("NHWC")  # Swin and its kin
        self.low = next((place for place, stride in enumerate(strides) if stride >= LOW_STRIDE), 0)
        low_width = max(width // 4, 8)
        self.pyramid = ASPP(channels[-1], list(atrous_rates), width)
        self.outline = nn.Sequential(
            nn.Conv2d(channels[self.low], low_width, 1, bias=False), nn.BatchNorm2d(low_width), nn.ReLU()
        )
        self.fuse = nn.Sequential(
            nn.Conv2d(width + low_width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K, h, w) at the low map's size of a normalised image (B, C, H, W)."""
        maps = self.backbone(image)
        if self.channels_last:
            maps = [features.permute(0, 3, 1, 2) for features in maps]
        low, deep = maps[self.low], self.pyramid(maps[-1])
        deep = F.interpolate(deep, size=low.shape[-2:], mode="bilinear", align_corners=False)
        logits: Tensor = self.classifier(self.fuse(torch.cat([deep, self.outline(low)], dim=1)))
        return logits
