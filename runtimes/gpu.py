"""Which NVIDIA GPU this machine has, asked of the driver itself: no engine and no toolkit is imported."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

__all__ = ["RTX_CAPABILITIES", "Gpu", "nvidia_gpu"]

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX builds for and runs on."""

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """The first visible NVIDIA GPU.

    Attributes:
        name: As the driver gives it.
        compute_capability: "major.minor".
        driver: Newest CUDA version that the driver serves, "major.minor".
    """

    name: str
    compute_capability: str
    driver: str


@functools.cache
def nvidia_gpu() -> Gpu | None:
    """The first NVIDIA GPU that this process may use, or None: no driver, no device, or all are hidden."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
        count, version, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
            return None
        if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDriverGetVersion(ctypes.byref(version)):
            return None
        text = ctypes.create_string_buffer(128)
        driver.cuDeviceGetName(text, len(text), device)
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    except (OSError, AttributeError):
        return None
    newest = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(text.value.decode(errors="replace"), f"{major.value}.{minor.value}", newest)
