"""A network of whatever library that looks at images: its normalisation, its input size, its inner features.

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
from compressor.models.feature_layers import FeatureLayer, as_map, layers_named, stages
from compressor.models.model import Model
from compressor.models.taps import tap

__all__ = ["ImageNetwork", "ImageNetworkGraph", "as_taken", "logits_in"]


class ImageNetwork:
    """A `Model` that maps images to logits; subclasses say of what form.

    Args:
        model: The module and its description.

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
        """Logits of pixels (B, C, H, W) in [0, 1]; classes along axis 1."""
        return self.logits(self.module, self.normalise(pixels), self.size)

    @staticmethod
    def logits(module: nn.Module, image: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Logits of a normalised image (B, C, H, W); ``size`` as the attribute."""
        raise NotImplementedError

    def features(self, pixels: Tensor, layers: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the outputs of the named layers as maps (B, C, H, W), all with their gradients."""
        with tap(self.module, *layers) as outputs:
            logits = self(pixels)
        return logits, [as_map(outputs[name], self.seen_size(pixels.shape)) for name in layers]

    def layers(self, image_shape: Sequence[int], names: Sequence[str] | None = None) -> list[FeatureLayer]:
        """Its stages for images of the shape (C, H, W), shallow to deep; or the layers of the given names."""
        run, size = self._trial(image_shape), self.seen_size(image_shape)
        return stages(self.module, run, size) if names is None else layers_named(self.module, run, names, size)

    def seen_size(self, shape: Sequence[int]) -> tuple[int, int]:
        """(H, W) that the module sees of images of the shape (..., H, W)."""
        return self.size or (int(shape[-2]), int(shape[-1]))

    def _trial(self, image_shape: Sequence[int]) -> Callable[[], Tensor]:
        device = next(self.module.parameters()).device
        return lambda: self(torch.zeros(1, *image_shape, device=device))


class ImageNetworkGraph(nn.Module):
    """The export form of a network: a normalised ``image`` (B, C, H, W) in, ``logits`` out."""

    def __init__(self, network: ImageNetwork) -> None:
        super().__init__()
        self.module, self.size, self._logits = network.module, network.size, network.logits
        self.training = self.module.training  # a wrapper in another mode would put the module into it later

    def forward(self, image: Tensor) -> Tensor:
        return self._logits(self.module, image, self.size)


def as_taken(image: Tensor, size: tuple[int, int] | None) -> Tensor:
    """An image (B, C, H, W) resized bilinearly to the only size (H, W) that a module takes, if there is one."""
    if size is None or tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)


def logits_in(output: Any, who: str, *axes: str) -> Tensor:
    """The logits in what a module returned: a tensor, ``out``, ``logits``, or a tuple that begins with them.

    Args:
        output: Of the module.
        who: What it should be, for the message: "a classifier".
        axes: Names of the logits' axes.

    Raises:
        ModelError: There are none with so many axes.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("out", output.get("logits"))
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.dim() != len(axes):
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise ModelError(
            f"{who} must return logits ({', '.join(axes)}), but this one returns {type(output).__name__}{shape}"
        )
    return found
