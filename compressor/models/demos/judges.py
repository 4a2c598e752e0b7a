"""Judges: small classifiers that look at generated images. Their features carry the Fréchet distance.

A judge is trained on the real images of the recipe's own data set, with a seed of its own; no method trains against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.atomic import atomic_directory
from compressor.data.dataset import Dataset
from compressor.log import Log
from compressor.method import Context
from compressor.models.demos.catalogue import trained
from compressor.models.spec import load_weights
from compressor.runtimes.runtime import Array
from compressor.training.curves import cosine
from compressor.training.phase import Optim, Phases, Train, Update

__all__ = ["Judge", "JudgeNet", "JudgeRun", "judge_of"]


class JudgeNet(nn.Module):
    """Two convolutions and two linear layers; returns logits (B, classes) and features (B, 64)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.features = nn.Sequential(nn.Linear(32 * 16, 64), nn.ReLU())
        self.classify = nn.Linear(64, classes)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(self.convolutions(image))
        return self.classify(features), features


class Judge:
    """Trains a `JudgeNet` on a labelled set.

    Args:
        dataset: Real samples with ``image`` and ``label``.
        scale: Turns a sample's pixels into the range that generated images have.
    """

    name = "judge"
    steps = 1200
    batch = 64

    def __init__(self, dataset: Dataset, scale: Any) -> None:
        self.dataset, self.scale = dataset, scale

    def build(self) -> JudgeNet:
        """The untrained network."""
        return JudgeNet(self.dataset.info.shape[0], len(self.dataset.info.classes))

    def fingerprint(self) -> list[Any]:
        """Everything that decides the weights."""
        return [self.name, self.steps, self.batch, self.dataset.info.fingerprint, self.dataset.info.shape]

    def phases(self, net: JudgeNet, ctx: Context, steps: int) -> Phases:
        """Cross-entropy, a little noise on the images."""
        stream = ctx.stream("train", self.batch)

        def step(batches: dict[str, Any], i: int) -> Any:
            image = self.scale(batches["train"]["image"])
            noise = ctx.normal(i, image.shape, "noise").to(image.device)
            logits, _ = net(image + 0.1 * noise)
            yield Update("judge", {"cross_entropy": F.cross_entropy(logits, batches["train"]["label"])})

        optim = Optim(net.parameters(), lr=1e-3, schedule=cosine(steps))
        yield Train("train", steps, {"judge": optim}, {"train": stream}, step, {"judge": net})


class JudgeRun:
    """A judge as a `Run`: ``{"image"}`` to ``{"logits", "features"}``."""

    def __init__(self, net: JudgeNet) -> None:
        self.net = net.eval()

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            logits, features = self.net(torch.from_numpy(np.ascontiguousarray(inputs["image"], np.float32)))
        return {"logits": logits.numpy(), "features": features.numpy()}


def judge_of(task: Any, *, budget: float = 1.0, log: Log | None = None) -> JudgeRun | None:
    """The judge of a generation task's data, from the cache or trained now; None where the data have no classes."""
    dataset = task.dataset()
    if not dataset.info.classes:
        return None
    judge = Judge(
        dataset, (lambda image: image * 2 - 1) if dataset.info.value_range is not None else lambda image: image
    )
    directory = trained(judge, task, _save, budget=budget, log=log)
    net = judge.build()
    load_weights(net, directory)
    return JudgeRun(net)


def _save(net: JudgeNet, directory: Path) -> None:
    with atomic_directory(directory) as temporary:
        save_file(net.state_dict(), str(temporary / "judge.safetensors"))
