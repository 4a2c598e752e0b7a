"""Peak memory of an NVIDIA GPU while something runs on it, asked of its driver: no engine, no toolkit is imported."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["DevicePeak", "device_memory_in_use", "watch_device_memory"]

_INTERVAL_SECONDS = 0.002


class _NvmlMemory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


@dataclass
class DevicePeak:
    """What `watch_device_memory` saw.

    Attributes:
        bytes: Largest use so far above that at the start, of all processes on the device together. None where there is
            no such device.
    """

    bytes: int | None = None


@contextmanager
def watch_device_memory(in_use: Callable[[], int] | None) -> Iterator[DevicePeak]:
    """Sample a device's memory every 2 ms until the end.

    Another process that allocates on the same device meanwhile is counted, too: the figure is good on a GPU that does
    nothing else. A buffer that lives shorter than 2 ms may be missed.

    Args:
        in_use: Bytes in use now, as `device_memory_in_use` gives it; None watches nothing.
    """
    peak = DevicePeak()
    if in_use is None:
        yield peak
        return
    start, ended = in_use(), threading.Event()

    def look() -> None:
        peak.bytes = max(peak.bytes or 0, in_use() - start)

    def watch() -> None:
        while not ended.wait(_INTERVAL_SECONDS):
            look()

    watcher = threading.Thread(target=watch, name="device-memory", daemon=True)
    look()
    watcher.start()
    try:
        yield peak
    finally:
        look()
        ended.set()
        watcher.join()


def device_memory_in_use(device: str) -> Callable[[], int] | None:
    """A function that tells the bytes in use on "cuda" or "cuda:N"; None for other devices, and without such a GPU.

    N counts as CUDA does, over the devices that this process may see.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return None
    windows = sys.platform == "win32"
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if windows else "libcuda.so.1")
        nvml = ctypes.CDLL("nvml.dll" if windows else "libnvidia-ml.so.1")
        ordinal, bus, handle = ctypes.c_int(), ctypes.create_string_buffer(32), ctypes.c_void_p()
        failed = (
            cuda.cuInit(0)
            or cuda.cuDeviceGet(ctypes.byref(ordinal), int(number or 0))
            or cuda.cuDeviceGetPCIBusId(bus, len(bus), ordinal)
            or nvml.nvmlInit_v2()
            or nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle))
        )
    except (OSError, AttributeError):
        return None
    if failed:
        return None

    def in_use() -> int:
        memory = _NvmlMemory()
        nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        return int(memory.used)

    return in_use
