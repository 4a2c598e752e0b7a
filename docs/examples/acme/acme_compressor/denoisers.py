"""Networks for the denoising task: a student of one's own, and a demo teacher that is trained on first use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compressor.data.digits import digits
from compressor.method import Context
from compressor.models.model import Model, ModelInfo
from compressor.training.curves import one_cycle
from compressor.training.phase import Optim, Phases, Train, Update

__all__ = ["ConvNet", "DigitsDenoiser", "small"]


class ConvNet(nn.Module):
    """A stack of convolutions that tells the noise in an image.

    Args:
        channels: Of the image.
        width: Channels inside.
        depth: Convolutions.
    """

    def __init__(self, channels: int = 1, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        clean: Tensor = image - self.layers(image)
        return clean


def _model(**config: int) -> Model:
    """A model of a class that no library knows: ``package.module:Class`` and its arguments build it again."""
    return Model(ConvNet(**config), ModelInfo("python", "acme_compressor.denoisers:ConvNet", config))


def small() -> Model:
    """The student: ``python:acme_compressor.denoisers:small``."""
    return _model(channels=1, width=8, depth=3)


class DigitsDenoiser:
    """The teacher ``demo:acme-denoiser``: trained once, then kept in the cache."""

    name = "acme-denoiser"
    task = "denoising"
    data = "digits"
    steps = 300
    batch = 64

    def build(self) -> Model:
        return _model(channels=1, width=48, depth=5)

    def fingerprint(self) -> list[Any]:
        """Everything that decides the weights."""
        return [self.name, self.steps, self.batch, digits("train").info.fingerprint]

    def phases(self, model: Model, ctx: Context, steps: int) -> Phases:
        """Mean squared error to the clean image."""
        task: Any = ctx.task

        def step(batches: dict[str, Any], i: int) -> Any:
            clean = batches["train"]["image"]
            noisy = clean + task.options.noise * ctx.normal(i, clean.shape, "noise").to(clean.device)
            yield Update("model", {"clean": (model.module(noisy) - clean).square().mean()})

        optimizer = Optim(model.module.parameters(), lr=2e-3, schedule=one_cycle(steps))
        streams = {"train": ctx.stream("train", self.batch)}
        yield Train("train", steps, {"model": optimizer}, streams, step, {"model": model.module})
