"""A segmenter of whatever library: raw pixels in, logits of every pixel out, at the size of the image.

Libraries return their maps in their own ways (torchvision a mapping with ``out``, transformers an output with
``logits`` at a quarter of the size): here all are maps (B, K, H, W). See `compressor.models.image_network` for what
``Model.info.extra`` tells of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.models.feature_layers import as_map, head_layer
from compressor.models.image_network import ImageNetwork
from compressor.models.taps import tap

__all__ = ["Segmenter", "SegmenterGraph", "maps_of"]


class Segmenter(ImageNetwork):
    """A `Model` as a segmenter: its module maps images (B, C, H, W) to logits (B, K, h, w) in one of those forms."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits (B, K, H, W) of pixels (B, C, H, W) in [0, 1]; maps of another size are resized bilinearly."""
        return call_module(self.module, self.normalise(pixels), self.size)

    def low_and_last(self, pixels: Tensor, low_layer: str, head: str) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the map that a low layer returns, and the map that the head layer reads, all with their gradients."""
        with tap(self.module, low_layer) as outputs, tap(self.module, head, inputs=True) as inputs:
            logits = self(pixels)
        size = self.seen_size(pixels.shape)
        return logits, as_map(outputs[low_layer], size), as_map(inputs[head], size)

    def head(self, image_shape: Sequence[int]) -> str:
        """Name of the layer that turns the last features into logits; auxiliary heads do not count."""
        return head_layer(self.module, self._trial(image_shape), axis=1, without="aux")


class SegmenterGraph(nn.Module):
    """The export form of a segmenter: a normalised ``image`` (B, C, H, W) in, ``logits`` (B, K, H, W) out."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.module, self.size = segmenter.module, segmenter.size
        self.training = self.module.training  # a wrapper in another mode would put the module into it later

    def forward(self, image: Tensor) -> Tensor:
        return call_module(self.module, image, self.size)


def call_module(module: nn.Module, image: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Logits (B, K, H, W) of a normalised image (B, C, H, W), which is resized where the module takes only one size."""
    fitted = image
    if size is not None and tuple(image.shape[-2:]) != size:
        fitted = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    logits = maps_of(module(fitted))
    if logits.shape[-2:] != image.shape[-2:]:
        logits = F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)
    return logits


def maps_of(output: Any) -> Tensor:
    """The logits in what a segmenter returned: a tensor, ``out``, ``logits``, or a tuple that begins with them.

    Raises:
        ModelError: There are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("out", output.get("logits"))
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.dim() != 4:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise ModelError(
            "a segmenter must return logits (batch, classes, height, width), but this one returns "
            f"{type(output).__name__}{shape}"
        )
    return found
