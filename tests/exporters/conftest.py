"""Small real models as deployables, and one store of exported graphs for the whole session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.diffusion.denoiser import DenoiserGraph
from tests.tiny_transformers import NAMES, tiny


class ImageNet(nn.Module):
    """A timm network whose input is called ``image``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = timm.create_model(name, num_classes=10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image)
        return logits


def classifier(name: str, size: int) -> Deployable:
    torch.manual_seed(0)
    graph = Graph(ImageNet(name), {"image": torch.rand(2, 3, size, size)}, ("logits",), {"image": {0: "batch"}})
    settings = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "shape": [3, size, size], "classes": 10}
    return Deployable({"classifier": graph}, DriverSpec("predict", settings))


def denoiser(name: str) -> Deployable:
    model = tiny(name, layers=2)
    inputs = {"sample": model.sample, "timestep": model.timestep, **model.condition}
    graph = Graph(DenoiserGraph(model.module), inputs, ("prediction",), {key: {0: "batch"} for key in inputs})
    return Deployable({"denoiser": graph}, DriverSpec("sampler", {"rule": "euler", "shape": [1, 8, 8]}))


MODELS: dict[str, Callable[[], Deployable]] = {
    "resnet": lambda: classifier("test_resnet", 32),
    "vit": lambda: classifier("test_vit", 160),
    **{name: (lambda name=name: denoiser(name)) for name in NAMES},
}


@pytest.fixture(scope="session")
def models() -> Callable[[str], Deployable]:
    """Deployables by name, each built once."""
    made: dict[str, Deployable] = {}

    def get(name: str) -> Deployable:
        if name not in made:
            made[name] = MODELS[name]()
        return made[name]

    return get


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of exported graphs that the tests share."""
    return tmp_path_factory.mktemp("graphs")
