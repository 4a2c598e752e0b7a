"""Halves overflow inside a network whose weights and outputs are small; CPU engines that compute in float32 hide it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.exporters.half_arithmetic import JUDGE
from compressor.exporters.openvino_attention import with_whole_attention


class Attention(nn.Module):
    """Attention behind a norm with gains of a thousand; fused on the CPU, where halves hide the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv, self.head = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 4)
        nn.init.constant_(self.norm.weight, 1e3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        result: Tensor = self.head(F.normalize(F.scaled_dot_product_attention(query, key, value), dim=-1))
        return result


class Energy(nn.Module):
    """A power of large features, brought back by its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv1d(8, 8, 1)
        nn.init.constant_(self.layer.bias, 300.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return (h * h + 1).log()


@pytest.mark.parametrize(("module", "operator"), [(Attention(), "MatMul"), (Energy(), "Mul")])
def test_overflow_is_found_without_a_gpu_and_its_operators_stay_in_float32(exported, module, operator):
    x = torch.randn(2, 8, 32)
    made = exported(module.eval(), {"x": x}, "ort-fp16")
    found = [island for island in made.entry.fp32_islands if island.reason == "overflow"]
    assert operator in {name for island in found for name in island.operations}
    assert max(island.peak for island in found) > 65504
    half, engine = made.entry.parity
    assert half.judged_by.startswith(JUDGE) and half.relative <= half.tolerance
    assert engine.relative <= engine.tolerance
    (given,) = made(x=x).values()
    assert np.isfinite(given).all()


class Written(Attention):
    """The same with the logits written out, as without fused attention."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        weights = (query @ key.transpose(-1, -2) / 4).softmax(-1)
        result: Tensor = self.head(F.normalize((weights @ value).transpose(1, 2).flatten(2), dim=-1))
        return result


@pytest.mark.parametrize("module", [Attention(), Written()])
def test_overflow_stays_in_float32_on_openvino_too(exported, module):
    """OpenVINO computes in halves where the processor has them: there its outputs are not finite without the marks."""
    pytest.importorskip("openvino")
    made = exported(module.eval(), {"x": torch.randn(2, 8, 32)}, "openvino-fp16")
    (parity,) = made.entry.parity
    assert parity.relative <= parity.tolerance
    assert any(island.reason == "overflow" for island in made.entry.fp32_islands)


def test_mark_on_the_logits_covers_the_softmax_and_the_product_with_the_values():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"], "project"),
        helper.make_node("MatMul", ["q", "k"], ["l"], "logits"),
        helper.make_node("Mul", ["l", "s"], ["m"], "scale"),
        helper.make_node("Softmax", ["m"], ["p"], "softmax"),
        helper.make_node("MatMul", ["p", "v"], ["a"], "values"),
        helper.make_node("MatMul", ["a", "w"], ["y"], "out"),
    ]
    graph = helper.make_graph(nodes, "attention", [], [])
    assert set(with_whole_attention(graph, ["logits"])) == {"logits", "scale", "softmax", "values"}
    assert with_whole_attention(graph, ["project"]) == ["project"]


def test_every_weight_is_far_below_the_largest_half():
    for module in (Attention(), Energy()):
        assert max(float(parameter.detach().abs().max()) for parameter in module.parameters()) < 65504 / 10
