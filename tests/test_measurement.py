"""Engines are timed with what their own drivers give their graphs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from compressor.deployable import Deployable
from compressor.measurement import TorchEngine, measure_latency
from compressor.models.spec import load_model_spec
from compressor.recipe import Benchmark
from compressor.tasks.classification import Classification
from compressor.tasks.image_networks import ImageNetworkTask
from compressor.tasks.segmentation import Segmentation

TARGET = {"runtime": "torch", "batch": {"min": 1, "max": 4, "benchmark": [1, 2]}}
RESNET = "timm:resnet18?layers=[1,1,1,1],channels=[4,4,8,8],num_classes="


def deployable(task: ImageNetworkTask, channels: int, **options: object) -> Deployable:
    torch.manual_seed(0)
    spec = f"{RESNET}{task.classes},in_chans={channels}" + "".join(f",{k}={v}" for k, v in options.items())
    model = load_model_spec(spec, task=task.name)
    task.check(model)
    return task.deployable(model)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (Classification({"train": "digits"}, {}), {}),
        (Segmentation({"train": "scenes:32?masks=true"}, {}), {"width": 16}),
        (Segmentation({"train": "scenes:32?masks=true"}, {"sizes": "free"}), {"width": 16}),
    ],
    ids=["classification", "segmentation", "free sizes"],
)
def test_a_colour_teacher_and_a_gray_student_are_timed_side_by_side(
    task: ImageNetworkTask, options: Mapping[str, object]
) -> None:
    engines = {
        name: TorchEngine(deployable(task, channels, **options), TARGET)
        for name, channels in (("teacher", 3), ("student", 1))
    }
    (taken,) = engines["student"].graph_inputs(task.request(1)).values()
    assert taken["image"].shape == (1, *task.info.shape)
    measured = measure_latency(engines, task, Benchmark(seconds=0.05, rounds=3))
    for name in engines:
        (graph,) = measured[name]["latency"].values()
        assert set(graph) == set(measured[name]["end_to_end"]) == {"1", "2"}
        assert all(np.isfinite(latency.p50) and latency.p50 > 0 for latency in graph.values())
