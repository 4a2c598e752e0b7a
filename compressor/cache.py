"""Where things are kept that can always be made again: trained demos, teacher outputs, what a scan of images found."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """``$COMPRESSOR_CACHE``, else ``~/.cache/compressor``; it need not exist."""
    return Path(os.environ.get("COMPRESSOR_CACHE") or Path.home() / ".cache" / "compressor")
