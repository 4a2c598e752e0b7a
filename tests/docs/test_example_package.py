"""The example of `docs/extending.md` is a real package: found by its entry points, run, its students loaded again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from .documents import EXAMPLE, ROOT, Document, commands, compress, run_command, run_python

GUIDE = Document(ROOT / "docs" / "extending.md")


def test_the_guide_s_commands_run_with_the_package_installed(acme: Path) -> None:
    for block in GUIDE.blocks:
        if block.language == "bash":
            for line in commands(block):
                run_command(line, "")
    report = next(Path("runs").glob("mimic-*/report/report.json"))
    models = {model["name"]: model for model in json.loads(report.read_text())["models"]}
    assert models["student"]["parameters"] < models["teacher"]["parameters"] / 10
    assert all(model["metrics"]["psnr"] > 14 for model in models.values()), "14 dB is what the noise leaves"
    from compressor.runtimes import load

    driver = load(report.parent.parent / "artifacts" / "ort-edge")
    assert driver({"image": np.full((3, 1, 8, 8), 128, np.uint8)})["image"].shape == (3, 1, 8, 8)


def test_the_guide_s_python_trains_a_shortened_network_that_loads_again(acme: Path) -> None:
    names = run_python(GUIDE, "acme")
    assert names["report"].is_file()
    student = names["student"]
    assert [change.name for change in student.info.edits] == ["drop-blocks.keep"]
    assert len(student.module.transformer_blocks) == 6
    assert student.info.config["num_layers"] == 12


def test_the_catalogue_shows_the_package_s_methods_with_their_keys(acme: Path) -> None:
    code, out, _ = compress(["methods", "drop-blocks", "--json"])
    assert code == 0
    assert {row["key"]: row["default"] for row in json.loads(out)["config"]}["keep"] == 6
    listed = {one["name"]: one for one in json.loads(compress(["methods", "--json"])[1])["methods"]}
    assert listed["mimic"]["family"] == "acme-compressor"
    targets = {row["name"] for row in json.loads(compress(["targets", "--json"])[1])["targets"]}
    assert "ort-edge" in targets


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "keep=1"], "keep"),
        (["--set", "kep=4"], "did you mean keep"),
        (["--student", "timm:resnet18"], "takes no --student"),
    ],
)
def test_a_wrong_request_to_the_package_s_method_is_one_line(acme: Path, arguments: list[str], message: str) -> None:
    code, _, err = compress(["run", "--method", "drop-blocks", *arguments, "--dry-run"])
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_the_driver_of_the_package_imports_no_torch(acme: Path) -> None:
    code = "import sys, acme_compressor.denoise_driver; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_guide_s_entry_point_groups_are_those_that_the_code_reads() -> None:
    named = {row[0] for row in GUIDE.table("group")}
    folders = ("compressor", "profiles", "runtimes", "exporters")
    sources = [path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    read = {
        group for text in sources for group in re.findall(r'(?:group=|GROUP = |_sources\()"(compressor\.\w+)"', text)
    }
    assert named == read
    used = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]
    assert set(used) <= named
