"""A classifier of whatever library: raw pixels in, logits out, with the normalisation that its weights expect."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from compressor.models.feature_layers import as_embedding, head_layer
from compressor.models.image_network import ImageNetwork, as_taken, logits_in
from compressor.models.taps import tap

__all__ = ["Classifier"]


class Classifier(ImageNetwork):
    """A `Model` as a classifier: its module maps images (B, C, H, W) to logits (B, K), or to an output with ``logits``.

    See `compressor.models.image_network` for what ``Model.info.extra`` tells of it.
    """

    @staticmethod
    def logits(module: nn.Module, image: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Logits (B, K) of a normalised image (B, C, H, W), which is resized where the module takes only one size."""
        return logits_in(module(as_taken(image, size)), "a classifier", "batch", "classes")

    def embed(self, pixels: Tensor, head: str) -> tuple[Tensor, Tensor]:
        """Logits, and what the named head layer reads, as vectors (B, D), both with their gradients."""
        with tap(self.module, head, inputs=True) as inputs:
            logits = self(pixels)
        return logits, as_embedding(inputs[head])

    def head(self, image_shape: Sequence[int]) -> str:
        """Name of the layer that reads the embedding."""
        return head_layer(self.module, self._trial(image_shape))
