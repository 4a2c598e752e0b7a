"""The key under which an exported graph is kept changes with all that the graph depends on, and with nothing else."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from compressor.deployable import Graph
from compressor.exporters.fingerprint import graph_fingerprint


class Scaled(nn.Module):
    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.scale, self.table = nn.Linear(2, 2), scale, torch.ones(2)
        self.activation = functools.partial(torch.clamp, min=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.activation(self.layer(x)) * self.table


def key(module: nn.Module, outputs: tuple[str, ...] = ("y",), rows: int = 2) -> str:
    return graph_fingerprint(Graph(module, {"x": torch.randn(rows, 2)}, outputs, {"x": {0: "batch"}}))


def test_fingerprint_is_the_same_for_equal_graphs_whatever_the_example_values_and_the_mode():
    assert key(Scaled()) == key(Scaled().eval())


def test_fingerprint_survives_running_the_module(models):
    graph = models("QwenImageTransformer2DModel").graphs["denoiser"]
    before = graph_fingerprint(graph)
    with torch.no_grad():
        graph.module(**graph.inputs)
    assert graph_fingerprint(graph) == before


def test_fingerprint_changes_with_weights_attributes_tables_functions_and_ports():
    changed = [Scaled(3.0), Scaled(), Scaled(), Scaled()]
    with torch.no_grad():
        changed[1].layer.weight[0, 0] += 1e-6
    changed[2].table = torch.zeros(2)
    changed[3].activation = functools.partial(torch.clamp, min=1)
    keys = [key(Scaled()), *map(key, changed), key(Scaled(), ("z",)), key(Scaled(), rows=3)]
    assert len(set(keys)) == len(keys)
