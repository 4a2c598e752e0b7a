"""The check of a graph's inputs that all runtimes share: names, shapes and element types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from compressor.errors import RequestError
from compressor.runtimes.runtime import Array, TensorSpec

__all__ = ["check_inputs"]


def check_inputs(specs: Sequence[TensorSpec], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs in the graph's own element types, contiguous; names that the graph does not have are left out.

    Raises:
        RequestError: An input is missing, or its shape does not fit.
    """
    missing = [spec.name for spec in specs if spec.name not in inputs]
    if missing:
        raise RequestError(f"the graph needs the inputs {', '.join(missing)}; given: {', '.join(inputs) or 'none'}")
    ready: dict[str, Array] = {}
    for spec in specs:
        given = np.asarray(inputs[spec.name])
        # ascontiguousarray makes a vector of a scalar
        array: Array = np.ascontiguousarray(given, dtype=np.dtype(spec.dtype)).reshape(given.shape)
        if not _fits(spec, array):
            expected = ", ".join(str(size) for size in spec.shape)
            raise RequestError(f"input {spec.name!r} must have the shape ({expected}), got {array.shape}")
        ready[spec.name] = array
    return ready


def _fits(spec: TensorSpec, array: Array) -> bool:
    if len(spec.shape) != array.ndim:
        return False
    return all(isinstance(size, str) or size == given for size, given in zip(spec.shape, array.shape, strict=True))
