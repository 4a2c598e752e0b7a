"""A segmenter of whatever library: raw pixels in, logits of every pixel out, at the size of the image.

Libraries return their maps in their own ways (torchvision a mapping with ``out``, transformers an output with
``logits`` at a quarter of the size): here all are maps (B, K, H, W). See `compressor.models.image_network` for what
``Model.info.extra`` tells of a model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from compressor.models.feature_layers import as_map, head_layer
from compressor.models.image_network import ImageNetwork, as_taken, logits_in
from compressor.models.taps import tap

__all__ = ["Segmenter"]


class Segmenter(ImageNetwork):
    """A `Model` as a segmenter: its module maps images (B, C, H, W) to logits (B, K, h, w) in one of those forms."""

    @staticmethod
    def logits(module: nn.Module, image: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Logits (B, K, H, W) of a normalised image (B, C, H, W); maps of another size are resized bilinearly."""
        logits = logits_in(module(as_taken(image, size)), "a segmenter", "batch", "classes", "height", "width")
        if logits.shape[-2:] != image.shape[-2:]:
            logits = F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)
        return logits

    def low_and_last(self, pixels: Tensor, low_layer: str, head: str) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the map that a low layer returns, and the map that the head layer reads, all with their gradients."""
        with tap(self.module, low_layer) as outputs, tap(self.module, head, inputs=True) as inputs:
            logits = self(pixels)
        size = self.seen_size(pixels.shape)
        return logits, as_map(outputs[low_layer], size), as_map(inputs[head], size)

    def head(self, image_shape: Sequence[int]) -> str:
        """Name of the layer that turns the last features into logits; auxiliary heads do not count."""
        return head_layer(self.module, self._trial(image_shape), axis=1, without="aux")
