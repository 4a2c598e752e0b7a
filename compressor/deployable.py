"""What a method hands to the exporter: graphs, the driver around them, and what the driver needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.runtimes.runtime import Array

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Deployable", "DriverSpec", "Graph"]


@dataclass(frozen=True)
class DriverSpec:
    """Which driver of `compressor.runtimes.drivers` runs the graphs, and its JSON settings."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Graph:
    """One module in its export form (constants folded, adapters merged), with named example inputs.

    Attributes:
        module: Called with the inputs by keyword; returns a tensor or a tuple of tensors.
        inputs: Example tensors by name, in the order of the module's ``forward``. Batch size at least 2, so that the
            exporter can tell a dynamic axis from a constant.
        outputs: Names of the outputs, in order.
        dynamic: Free axes by input name: ``{"sample": {0: "batch"}}``. Axes of the same name have the same size.
        keep_fp32: Names (module paths) that should stay in float32 in half-precision graphs; measuring may add more.

    Sparsity masks are folded here: the module is then a copy with plain weights.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    keep_fp32: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from compressor.models.edits.sparsity import fold

        self.module = fold(self.module)


@dataclass
class Deployable:
    """A deployable result.

    Attributes:
        graphs: The networks, by name.
        driver: The loop around them.
        assets: Arrays (schedules, class vectors, tables) and strings (label names, a tokenizer) that the driver reads.
        files: Files of every artifact that are no graph (a scene): name to a function that writes it to a path.
        results: What the run hands over beside its engines, which no driver reads (a distilled data set): name to a
            function that writes a file or a folder. A name that ends in ``.png`` is shown in the report.
    """

    graphs: dict[str, Graph]
    driver: DriverSpec
    assets: dict[str, Array | str] = field(default_factory=dict)
    files: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    results: dict[str, Callable[[Path], None]] = field(default_factory=dict)
