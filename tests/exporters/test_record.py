"""Recording what the graphs of a deployable really get."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.exporters.record import record_inputs


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.frozen = nn.Parameter(torch.tensor(2.0)), nn.BatchNorm2d(1).eval()

    def forward(self, image: Tensor) -> Tensor:
        return self.scale * self.frozen(image).flatten(1)


def deployable(module: nn.Module) -> Deployable:
    graph = Graph(module, {"image": torch.zeros(2, 1, 1, 2)}, ("logits",), {"image": {0: "batch"}})
    return Deployable({"classifier": graph}, DriverSpec("predict", {"mean": [0.5], "std": [0.25]}))


def calls(count: int) -> list[dict[str, np.ndarray]]:
    return [{"image": np.full((1, 1, 1, 2), number / count, np.float32)} for number in range(count)]


def test_records_are_what_the_driver_feeds_the_graph():
    (record,) = record_inputs(deployable(Doubles()), calls(1))["classifier"]
    assert np.allclose(record["image"], (0 - 0.5) / 0.25)


def test_records_are_spread_over_all_calls():
    records = record_inputs(deployable(Doubles()), calls(500), limit=10)["classifier"]
    places = [record["image"].ravel()[0] * 0.25 + 0.5 for record in records]
    assert len(places) == 10 and places == sorted(places)
    assert places[0] == 0 and places[-1] > 0.95 and max(np.diff(places)) < 0.2


def test_recording_keeps_the_training_mode_of_every_part():
    module = Doubles()
    module.train().frozen.eval()
    record_inputs(deployable(module), calls(2))
    assert module.training and not module.frozen.training


def test_calls_of_a_pattern_are_all_among_the_records():
    values = [{"image": np.full((1, 1, 1, 2), number % 2, np.float32)} for number in range(320)]
    records = record_inputs(deployable(Doubles()), values, limit=16)["classifier"]
    seen = [bool(record["image"].ravel()[0] > 0) for record in records]
    assert 4 <= sum(seen) <= 12, "guidance calls a graph twice a step: both kinds are needed"
