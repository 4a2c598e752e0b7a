"""A model that is ready to be called by an app: pictures and labels in, pictures and labels out."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.errors import ArtifactError, CompressorError, RequestError, nearest
from compressor.runtimes.images import from_graph, to_graph
from compressor.runtimes.manifest import Manifest
from compressor.runtimes.runtime import Array, Driver, Port

__all__ = ["DRIVER_FAULTS", "Label", "LoadedModel"]

DRIVER_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)
"""What a driver raises when its settings and assets do not fit each other."""
_MOST_AT_ONCE = 4096


@dataclass(frozen=True)
class Label:
    """One class of a classified image.

    Attributes:
        name: Of the class.
        index: Its number.
        probability: In [0, 1].
    """

    name: str
    index: int
    probability: float


class LoadedModel:
    """What `load` returns. It is a `Driver`, and more: call it with what an app has.

    ``model({"image": batch}, seed=0)`` calls the driver as it is: named arrays in, named arrays out. Anything else is
    converted by the kinds of the driver's ports:

    - ``model(image)``, where the driver takes an image: a path, (H, W, C) or (B, H, W, C), uint8 or float in [0, 1].
    - ``model(label=3)``, ``model(label="cat")``, ``model(label=[0, 1])``, where it takes labels; other inputs by name.

    What comes back has no batch axis if none was given:

    - a classifier: a list of `Label`, the most probable first;
    - a driver whose one output is a picture: (H, W, C) uint8; latents: (C, H, W) float32;
    - otherwise: the outputs by name, pictures as uint8.

    Args:
        driver: The driver.
        manifest: What it was made of.
        close: Frees the graphs.
    """

    def __init__(self, driver: Driver, manifest: Manifest, close: Callable[[], None]) -> None:
        self.driver, self.manifest, self._close = driver, manifest, close
        self.inputs, self.outputs = driver.inputs, driver.outputs
        self.labels = _labels(manifest)

    def __call__(self, inputs: Any = None, seed: int = 0, **fields: Any) -> Any:
        if isinstance(inputs, Mapping) and not fields:
            return self.run(inputs, seed)
        if inputs is not None:
            port = next((port for port in self.inputs if port.kind == "image"), None)
            if port is None:
                raise RequestError(f"this model takes no image: call model({_call(self.inputs)})")
            fields = {port.name: inputs, **fields}
        ports = {port.name: port for port in self.inputs}
        arrays, single = {}, True
        for name, value in fields.items():
            arrays[name], batched = self._input(name, value, ports.get(name))
            single = single and not batched
        if not arrays:
            raise RequestError(f"nothing is given: call model({_call(self.inputs)})")
        return self._result(self.run(arrays, seed), single)

    def run(self, inputs: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
        """Call the driver.

        Raises:
            RequestError: The inputs do not fit.
            ArtifactError: The driver fails with what the artifact says.
            TargetError: The engine fails.
        """
        unseeded = isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0
        if unseeded:
            raise RequestError(f"a seed must be a whole number from 0 on, got {seed!r}")
        try:
            return self.driver(inputs, seed=int(seed))
        except CompressorError:
            raise
        except DRIVER_FAULTS as error:
            name = self.manifest.driver.name
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ArtifactError(f"the driver {name!r} cannot take these inputs: {reason}") from error

    def close(self) -> None:
        """Free the graphs; the model cannot be called afterwards."""
        self._close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def label_index(self, label: Any) -> int:
        """The number of a label that is given by name or number.

        Raises:
            RequestError: There is no such label.
        """
        if isinstance(label, numbers.Integral) and not isinstance(label, bool):
            return int(label)
        if isinstance(label, str) and label in self.labels:
            return self.labels.index(label)
        if isinstance(label, str) and label.isdecimal():
            return int(label)
        raise RequestError(
            f"no label {label!r}: {nearest(str(label), self.labels) if self.labels else 'give a number'}"
        )

    def _input(self, name: str, value: Any, port: Port | None) -> tuple[Array, bool]:
        """An input as the driver takes it, and whether it has a batch axis of its own."""
        if port is not None and port.kind == "image":
            return to_graph(value, port)
        if port is not None and port.kind == "label":
            many = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str) and np.ndim(value) == 1
            rows = [self.label_index(label) for label in (value if many else [value])]
            if not 0 < len(rows) <= _MOST_AT_ONCE:
                raise RequestError(f"give 1 to {_MOST_AT_ONCE} labels at once, got {len(rows)}")
            return np.asarray(rows, np.int64), many
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise RequestError(f"the input {name!r} must be an array of numbers")
        return array, True

    def _result(self, outputs: dict[str, Array], single: bool) -> Any:
        scores = next((port for port in self.outputs if port.kind == "scores" and port.name == "probabilities"), None)
        given = [port for port in self.outputs if port.name in outputs]
        images = [port for port in given if port.kind == "image" and outputs[port.name].ndim == 4]
        if scores is not None and outputs[scores.name].ndim == 2:
            found: list[Any] = [self._ranked(row) for row in outputs[scores.name]]
            return found[0] if single else found
        shown = {port.name: from_graph(outputs[port.name], port) for port in images if port.value_range is not None}
        results = {**outputs, **shown}
        if single:
            results = {
                name: value[0] if np.ndim(value) and len(value) == 1 else value for name, value in results.items()
            }
        return results[images[0].name] if len(self.outputs) == len(images) == 1 else results

    def _ranked(self, probabilities: Array) -> list[Label]:
        order = np.argsort(-probabilities, kind="stable")
        return [Label(self._label(int(k)), int(k), float(probabilities[k])) for k in order]

    def _label(self, index: int) -> str:
        return self.labels[index] if index < len(self.labels) else str(index)


def _labels(manifest: Manifest) -> tuple[str, ...]:
    if manifest.bundle is not None and manifest.bundle.labels:
        return manifest.bundle.labels
    labels = manifest.driver.settings.get("labels")
    return tuple(map(str, labels)) if isinstance(labels, list) else ()


def _call(ports: Sequence[Port]) -> str:
    return ", ".join("image" if port.kind == "image" else f"{port.name}=..." for port in ports)
