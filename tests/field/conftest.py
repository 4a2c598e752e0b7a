"""Faults that people report of other tools, each with its whole kind, on small inputs through the real path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.exporters.export import export
from compressor.profiles.target import load_target
from compressor.runtimes.load import load_graphs
from compressor.runtimes.manifest import Manifest

Export = Callable[..., "Exported"]


class Exported:
    """An artifact, its manifest, and what it gives."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.entry = manifest.graphs["network"]

    def __call__(self, **inputs: Tensor) -> dict[str, np.ndarray]:
        graph = load_graphs(self.folder, self.manifest, {"threads": 1})["network"]
        try:
            return graph({name: value.numpy() for name, value in inputs.items()})
        finally:
            graph.close()

    def near(self, module: nn.Module, **inputs: Tensor) -> bool:
        """Whether the only output is the module's, within the tolerance of float32."""
        (given,) = self(**inputs).values()
        with torch.no_grad():
            expected = module(**inputs).numpy()
        return given.shape == expected.shape and bool(np.abs(given - expected).max() <= 1e-4 * np.abs(expected).max())


@pytest.fixture
def exported(tmp_path: Path) -> Export:
    """Export a module through `compressor.exporters.export`; one folder of graphs for all targets of a test."""

    def make(
        module: nn.Module,
        inputs: dict[str, Tensor],
        target: str = "ort-fp32",
        outputs: tuple[str, ...] = ("y",),
        **changes: Any,
    ) -> Exported:
        dynamic = changes.get("dynamic", {name: {0: "batch"} for name in inputs})
        graph = Graph(module, inputs, outputs, dynamic)
        deployable = Deployable({"network": graph}, DriverSpec("predict", {}))
        folder = tmp_path / target
        manifest = export(deployable, load_target(target), folder, cache=tmp_path / "graphs")
        return Exported(folder, manifest)

    return make
