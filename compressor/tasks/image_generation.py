"""Conditional image generation by diffusion: pixels in [-1, 1] or latents, a sampler around a denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from compressor.data.dataset import ArrayDataset, DataInfo, Dataset, Sample
from compressor.data.sources import load_data
from compressor.data.stream import Batch, stack
from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.diffusion.conditioning import ConditionTable, condition_table
from compressor.diffusion.denoiser import Denoiser, DenoiserGraph
from compressor.errors import RequestError
from compressor.evaluate import Feed, Metric
from compressor.metrics.generated_images import GeneratedImages, judge_features
from compressor.models.model import Model
from compressor.runtimes.runtime import Array, Driver, Run
from compressor.tasks.task import Figure
from compressor.validation import validated

__all__ = ["TASK", "ImageGeneration"]


class Options(BaseModel):
    """Options of the task."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    num_inference_steps: int = Field(20, ge=1)
    """Steps of the sampler in evaluation and in the exported driver."""
    guidance_scale: float = Field(1.0, ge=0)
    """Classifier-free guidance of the sampler; 1 means none."""
    text_tokens: int = Field(2, ge=1)
    """Tokens of the random class prompts that a text-conditional model gets on a labelled set."""


class ImageGeneration:
    """Samples hold ``image`` (C, H, W) and ``label``, the row of the condition tables.

    The judge (see `compressor.models.demos.judges`) is set by the pipeline; without classes there is none, and the
    Fréchet distance is taken on pooled latents.
    """

    name: ClassVar[str] = "image-generation"
    fields: ClassVar[Mapping[str, str]] = {
        "image": "(C, H, W) float32 pixels in [0, 1] or latents",
        "label": "integer row of the condition tables",
    }

    def __init__(self, data: Mapping[str, str], options: Mapping[str, Any]) -> None:
        self.options = validated(Options, options, prefix="task_options")
        self.data = dict(data)
        self.judge: Run | None = None
        self._reference: Array | None = None
        self._tables: dict[str, ConditionTable] = {}
        self._datasets: dict[tuple[str, str], Dataset] = {}

    def dataset(self, role: str = "train", split: str = "train") -> Dataset:
        if (role, split) not in self._datasets:
            self._datasets[role, split] = load_data(self.data[role], split)
        return self._datasets[role, split]

    @property
    def info(self) -> DataInfo:
        """The training set's facts."""
        return self.dataset().info

    @property
    def all_figures(self) -> tuple[Figure, ...]:
        """Every figure that the task knows, with a judge or without."""
        return (
            Figure("accuracy", "Class accuracy", "higher", headline=True),
            Figure("frechet_distance", "Fréchet distance", "lower", headline=True),
            Figure("precision_min", "Precision of the worst class", "higher"),
            Figure("recall_min", "Recall of the worst class", "higher"),
            Figure("diversity", "Diversity within a class", "higher"),
            Figure("pixel_std", "Pixel std", "higher"),
        )

    @property
    def figures(self) -> tuple[Figure, ...]:
        if self.judge is not None:
            return self.all_figures
        judged = ("accuracy", "precision_min", "recall_min")
        return tuple(figure for figure in self.all_figures if figure.name not in judged)

    def to_model(self, images: Array) -> Array:
        """Samples as the model sees them: pixels in [-1, 1], latents as they are."""
        return images if self.info.value_range is None else images * 2 - 1

    def to_pixels(self, images: Array) -> Array:
        """Generated samples as pictures: values in [0, 1]."""
        if self.info.value_range is not None:
            return np.clip((images + 1) / 2, 0, 1)
        low, high = np.quantile(images, 0.01), np.quantile(images, 0.99)
        return np.clip((images - low) / max(high - low, 1e-6), 0, 1)

    def view(self, samples: Sequence[Sample], rngs: Sequence[np.random.Generator] = ()) -> Batch:
        """The collation of training batches."""
        batch = stack(samples)
        return batch if self.info.value_range is None else batch | {"image": batch["image"] * 2 - 1}

    def conditions(self, model: Model) -> ConditionTable:
        """The condition tables for a model (the same for every model of one class and width)."""
        net = Denoiser(model).net
        key = f"{net.library_class} {net.condition_fields()}"
        if key not in self._tables:
            self._tables[key] = condition_table(net, self.info, text_tokens=self.options.text_tokens)
        return self._tables[key]

    def check(self, model: Model) -> None:
        denoiser, shape = Denoiser(model), self.info.shape
        if denoiser.channels != shape[0]:
            raise RequestError(
                f"{model.info.architecture} takes samples of {denoiser.channels} channels, the set "
                f"{self.info.name!r} has {shape[0]}"
            )
        table = self.conditions(model)
        if self.options.guidance_scale != 1 and table.null_row is None:
            raise RequestError("guidance_scale needs an empty condition: the data name no null_row")
        try:
            with torch.no_grad():
                sample, level = torch.zeros(1, *shape), denoiser.schedule.level(torch.zeros(1))
                denoiser.eval()(sample, level, table(torch.zeros(1, dtype=torch.long)))
        except (RuntimeError, ValueError, IndexError) as error:
            raise RequestError(
                f"{model.info.architecture} cannot take samples of shape {tuple(shape)}: {error}"
            ) from error

    def deployable(self, model: Model) -> Deployable:
        denoiser, shape = Denoiser(model), self.info.shape
        table = self.conditions(model)
        device = next(model.module.parameters()).device
        rows = torch.arange(2) % table.rows
        inputs = {"sample": torch.linspace(-1, 1, 2 * int(np.prod(shape))).view(2, *shape)}
        inputs |= {"timestep": denoiser.schedule.timestep(denoiser.schedule.level(torch.tensor([0.3, 0.7])))}
        inputs |= table(rows)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        graph = Graph(DenoiserGraph(model.module), inputs, ("prediction",), {name: {0: "batch"} for name in inputs})
        # a few-step student brings its own steps and is called without guidance, whatever the options say
        own = model.info.extra.get("student_timesteps")
        if own:
            rule, schedule = denoiser.schedule.few_step_sampler(own)
        else:
            rule, schedule = denoiser.schedule.sampler(self.options.num_inference_steps)
        settings = {
            **rule,
            "prediction_type": denoiser.schedule.prediction_type,
            "shape": list(shape),
            "guidance_scale": 1.0 if own else self.options.guidance_scale,
            "null_row": table.null_row,
            "clip": None if self.info.value_range is None else 1.0,
        }
        if self.info.classes:
            settings["labels"] = list(self.info.classes)
        return Deployable({"denoiser": graph}, DriverSpec("sampler", settings), {**schedule, **table.assets()})

    def feeds(self, samples: int) -> dict[str, Feed]:
        labels = np.arange(samples, dtype=np.int64) % self.conditions_asked
        asked = ArrayDataset(replace(self.info, name="balanced labels"), {"label": labels})
        real = self.dataset()
        images = np.stack([self.to_model(np.asarray(real[k]["image"])) for k in range(len(real))])
        reference = ArrayDataset(real.info, {"image": images})
        return {"test": Feed(asked, batch=100), "reference": Feed(reference, batch=256, run=False)}

    @property
    def conditions_asked(self) -> int:
        """How many conditions samples are asked for: the classes, or the prompts without the empty one."""
        if self.info.classes:
            return len(self.info.classes)
        tables: Mapping[str, Array] = self.info.extra.get("conditions", {})
        count = min((len(table) for table in tables.values()), default=1)
        null = self.info.extra.get("null_row")
        return count - 1 if null == count - 1 else count

    def metrics(self) -> list[Metric]:
        judge = self.judge or pooled_latents
        if self._reference is None:
            feed = self.feeds(1)["reference"].dataset
            images = np.stack([feed[k]["image"] for k in range(len(feed))])
            self._reference = judge_features(judge, images)
        names = {figure.name for figure in self.figures}
        metric = GeneratedImages(judge, self.info.classes or 1, self._reference)
        return [_Chosen(metric, names, classless=not self.info.classes)]

    def request(self, batch: int) -> dict[str, Array]:
        return {"label": np.arange(batch, dtype=np.int64) % self.conditions_asked}

    def pictures(self, driver: Driver, seed: int = 0, rows: int = 4, columns: int = 10) -> bytes:
        """A sheet of samples as PNG: a column a label, every row with other noise."""
        from io import BytesIO

        from PIL import Image

        labels = np.arange(columns, dtype=np.int64) % self.conditions_asked
        lines = [self.to_pixels(driver({"label": labels}, seed=seed + row)["image"]) for row in range(rows)]
        channels = 3 if lines[0].shape[1] >= 3 else 1
        sheet = np.stack(lines)[:, :, :channels]  # (rows, columns, C, H, W)
        scale = max(1, 32 // sheet.shape[-1])
        sheet = sheet.repeat(scale, axis=3).repeat(scale, axis=4)
        padded = np.pad(sheet, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1)), constant_values=1.0)
        grid = padded.transpose(0, 3, 1, 4, 2).reshape(rows * padded.shape[3], columns * padded.shape[4], channels)
        picture = Image.fromarray((grid * 255).round().astype(np.uint8).squeeze())
        buffer = BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


class _Chosen:
    """A metric of which only some figures mean something here.

    Args:
        metric: Computes all.
        names: Those that are reported.
        classless: The samples' labels are rows of conditions, not classes: all count as one.
    """

    def __init__(self, metric: GeneratedImages, names: set[str], *, classless: bool) -> None:
        self.metric, self.classless = metric, classless
        self.better = {name: way for name, way in metric.better.items() if name in names}

    def update(self, feed: str, outputs: Mapping[str, Array], samples: Sequence[Sample]) -> None:
        if self.classless:
            samples = [{**sample, "label": 0} for sample in samples]
        self.metric.update(feed, outputs, samples)

    def compute(self) -> dict[str, float]:
        return {name: value for name, value in self.metric.compute().items() if name in self.better}


def pooled_latents(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Stands in for a judge where the data have no classes: features are means over a 4x4 grid of cells."""
    images = torch.from_numpy(np.ascontiguousarray(inputs["image"], np.float32))
    features = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1).numpy()
    return {"features": features, "logits": np.zeros((len(features), 1), np.float32)}


TASK = ImageGeneration
