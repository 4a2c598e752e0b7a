"""One evaluation for all: the teacher, the student and every engine are drivers over graphs, measured alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from compressor.data.dataset import Dataset, Sample
from compressor.runtimes.runtime import Array, Driver

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Feed", "Metric", "TorchRun", "evaluate"]


@dataclass(frozen=True)
class Feed:
    """A set of samples that goes through the driver, or (``run`` False) straight to the metrics as a reference."""

    dataset: Dataset
    batch: int = 1
    run: bool = True


class Metric(Protocol):
    """Collects outputs and computes figures.

    Attributes:
        better: Which way each figure of `compute` improves, by name.
    """

    @property
    def better(self) -> Mapping[str, Literal["higher", "lower"]]: ...

    def update(self, feed: str, outputs: Mapping[str, Array], samples: Sequence[Sample]) -> None: ...

    def compute(self) -> dict[str, float]: ...


def evaluate(driver: Driver, feeds: Mapping[str, Feed], metrics: Sequence[Metric], seed: int = 0) -> dict[str, float]:
    """Run every feed through the driver and compute the metrics.

    Batch k of a feed is driven with ``seed + k``, so every engine sees the same noise.
    """
    for name, feed in feeds.items():
        for number, start in enumerate(range(0, len(feed.dataset), feed.batch)):
            stop = min(start + feed.batch, len(feed.dataset))
            samples = [feed.dataset[index] for index in range(start, stop)]
            outputs: Mapping[str, Array] = {}
            if feed.run:
                inputs = {p.name: np.stack([np.asarray(s[p.name]) for s in samples]) for p in driver.inputs}
                outputs = driver(inputs, seed=seed + number)
            for metric in metrics:
                metric.update(name, outputs, samples)
    return {key: value for metric in metrics for key, value in metric.compute().items()}


class TorchRun:
    """A torch module as a `Run`: the same driver code then measures the model before its export.

    Args:
        module: Called with the inputs by keyword.
        outputs: Names of what it returns, in order.
    """

    def __init__(self, module: nn.Module, outputs: Sequence[str]) -> None:
        self.module, self.outputs = module, tuple(outputs)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        parameter = next(iter(self.module.parameters()), torch.empty(0))
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        tensors = {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)
            for name, value in tensors.items()
        }
        training = [part for part in self.module.modules() if part.training]  # some may be in eval mode on purpose
        self.module.eval()
        with torch.no_grad():
            result = self.module(**tensors)
        for part in training:
            part.training = True
        values = result if isinstance(result, (tuple, list)) else (result,)
        return {name: value.float().cpu().numpy() for name, value in zip(self.outputs, values, strict=True)}
