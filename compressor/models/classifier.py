"""A classifier of whatever library: raw pixels in, logits out, with the normalisation that its weights expect.

What the weights alone do not say stands in ``Model.info.extra``:

- ``mean``, ``std``: of its normalisation, one number a channel, for pixels in [0, 1]; raw pixels without them;
- ``size``: [H, W] of the only input that it takes; absent where any size will do;
- ``classes``: names of its classes, where they are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.models.feature_layers import FeatureLayer, as_embedding, as_map, head_layer, layers_named, stages
from compressor.models.model import Model
from compressor.models.taps import tap

__all__ = ["Classifier", "ClassifierGraph"]


class Classifier:
    """A `Model` as a classifier.

    Args:
        model: Any module that maps images (B, C, H, W) to logits (B, K), or to an output that holds ``logits``.

    Attributes:
        mean, std: One number a channel.
        size: (H, W) of its inputs, or None.
    """

    def __init__(self, model: Model) -> None:
        self.model, extra = model, model.info.extra
        self.mean: tuple[float, ...] = tuple(extra.get("mean") or (0.0,))
        self.std: tuple[float, ...] = tuple(extra.get("std") or (1.0,))
        self.size: tuple[int, int] | None = tuple(extra["size"]) if extra.get("size") else None  # type: ignore[assignment]
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def module(self) -> nn.Module:
        """The library's module."""
        return self.model.module

    def parameters(self) -> Iterator[nn.Parameter]:
        """The module's parameters."""
        return self.module.parameters()

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] as the module's input; gray images fill all channels of a colour model."""
        if pixels.device not in self._constants:
            pair = torch.tensor([self.mean, self.std], device=pixels.device)[:, None, :, None, None]
            self._constants[pixels.device] = (pair[0], pair[1])
        mean, std = self._constants[pixels.device]
        return (pixels - mean) / std

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W) in [0, 1]; other sizes than the model's own are resized bilinearly."""
        return call_module(self.module, self.normalise(pixels), self.size)

    def features(self, pixels: Tensor, layers: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the outputs of the named layers as maps (B, C, H, W), all with their gradients."""
        with tap(self.module, *layers) as outputs:
            logits = self(pixels)
        return logits, [as_map(outputs[name]) for name in layers]

    def embed(self, pixels: Tensor, head: str) -> tuple[Tensor, Tensor]:
        """Logits, and what the named head layer reads, as vectors (B, D), both with their gradients."""
        with tap(self.module, head, inputs=True) as inputs:
            logits = self(pixels)
        return logits, as_embedding(inputs[head])

    def layers(self, image_shape: Sequence[int], names: Sequence[str] | None = None) -> list[FeatureLayer]:
        """Its stages for images of the shape (C, H, W), shallow to deep; or the layers of the given names."""
        run = self._trial(image_shape)
        return stages(self.module, run) if names is None else layers_named(self.module, run, names)

    def head(self, image_shape: Sequence[int]) -> str:
        """Name of the layer that reads the embedding."""
        return head_layer(self.module, self._trial(image_shape))

    def _trial(self, image_shape: Sequence[int]) -> Callable[[], Tensor]:
        device = next(self.module.parameters()).device
        return lambda: self(torch.zeros(1, *image_shape, device=device))


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
