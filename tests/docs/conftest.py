"""Where the documents' commands can run: a small model, its data, a finished run, a package beside us."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from .documents import EXAMPLE, ROOT, Document, run_command, run_python


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("docs-cache")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Path]:
    """What a reader of `docs/data.md` has made, a finished run at ``runs/ppcl-digits``, and its bundle."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setenv("COMPRESSOR_CACHE", str(cache))
        run_python(Document(ROOT / "docs" / "data.md"))
        _finished_run(folder / "runs" / "ppcl-digits")
        run_command("compress bundle runs/ppcl-digits", "")
        yield folder


def _finished_run(directory: Path) -> None:
    """PPCL on the model and the small data set of `docs/data.md`, with hardly a step."""
    from compressor.pipeline import run
    from compressor.recipe import Recipe

    stage = {"steps": 2, "lr": 1e-3, "batch": 8}
    config = {"calibration": 64, "depth": stage, "finetune": stage, "intervals": [[1, 2]], "keep": 0.8}
    recipe = {
        "methods": [{"name": "ppcl", "config": {**config, "ffn": 0, "text_similarity": None}}],
        "teachers": "diffusers:my-model",
        "data": "python:my_data:squares",
        "budget": 0.01,
        "targets": ["ort-fp32"],
        "task_options": {"num_inference_steps": 2},
        "evaluation": {"samples": 20},
        "benchmark": {"seconds": 0.1, "rounds": 3, "batches": [1]},
    }
    run(Recipe.parse(recipe), directory)


@pytest.fixture
def acme(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example package, installed as pip would leave it; its entry points are those of its ``pyproject.toml``."""
    site = tmp_path / "site"
    shutil.copytree(EXAMPLE / "acme_compressor", site / "acme_compressor", ignore=shutil.ignore_patterns("__pycache__"))
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = site / f"acme_compressor-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = (
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("COMPRESSOR_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "acme_compressor"]:
        monkeypatch.delitem(sys.modules, module)
    importlib.invalidate_caches()
    return site
