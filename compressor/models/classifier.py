"""A classifier of whatever library: raw pixels in, logits out, with the normalisation that its weights expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.models.feature_layers import as_embedding, head_layer
from compressor.models.image_network import ImageNetwork
from compressor.models.taps import tap

__all__ = ["Classifier", "ClassifierGraph"]


class Classifier(ImageNetwork):
    """A `Model` as a classifier: its module maps images (B, C, H, W) to logits (B, K), or to an output with ``logits``.

    See `compressor.models.image_network` for what ``Model.info.extra`` tells of it.
    """

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W) in [0, 1]; other sizes than the model's own are resized bilinearly."""
        return call_module(self.module, self.normalise(pixels), self.size)

    def embed(self, pixels: Tensor, head: str) -> tuple[Tensor, Tensor]:
        """Logits, and what the named head layer reads, as vectors (B, D), both with their gradients."""
        with tap(self.module, head, inputs=True) as inputs:
            logits = self(pixels)
        return logits, as_embedding(inputs[head])

    def head(self, image_shape: Sequence[int]) -> str:
        """Name of the layer that reads the embedding."""
        return head_layer(self.module, self._trial(image_shape))


class ClassifierGraph(nn.Module):
    """The export form of a classifier: a normalised ``image`` (B, C, H, W) in, ``logits`` (B, K) out."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.module, self.size = classifier.module, classifier.size
        self.training = self.module.training  # a wrapper in another mode would put the module into it later

    def forward(self, image: Tensor) -> Tensor:
        return call_module(self.module, image, self.size)


def call_module(module: nn.Module, image: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Logits of a normalised image, resized where the module takes only one size."""
    if size is not None and tuple(image.shape[-2:]) != size:
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    return logits_of(module(image))


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier returned: a tensor, an output with ``logits``, or a tuple that begins with them.

    Raises:
        ModelError: There are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.dim() != 2:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise ModelError(
            f"a classifier must return logits (batch, classes), but this one returns {type(output).__name__}{shape}"
        )
    return found
