"""Append a reproduction's outcome to ``benchmarks/results/reproduction.json``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from compressor.atomic import write_json
from compressor.profiles.machine import describe_machine

__all__ = ["record_result", "stored_result"]

RESULTS = Path(__file__).parents[1] / "results" / "reproduction.json"


def record_result(method: str, outcome: dict[str, Any]) -> None:
    """Put the newest outcome of a method in place of its last, with the date, the command and the machine."""
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    stored[method] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/reproduction/{method.replace('-', '_')}.py",
        "machine": describe_machine(),
        **outcome,
    }
    write_json(RESULTS, stored)


def stored_result(method: str) -> dict[str, Any]:
    """The newest outcome of a method, or nothing."""
    stored: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return dict(stored.get(method, {}))
