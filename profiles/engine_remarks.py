"""What a reader of the report must not miss: engines of fewer bits that are slower than their float32 sibling."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.profiles.report import EngineEntry

__all__ = ["slower_than_float"]


def slower_than_float(engines: Sequence[EngineEntry]) -> list[str]:
    """One line for each engine that gained no time by its precision, against float32 of the same model and runtime."""
    floats = {
        (engine.model, engine.runtime): engine for engine in engines if engine.precision == "fp32" and engine.whole
    }
    lines = []
    for engine in engines:
        base = floats.get((engine.model, engine.runtime))
        if base is None or engine.precision == "fp32":
            continue
        slower = [
            f"{latency.p50:.3g} against {base.whole[batch].p50:.3g} ms at batch {batch}"
            for batch, latency in engine.whole.items()
            if batch in base.whole and latency.p50 > base.whole[batch].p50
        ]
        if slower:
            what = f"{engine.model} on {engine.target} is slower than on {base.target}"
            lines.append(f"{what}: {', '.join(slower)}.")
    return lines
