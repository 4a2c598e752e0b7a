"""The C library's heap while a CPU trains: memory that one step frees is kept for the next.

PyTorch has no caching allocator on the CPU. glibc gives the end of its heap, and every large block, back to the kernel
when it is freed, and the next step pays page faults (and zeroed pages) for the same memory again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["heap_kept"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # what glibc's own adjustment would reach at most, on 64 bits


@contextmanager
def heap_kept() -> Iterator[None]:
    """Keep freed memory inside the process; give it back at the end. Without effect where the C library is no glibc."""
    try:
        library = ctypes.CDLL(None)
        set_option, trim = library.mallopt, library.malloc_trim
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        yield
        return
    set_option(_TRIM_THRESHOLD, -1)
    set_option(_MMAP_MAX, 0)
    try:
        yield
    finally:
        set_option(_MMAP_MAX, 65536)
        set_option(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        set_option(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        trim(0)
