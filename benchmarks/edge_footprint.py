"""What a deployment costs: a bundle with numpy and one engine, against PyTorch, on the same classifier.

python benchmarks/edge_footprint.py --out benchmarks/results/edge_footprint.json

Each deployment runs in fresh processes, one after the other, in turn: import, load, first inference, the median of
later ones, peak memory. Its installed size is that of the distributions that it needs: their requirements, followed
from the roots, and the sizes of their files on this disk.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from compressor import __version__
from compressor.profiles.machine import describe_machine

ROOT = Path(__file__).parent.parent
FOLDERS = ("compressor", "methods", "exporters", "runtimes", "profiles")
ARCHITECTURE, SIZE, CLASSES = "mobilenetv3_small_050", 96, 10
BASE = ("numpy", "pydantic", "typer", "rich", "PyYAML", "filelock")

BUNDLE = """
start = now()
from compressor.runtimes import load
import numpy as np
imported = now()
model = load({bundle!r}, {{"threads": 1}})
loaded = now()
image = np.random.default_rng(0).integers(0, 256, ({size}, {size}, 3), np.uint8)
call = lambda: model(image)[0].probability
"""
TORCH = """
start = now()
import torch, timm
import numpy as np
torch.set_num_threads(1)
imported = now()
model = timm.create_model({architecture!r}, num_classes={classes})
model.load_state_dict(torch.load({weights!r}, weights_only=True))
model.eval()
mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
loaded = now()
image = np.random.default_rng(0).integers(0, 256, ({size}, {size}, 3), np.uint8)
def call():
    with torch.inference_mode():
        pixels = (torch.from_numpy(image) / 255 - mean) / std
        return float(model(pixels.permute(2, 0, 1)[None]).softmax(1).max())
"""
MEASURE = """
import json, statistics, time
now = time.perf_counter
{body}
first = call()
answered, cpu = now(), time.process_time()
times = []
for _ in range(50):
    begin = now()
    assert call() == first
    times.append(now() - begin)
from compressor.profiles.memory import peak_rss_mb
print(json.dumps(dict(
    import_s=imported - start, load_s=loaded - imported, first_inference_s=answered - loaded,
    whole_s=answered - start, whole_cpu_s=cpu, inference_ms=statistics.median(times) * 1000,
    peak_memory_mb=peak_rss_mb(), answer=first)))
"""


def prepare(folder: Path) -> dict[str, str]:
    """The same random classifier as bundles for two engines and as PyTorch weights; the body of each deployment."""
    import timm
    import torch

    from compressor.deployable import Deployable, DriverSpec, Graph
    from compressor.exporters.bundle import write_bundle
    from compressor.exporters.export import export
    from compressor.profiles.target import load_target

    class Net(torch.nn.Module):
        """Its input is called ``image``."""

        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(image)
            return logits

    torch.manual_seed(0)
    network = timm.create_model(ARCHITECTURE, num_classes=CLASSES).eval()
    torch.save(network.state_dict(), folder / "weights.pt")
    graph = Graph(Net(network), {"image": torch.rand(2, 3, SIZE, SIZE)}, ("logits",), {"image": {0: "batch"}})
    settings = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "shape": [3, SIZE, SIZE],
        "classes": CLASSES,
    }
    deployable = Deployable({"classifier": graph}, DriverSpec("predict", settings))
    facts = {"size": SIZE, "classes": CLASSES, "architecture": ARCHITECTURE, "weights": str(folder / "weights.pt")}
    bodies = {"torch": TORCH.format(**facts)}
    for name, target in (("onnxruntime", "ort-fp32"), ("openvino", "openvino-fp32")):
        export(deployable, load_target(target), folder / target, cache=folder / "graphs")
        write_bundle(folder / target, folder / f"{target}.zip")
        bodies[name] = BUNDLE.format(**facts, bundle=str(folder / f"{target}.zip"))
    return bodies


def measure(bodies: dict[str, str], repeats: int) -> dict[str, dict[str, float]]:
    """Medians over fresh processes; the first round warms the file cache and does not count."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in bodies}
    for number in range(repeats + 1):
        for name, body in bodies.items():
            code = MEASURE.format(body=body)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            if number:
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: round(statistics.median(one[key] for one in found), 4) for key in found[0]}
        for name, found in runs.items()
    }


def needed(roots: Iterable[str]) -> list[str]:
    """The installed distributions that these require, themselves included."""
    found: dict[str, None] = {}
    open_names = list(roots)
    while open_names:
        name = re.sub(r"[-_.]+", "-", open_names.pop()).lower()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = None
        requirements = map(Requirement, requires)
        open_names += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return sorted(found)


def installed_mb(names: Iterable[str]) -> dict[str, float]:
    """Megabytes of the files of each distribution, largest first; compiled Python does not count."""
    sizes = {}
    for name in names:
        files = importlib.metadata.files(name) or []
        paths = (Path(str(file.locate())) for file in files if "__pycache__" not in file.parts)
        sizes[name] = sum(path.stat().st_size for path in paths if path.is_file()) / 1e6
    return {name: round(size, 2) for name, size in sorted(sizes.items(), key=lambda item: -item[1])}


def own_mb() -> float:
    """Megabytes of this package's sources."""
    return sum(path.stat().st_size for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")) / 1e6


def footprint() -> dict[str, Any]:
    """Installed size of each deployment."""
    result = {}
    for name, roots in {
        "onnxruntime": (*BASE, "onnxruntime"),
        "openvino": (*BASE, "openvino"),
        "torch": ("torch", "timm", "numpy"),
    }.items():
        sizes = installed_mb(needed(roots))
        total = sum(sizes.values())
        result[name] = {"installed_mb": round(total + (own_mb() if name != "torch" else 0), 1), "distributions": sizes}
        gpu = sum(size for part, size in sizes.items() if part.startswith(("nvidia-", "cuda-", "triton")))
        if gpu:
            result[name]["installed_without_cuda_mb"] = round(total - gpu, 1)
    return result


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bodies = prepare(Path(folder))
        figures = measure(bodies, options.repeats)
    sizes = footprint()
    result = {
        "command": "python benchmarks/edge_footprint.py",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "compressor": __version__,
        "machine": describe_machine(),
        "model": f"{ARCHITECTURE}, {SIZE}x{SIZE}, float32, batch 1, one thread",
        "repeats": options.repeats,
        "deployments": {name: figures[name] | sizes[name] for name in figures},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
