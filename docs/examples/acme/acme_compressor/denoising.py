"""Denoising: take white noise of a known strength off an image; measured by PSNR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from compressor.data.dataset import ArrayDataset, Dataset, Sample
from compressor.data.sources import load_data
from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.errors import RequestError
from compressor.evaluate import Feed, Metric
from compressor.models.model import Model
from compressor.runtimes.runtime import Array
from compressor.tasks.task import Figure
from compressor.validation import validated

__all__ = ["TASK", "Denoising"]


class Options(BaseModel):
    """Options of the task: ``task_options`` of a recipe."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    noise: float = Field(0.2, gt=0)
    """Standard deviation of the noise; pixels lie in [0, 1]."""


class Denoising:
    """Samples hold ``image`` (C, H, W), clean; the noise is drawn when it is needed."""

    name: ClassVar[str] = "denoising"
    fields: ClassVar[Mapping[str, str]] = {"image": "(C, H, W) float32 pixels in [0, 1]"}
    figures = (Figure("psnr", "PSNR", "higher", unit="dB", headline=True),)

    def __init__(self, data: Mapping[str, str], options: Mapping[str, Any]) -> None:
        self.options = validated(Options, options, prefix="task_options")
        self.data = dict(data)

    def dataset(self, role: str = "train", split: str = "train") -> Dataset:
        return load_data(self.data[role], split)

    def check(self, model: Model) -> None:
        """Refuse a model that does not take these images, before any work."""
        shape = self.dataset().info.shape
        try:
            with torch.no_grad():
                model.module(torch.zeros(1, *shape))
        except RuntimeError as error:
            raise RequestError(f"{model.info.architecture} cannot take images of shape {shape}: {error}") from error

    def deployable(self, model: Model) -> Deployable:
        """One graph; the driver around it is `acme_compressor.denoise_driver`."""
        shape, device = self.dataset().info.shape, next(model.module.parameters()).device
        example = {"image": torch.from_numpy(self.request(2)["image"]).to(device)}
        graph = Graph(model.module, example, outputs=("clean",), dynamic={"image": {0: "batch"}})
        return Deployable({"network": graph}, DriverSpec("acme-denoise", {"shape": list(shape)}))

    def feeds(self, samples: int) -> dict[str, Feed]:
        """The first test images, with the same noise for every model and engine."""
        whole = self.dataset(split="test")
        clean = np.stack([whole[k]["image"] for k in range(min(samples, len(whole)))])
        noise = np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
        info = replace(whole.info, name="noisy test images")
        fields = {"image": clean + np.float32(self.options.noise) * noise, "clean": clean}
        return {"test": Feed(ArrayDataset(info, fields), batch=64)}

    def metrics(self) -> list[Metric]:
        return [Psnr()]

    def request(self, batch: int) -> dict[str, Array]:
        """What one call of the driver gets while it is timed."""
        return {"image": np.random.default_rng(0).random((batch, *self.dataset().info.shape), np.float32)}


class Psnr:
    """Peak signal-to-noise ratio of the driver's ``image`` against the sample's ``clean``, mean over images, in dB."""

    def __init__(self) -> None:
        self.better: Mapping[str, Literal["higher", "lower"]] = {"psnr": "higher"}
        self._values: list[float] = []

    def update(self, feed: str, outputs: Mapping[str, Array], samples: Sequence[Sample]) -> None:
        for restored, sample in zip(outputs["image"], samples, strict=True):
            error = float(np.square(restored - sample["clean"]).mean())
            self._values.append(-10 * float(np.log10(max(error, 1e-10))))

    def compute(self) -> dict[str, float]:
        return {"psnr": float(np.mean(self._values))}


TASK = Denoising
