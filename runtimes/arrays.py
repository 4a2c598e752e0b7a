"""Read named arrays (.npz) from a source that is not trusted: no pickle, no array larger than its bytes."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from compressor.errors import ArtifactError
from compressor.runtimes.runtime import Array
from compressor.runtimes.zip_reader import Limits, ZipReader

__all__ = ["read_arrays"]

_LIMITS = Limits(total_bytes=8 * 2**30)
_KINDS = "biufc"
"""Kinds of numbers that are read: bool, integers, floats."""


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a file by name.

    numpy's own reader makes room for the size that a header claims before it looks at the data; here the data must be
    there first.

    Raises:
        ArtifactError: The file is damaged, or an array holds anything but numbers.
    """
    with ZipReader(path, _LIMITS) as archive:
        return {name.removesuffix(".npy"): _array(archive, name) for name in archive.entries}


def _array(archive: ZipReader, name: str) -> Array:
    data = archive.read(name, _LIMITS.total_bytes)
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read[version](file)
        if dtype.kind not in _KINDS or dtype.hasobject:
            raise ValueError(f"it holds {dtype}, which are no numbers")
        count = math.prod(shape)
        if min(shape, default=0) < 0 or count * dtype.itemsize != len(data) - file.tell():
            raise ValueError(f"its shape {shape} and its size do not agree")
        flat = np.frombuffer(data, dtype, count, file.tell()) if count else np.empty(0, dtype)
        return flat.reshape(shape, order="F" if fortran else "C").copy()
    except Exception as error:  # numpy hands the header to Python's own parser, which raises what it likes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArtifactError(f"{archive.path} is damaged: {name}: {reason}") from error
