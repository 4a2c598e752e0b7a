"""A model exported in training mode: dropout in the file, or noise that no run repeats."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import RequestError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip


class Stubborn(nn.Module):
    """Stays in training mode whatever it is told, as a forgotten override does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self.body(input)
        return result


@pytest.mark.parametrize("make", [network, Stubborn])
def test_model_left_in_training_mode_is_exported_in_evaluation_mode(exported, make):
    module = make().train()
    made = exported(module, {"input": torch.rand(2, 3, 8, 8)})
    assert module.training
    kinds = {node.op_type for node in onnx.load(made.folder / "network.onnx").graph.node}
    assert not kinds & {"Dropout", "BatchNormalization", "RandomUniformLike"}
    for part in module.modules():
        part.training = False
    assert made.near(module, input=torch.rand(3, 3, 8, 8))


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@pytest.mark.parametrize("module", [Dropping(), Noisy()])
def test_model_that_is_random_in_evaluation_mode_is_refused_in_one_line(exported, module):
    with pytest.raises(RequestError, match="gives other outputs for the same inputs each time") as caught:
        exported(module.eval(), {"x": torch.rand(2, 8)})
    assert "\n" not in str(caught.value)
