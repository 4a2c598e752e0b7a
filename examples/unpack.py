"""Unpack a bundle for a program that is not in Python: checked graph files, and what stands around them as plain text.

    python examples/unpack.py digits-ort-fp32.zip models/digits

It writes the graphs' files; ``model.json`` (driver, settings, labels, inputs and outputs, arrays as lists); and
``model.txt``, the same facts of a classifier as lines of words, for programs without a JSON reader.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompressorError, RequestError
from compressor.runtimes.bundle import unpack
from compressor.runtimes.manifest import Manifest, read_assets

MOST_VALUES = 2**22


def described(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The facts that a program needs to run the graphs."""
    assets = read_assets(folder, manifest)
    arrays = {name: value for name, value in assets.items() if isinstance(value, np.ndarray)}
    if sum(array.size for array in arrays.values()) > MOST_VALUES:
        raise RequestError(f"the bundle's tables hold more than {MOST_VALUES} values: read assets.npz itself")
    return {
        "driver": manifest.driver.name,
        "settings": manifest.driver.settings,
        "labels": list(manifest.bundle.labels) if manifest.bundle else [],
        "graphs": {
            name: {"file": graph.file, "inputs": [vars(spec) for spec in graph.inputs]}
            for name, graph in manifest.graphs.items()
        },
        "arrays": {name: {"shape": list(a.shape), "values": a.ravel().tolist()} for name, a in arrays.items()},
    }


def lines(facts: dict[str, Any]) -> str:
    """A word, then its values, a line each; labels last and in order."""
    settings = facts["settings"]
    found = [f"graph {graph['file']}" for graph in facts["graphs"].values()]
    for key in ("mean", "std", "shape"):
        found += [f"{key} {' '.join(map(str, settings[key]))}"] if settings.get(key) else []
    return "\n".join([*found, *(f"label {label}" for label in facts["labels"])]) + "\n"


def main() -> int:
    """Unpack the bundle named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        with unpack(options.bundle) as (folder, manifest):
            facts = described(folder, manifest)
            options.folder.mkdir(parents=True, exist_ok=True)
            for graph in manifest.graphs.values():
                for file in filter(None, (graph.file, graph.data_file)):
                    shutil.copyfile(folder / file, options.folder / Path(file).name)
    except CompressorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    (options.folder / "model.json").write_text(json.dumps(facts), encoding="utf-8")
    (options.folder / "model.txt").write_text(lines(facts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
