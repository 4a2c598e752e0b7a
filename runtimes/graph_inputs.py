"""The check of a graph's inputs that all runtimes share: names, shapes and element types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from compressor.errors import RequestError
from compressor.runtimes.runtime import Array, TensorSpec

__all__ = ["InputCheck"]

_REMEMBERED = 64
"""Shapes of an input that need no second look."""


class InputCheck:
    """Makes a graph's inputs ready, each the same way for every runtime.

    What is ready already passes with hardly any work: after a large graph has run, the interpreter's own data is out of
    the CPU's caches, and what would take microseconds in a loop takes a tenth of a millisecond.

    Args:
        specs: The graph's inputs.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._names = tuple((spec.name, np.dtype(spec.dtype), set[tuple[int, ...]]()) for spec in specs)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs in the graph's own element types and order, contiguous; names that it does not have are left out.

        Raises:
            RequestError: An input is missing, or its shape does not fit.
        """
        ready: dict[str, Array] = {}
        for name, dtype, shapes in self._names:
            array = inputs.get(name)
            if type(array) is not np.ndarray or array.shape not in shapes or array.dtype != dtype:
                return self._convert(inputs)
            ready[name] = array if array.flags.c_contiguous else np.ascontiguousarray(array)
        return ready

    def _convert(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        missing = [spec.name for spec in self._specs if spec.name not in inputs]
        if missing:
            raise RequestError(f"the graph needs the inputs {', '.join(missing)}; given: {', '.join(inputs) or 'none'}")
        ready: dict[str, Array] = {}
        for spec, (name, dtype, shapes) in zip(self._specs, self._names, strict=True):
            given = np.asarray(inputs[name])
            # ascontiguousarray makes a vector of a scalar
            array: Array = np.ascontiguousarray(given, dtype=dtype).reshape(given.shape)
            if not _fits(spec, array):
                expected = ", ".join(str(size) for size in spec.shape)
                raise RequestError(f"input {name!r} must have the shape ({expected}), got {array.shape}")
            if len(shapes) < _REMEMBERED:
                shapes.add(array.shape)
            ready[name] = array
        return ready


def _fits(spec: TensorSpec, array: Array) -> bool:
    if len(spec.shape) != array.ndim:
        return False
    return all(isinstance(size, str) or size == given for size, given in zip(spec.shape, array.shape, strict=True))
