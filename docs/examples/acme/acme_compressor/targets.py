"""Targets of the package, as the entry-point group `compressor.targets` names them."""

from pathlib import Path

ORT_EDGE = Path(__file__).parent / "ort-edge.toml"
