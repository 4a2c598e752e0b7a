"""The documents are true: commands and snippets run, links lead somewhere, tables agree with the code."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from .documents import ROOT, Document, commands, documents, run_command, run_python, write_files

README = Document(ROOT / "README.md")


def of(name: str) -> Document:
    return Document(ROOT / "docs" / name)


def name_of(document: Document) -> str:
    return document.path.name


@pytest.fixture
def quick_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two libraries instead of all: each is imported in a process of its own."""
    from compressor.cli import doctor

    monkeypatch.setattr(doctor, "PROBES", [p for p in doctor.PROBES if p.name in ("onnxruntime", "tensorrt")])


# --- what runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_every_command_of_a_document_runs(document: Document, workspace: Path, quick_doctor: None) -> None:
    write_files(document)
    for block in document.blocks:
        assert block.language in ("bash", "python", "text", "toml", "yaml"), "blocks of this kind are not tested"
        if block.language == "bash" and block.value != "acme":
            for line in commands(block):
                run_command(line, block.value)


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_every_snippet_of_a_document_runs(document: Document, workspace: Path) -> None:
    run_python(document)


def test_the_data_set_of_the_snippet_is_found_by_its_spec(workspace: Path) -> None:
    from compressor.data.sources import load_data

    assert load_data("python:my_data:squares", "test").info.classes == ("small", "large")


def test_the_app_gets_what_the_snippet_says(workspace: Path) -> None:
    names = run_python(of("deploy.md"))
    assert names["images"].shape == (1, 1, 8, 8)
    assert [port.name for port in names["model"].inputs] == ["label"]


def test_examples_in_the_documents_stand_in_the_files_that_they_are_of() -> None:
    for document in documents():
        for block in document.blocks:
            if block.kind == "file":
                source = document.path.parent / block.value
                assert block.stands_in(source.read_text()), f"{block.value} lacks:\n{block.text}"


# --- what is claimed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_links_lead_somewhere(document: Document) -> None:
    for link in document.links:
        name, _, anchor = link.partition("#")
        path = document.path.parent / name if name else document.path
        assert path.exists(), f"{document.path.name} links to {link}"
        assert not anchor or anchor in Document(path).anchors, f"{document.path.name} links to {link}"


def test_readme_lists_the_methods_of_the_registry() -> None:
    from compressor.registry import _method_sources, load_method

    own = {name for name, source in _method_sources().items() if source.builtin}
    rows = {row[0]: row for row in README.table("method")}
    assert set(rows) == own, "add the method to the README's table and a section to docs/methods.md"
    sections = of("methods.md").anchors
    for name, (_, paper, tasks, idea) in rows.items():
        method = load_method(name)
        assert (method.paper.title in paper, method.paper.venue in paper, method.paper.url in paper) == (True,) * 3
        assert (tasks, idea) == (", ".join(method.needs.tasks), method.idea)
        assert name in sections


def test_readme_lists_the_built_in_targets() -> None:
    from compressor.profiles.target import load_target

    own = {path.stem for path in (ROOT / "profiles" / "targets").glob("*.toml")}
    rows = README.table("target")
    assert {row[0] for row in rows} == own, "the README's table of targets"
    for name, *facts in rows:
        target = load_target(name)
        assert facts == [target.runtime, target.precision, target.device]


def test_readme_lists_folders_and_extras_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {folder: package for package, folder in project["tool"]["setuptools"]["package-dir"].items()}
    assert {row[0].rstrip("/"): row[1] for row in README.table("folder")} == folders
    named = {extra for row in README.table("extra") for extra in re.findall(r"[\w-]+", row[0])}
    assert named == set(project["project"]["optional-dependencies"])


def test_the_picture_is_small_light_and_wide() -> None:
    image = pytest.importorskip("PIL.Image")
    path = ROOT / "docs" / "images" / "report.png"
    picture = image.open(path)
    assert picture.width == 1200
    assert path.stat().st_size < 300_000
    assert min(picture.convert("RGB").getpixel((2, 2))) > 200


def test_methods_page_names_every_key_of_every_method() -> None:
    from compressor.recipe_resolution import default_config
    from compressor.registry import load_method

    text = of("methods.md").text
    shared = text.partition("## Classification: what they share")[2].partition("\n## ")[0]
    for name in (row[0] for row in README.table("method")):
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert load_method(name).paper.url in section, name
        for key in default_config(load_method(name)):
            assert f"`{key}`" in section + shared, f"{name}: {key}"


def test_methods_page_lists_every_key_of_ppcl_with_its_default() -> None:
    from compressor.recipe_resolution import default_config
    from compressor.registry import load_method

    defaults = default_config(load_method("ppcl"))
    rows = {row[0]: row[1] for row in of("methods.md").table("key")}
    assert list(rows) == list(defaults)
    for key, value in defaults.items():
        if isinstance(value, dict):
            assert rows[key] == (f"{value['steps']} steps" if "steps" in value else "as the paper")
        else:
            assert yaml.safe_load(rows[key]) == value, key


def test_targets_page_lists_every_key_with_its_default_and_help() -> None:
    expected = _target_rows()
    rows = of("targets.md").table("key")
    assert rows == expected, "the table should be:\n" + "\n".join(f"| `{a}` | {b} | {c} |" for a, b, c in expected)


def _target_rows() -> list[list[str]]:
    from compressor.profiles.target import Batch, Calibration, Options, Target

    rows: list[list[str]] = []
    sections = {"batch": Batch, "calibration": Calibration, "options": Options}
    for prefix, model in (("", Target), *((f"{name}.", section) for name, section in sections.items())):
        for name, field in model.model_fields.items():
            if not prefix and name in sections:
                continue
            value: Any = None if field.is_required() else field.get_default(call_default_factory=True)
            default = "must be given" if field.is_required() else "none" if value is None else json.dumps(value)
            rows.append([f"{prefix}{name}", default, " ".join((field.description or "").split())])
    return rows


def test_data_page_lists_every_kind_of_data() -> None:
    from compressor.data.sources import SOURCES

    cells = " ".join(row[0] for row in of("data.md").table("spec"))
    assert set(re.findall(r"`?(\w+)(?=[:`])", cells)) >= set(SOURCES)


def test_deploy_page_lists_every_driver() -> None:
    own = {path.stem for path in (ROOT / "runtimes" / "drivers").glob("*.py")} - {"__init__"}
    assert {row[0] for row in of("deploy.md").table("driver")} == own


def test_run_directory_page_says_the_exit_codes_of_the_errors() -> None:
    from compressor import errors

    codes = {int(row[0]) for row in of("run-directory.md").table("code")}
    known = {getattr(errors, name).exit_code for name in errors.__all__ if name.endswith("Error")}
    assert codes == known | {0}


def test_run_directory_page_names_what_a_run_leaves(workspace: Path) -> None:
    left = {path.name for path in (workspace / "runs" / "ppcl-digits").iterdir() if not path.name.startswith(".")}
    text = next(block.text for block in of("run-directory.md").blocks if block.language == "text")
    named = {name.rstrip("/") for name in re.findall(r"^  (\S+)", text, re.MULTILINE)}
    assert left == named


def test_every_command_of_the_command_line_stands_in_a_document() -> None:
    from compressor.cli.app import app

    lines = [line for document in documents() for block in document.blocks for line in commands(block)]
    for command in app.registered_commands:
        assert any(f"compress {command.name}" in line for line in lines), command.name


def test_benchmarks_page_lists_every_benchmark_and_its_options_exist() -> None:
    programs = {path.name: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    started = {name for name, text in programs.items() if "__main__" in text}
    listed = [row[0].strip("`").split() for row in of("benchmarks.md").table("command")]
    assert {Path(words[1]).name for words in listed} == started | {"NAME.py"}
    for words in listed:
        text = programs.get(Path(words[1]).name, "")
        assert all(f'"{option}"' in text for option in words[2:] if option.startswith("--")), words


def test_results_of_benchmarks_are_all_linked_from_a_document() -> None:
    linked = {Path(link).name for document in documents() for link in document.links}
    assert {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")} <= linked


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert (
        "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and "limitations under the License" in text
    )
