"""Calibration requests and the judge of a task: what a run brings to an 8-bit export."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressor.calibration import FigureJudge, calibration_data, calibration_requests
from compressor.data.dataset import ArrayDataset
from compressor.deployable import Deployable
from compressor.evaluate import TorchRun
from compressor.models.spec import load_model_spec
from compressor.profiles.target import load_target
from compressor.tasks.classification import Classification


@pytest.fixture(scope="module")
def task() -> Classification:
    return Classification({"train": "digits"}, {})


@pytest.fixture(scope="module")
def deployable(task: Classification) -> Deployable:
    torch.manual_seed(0)
    model = load_model_spec("timm:resnet18?layers=[1,1,1,1],channels=[8,8,8,8],num_classes=10,in_chans=1")
    return task.deployable(model)


def test_requests_are_training_samples_of_many_classes(task, deployable):
    requests, notes = calibration_requests(task, deployable, 64, 16)
    assert [len(request["image"]) for request in requests] == [16] * 4 and notes == ()
    known = {image.tobytes() for image in task.dataset().fields["image"]}
    assert all(np.asarray(image).tobytes() in known for request in requests for image in request["image"])


def test_few_samples_and_a_single_class_are_named(task, deployable, monkeypatch):
    whole = task.dataset()
    threes = np.flatnonzero(whole.fields["label"] == 3)[:20]
    few = ArrayDataset(whole.info, {name: values[threes] for name, values in whole.fields.items()})
    monkeypatch.setitem(task._sets, ("train", "train"), few)
    requests, notes = calibration_requests(task, deployable, 64, 16)
    assert sum(len(request["image"]) for request in requests) == 20
    assert "have 20 samples" in notes[0] and "one class (3)" in notes[1]


def test_records_hold_what_the_graph_gets(task, deployable):
    data = calibration_data(task, deployable, load_target("ort-int8"))
    records = data.records["classifier"]
    assert sum(len(record["image"]) for record in records) == 256 and data.judge is not None
    settings = deployable.driver.settings
    assert records[0]["image"].min() >= (0 - max(settings["mean"])) / min(settings["std"]) - 1e-5


def test_judge_takes_the_validation_split_and_counts_points(task, deployable):
    judge = FigureJudge(task, deployable, 100)
    graph = deployable.graphs["classifier"]
    run = TorchRun(graph.module, graph.outputs)
    assert judge({"classifier": run}) == 0.0
    assert judge._feeds["test"].dataset.info.fingerprint == task.dataset("train", "val").info.fingerprint
    broken = judge({"classifier": lambda inputs: {"logits": np.full((len(inputs["image"]), 10), np.nan, np.float32)}})
    own = judge._reference["top1"]
    assert broken == pytest.approx(own) and 0 < own < 1
