"""The two interfaces of the deployed side: a `Runtime` runs one graph, a `Driver` is the loop around the graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

__all__ = ["Array", "Driver", "Port", "Run", "Runtime", "TensorSpec"]

Array = np.ndarray[Any, Any]

Run = Callable[[Mapping[str, Array]], dict[str, Array]]
"""One loaded graph, whatever runs it: named arrays in, named arrays out."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Attributes:
        name: The graph's own name of it.
        shape: Sizes; a string names a dynamic axis ("batch").
        dtype: numpy's name of the element type, e.g. "float16".
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@runtime_checkable
class Runtime(Protocol):
    """A loaded graph that can be described, run and closed. Calling it makes it a `Run`.

    Inputs are cast to the graph's own dtypes; outputs come back in the graph's dtypes.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Port:
    """An input or output of a driver, for the manifest and for `compress infer`.

    Attributes:
        name: Key in the mapping that the driver takes or returns.
        kind: What it means: "label", "image", "scores", "boxes", "mask", "tokens", ...
        shape: Sizes; a string names a free axis.
        dtype: numpy's name of the element type.
        value_range: Of an image: the values of black and white. None where it is no picture (latents).
    """

    name: str
    kind: str
    shape: tuple[int | str, ...]
    dtype: str
    value_range: tuple[float, float] | None = (0.0, 1.0)


class Driver(Protocol):
    """Everything between an app's arrays and the graphs: normalisation, noise, loops, suppression, tiling.

    A driver is built from the loaded graphs, its JSON settings and its assets, and draws all random numbers in numpy
    from ``seed``, so every engine and torch itself see the same noise.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def __init__(
        self, graphs: Mapping[str, Run], settings: Mapping[str, Any], assets: Mapping[str, Array | str]
    ) -> None: ...

    def __call__(self, inputs: Mapping[str, Array], seed: int = 0) -> dict[str, Array]: ...
