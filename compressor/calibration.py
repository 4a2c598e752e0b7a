"""What an 8-bit export needs of the task: training data for the ranges, and a judge of what is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from compressor.data.dataset import Dataset, Subset
from compressor.deployable import Deployable
from compressor.errors import CompressorError
from compressor.evaluate import Feed, evaluate
from compressor.exporters.calibration import CalibrationData
from compressor.exporters.record import record_inputs
from compressor.measurement import torch_driver
from compressor.profiles.target import Target
from compressor.runtimes.load import driver_class
from compressor.runtimes.runtime import Array, Run
from compressor.tasks.task import Task

__all__ = ["FigureJudge", "calibration_data", "calibration_requests"]

_BATCH = 16
_CALLS = 64
"""Recorded calls of a graph: a sampler calls it once a step, and calls of all steps must be among them."""


def calibration_data(task: Task, deployable: Deployable, target: Target, seed: int = 0) -> CalibrationData:
    """Record what the graphs of a deployable get on training data, and set up the judge.

    Args:
        task: Has data and figures.
        deployable: What is exported.
        target: Says how many samples, and how many judge.
        seed: Seed of the driver's noise.
    """
    settings = target.calibration
    requests, notes = calibration_requests(task, deployable, settings.samples, min(_BATCH, target.batch.max))
    records = record_inputs(deployable, requests, limit=max(_CALLS, len(requests)), seed=seed)
    judge = FigureJudge(task, deployable, settings.judged_samples, seed)
    return CalibrationData(records, judge if judge.able else None, notes)


def calibration_requests(
    task: Task, deployable: Deployable, samples: int, batch: int
) -> tuple[list[dict[str, Array]], tuple[str, ...]]:
    """Inputs of the driver from the training split, spread evenly over it; notes where the data are poor.

    Returns:
        Requests of at most ``batch`` samples. Where the training data lack a field that the driver reads, the task's
        own request is repeated.
    """
    wanted = [port.name for port in torch_driver(deployable).inputs]
    dataset = _split(task, "train")
    fields = set(dataset[0]) if dataset is not None and len(dataset) else set()
    if dataset is None or not fields.issuperset(wanted):
        return [task.request(batch) for _ in range(max(1, samples // batch))], ()
    count = min(samples, len(dataset))
    places = np.random.default_rng(0).permutation(len(dataset))[:count]  # sets often lie sorted by class
    chosen = [dataset[int(place)] for place in places]
    notes = []
    if count < samples:
        notes.append(f"The training data have {count} samples to calibrate on; the target asks for {samples}.")
    labels = {int(sample["label"]) for sample in chosen if np.ndim(sample.get("label", ())) == 0}
    if len(labels) == 1 and count > 1 and len(dataset.info.classes) != 1:
        notes.append(
            f"All {count} calibration samples are of one class ({labels.pop()}): ranges may be too narrow for others."
        )
    requests = [
        {name: np.stack([np.asarray(sample[name]) for sample in chosen[start : start + batch]]) for name in wanted}
        for start in range(0, count, batch)
    ]
    return requests, tuple(notes)


class FigureJudge:
    """Tells what of the task's headline figures is lost when the driver runs on other graphs.

    Shares (accuracy, mIoU) count in points: 0.95 to 0.94 is 0.01. Other figures count relatively: 0.01 is a hundredth
    of the model's own. The worst figure counts; a gain is no loss. The validation split is used where the task has one,
    so that the choice of operators is not made on what is measured in the end.

    Args:
        task: Has data and figures.
        deployable: Its modules are the reference.
        samples: Number of samples.
        seed: Seed of the driver's noise.
    """

    def __init__(self, task: Task, deployable: Deployable, samples: int, seed: int = 0) -> None:
        self._task, self._deployable, self._seed = task, deployable, seed
        self._figures = {figure.name: figure.better for figure in task.figures if figure.headline}
        self._feeds = _validation_feeds(task, samples)
        self._reference: Mapping[str, float] | None = None

    @property
    def able(self) -> bool:
        """Whether the task has a figure to judge by."""
        return bool(self._figures)

    def __call__(self, graphs: Mapping[str, Run]) -> float:
        if self._reference is None:
            self._reference = self._measure(torch_driver(self._deployable))
        spec = self._deployable.driver
        driver: Any = driver_class(spec.name)(graphs, spec.settings, self._deployable.assets)
        found = self._measure(driver)
        return max((self._loss(name, found[name]) for name in self._figures if name in found), default=0.0)

    def _measure(self, driver: Any) -> dict[str, float]:
        return evaluate(driver, self._feeds, self._task.metrics(), seed=self._seed)

    def _loss(self, name: str, value: float) -> float:
        own = (self._reference or {})[name]
        lost = own - value if self._figures[name] == "higher" else value - own
        if not np.isfinite(value):
            return float("inf") if np.isfinite(own) else 0.0
        share = self._figures[name] == "higher" and 0 <= own <= 1
        return max(0.0, lost if share or not own else lost / abs(own))


def _validation_feeds(task: Task, samples: int) -> dict[str, Feed]:
    """The task's feeds, of the validation split where that has the same fields and one feed is driven."""
    feeds = dict(task.feeds(samples))
    driven = [name for name, feed in feeds.items() if feed.run]
    validation = _split(task, "val")
    if len(driven) != 1 or validation is None or not len(validation):
        return feeds
    feed = feeds[driven[0]]
    if set(feed.dataset[0]) != set(validation[0]):
        return feeds
    places: Sequence[int] = np.random.default_rng(0).permutation(len(validation))[:samples].tolist()
    return feeds | {driven[0]: replace(feed, dataset=Subset(validation, sorted(places)))}


def _split(task: Task, split: str) -> Dataset | None:
    roles = list(getattr(task, "data", {"train": ""}))
    try:
        return task.dataset(roles[0] if roles else "train", split)
    except CompressorError:
        return None
