"""What is installed is complete: every folder is a named package, and the built archives hold every file."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "compressor": "compressor",
    "methods": "compressor.methods",
    "exporters": "compressor.exporters",
    "runtimes": "compressor.runtimes",
    "profiles": "compressor.profiles",
}
"""Import path of each folder at the root."""


@pytest.fixture(scope="module")
def setuptools_settings() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return settings


def installed_files() -> dict[str, str]:
    """Every file of the package: its installed path, and its path in the tree."""
    files = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".toml", ".typed") and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT / folder).as_posix()
                files[f"{package.replace('.', '/')}/{inside}"] = f"{folder}/{inside}"
    return files


def test_every_folder_with_modules_is_a_named_package(setuptools_settings: dict[str, Any]) -> None:
    files = installed_files()
    folders = {file.rpartition("/")[0] for file in files if file.endswith(".py")}
    assert [f"{folder}/__init__.py" for folder in sorted(folders) if f"{folder}/__init__.py" not in files] == []
    packages = sorted(folder.replace("/", ".") for folder in folders)
    assert packages == sorted(setuptools_settings["packages"]), "name the folder in [tool.setuptools] packages"


def test_built_archives_hold_every_file_of_the_package(tmp_path: Path) -> None:
    """Built from a copy: building leaves files beside the sources."""
    pytest.importorskip("setuptools")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    wheel = zipfile.ZipFile(next(out.glob("*.whl")))
    assert set(installed_files()) - set(wheel.namelist()) == set()
    assert b"compress = compressor.cli.app:main" in wheel.read("compressor-0.1.0.dist-info/entry_points.txt")
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*installed_files().values(), "pyproject.toml", "README.md", "LICENSE"} - names == set()
