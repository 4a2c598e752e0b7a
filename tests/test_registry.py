"""Names of methods, tasks and edits are found without importing what they name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor import registry
from compressor.errors import CompressorError, RequestError


def test_method_names_hold_the_built_in_and_the_installed_ones(toy_methods: None) -> None:
    names = registry.method_names()
    assert {"ppcl", "toy", "toy-next"} <= set(names)
    assert names == sorted(names)


def test_listing_names_and_facts_imports_no_method() -> None:
    code = (
        "import sys; from compressor import registry; registry.method_names(); registry.method_facts();"
        "bad = [m for m in ('torch', 'pydantic') if m in sys.modules]; sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load_method_imports_the_class() -> None:
    method = registry.load_method("ppcl")
    assert method.name == "ppcl"
    assert method.needs.tasks == ("image-generation",)


def test_every_built_in_method_has_the_name_of_its_file_and_complete_facts() -> None:
    facts = registry.method_facts()
    assert facts
    for one in facts:
        assert registry.load_method(one.name).name == one.name
        assert all((one.family, one.title, one.authors, one.venue, one.url, one.idea, one.tasks)), one


def test_facts_are_read_from_the_source_of_installed_packages(toy_methods: None) -> None:
    toy = next(one for one in registry.method_facts() if one.name == "toy")
    assert (toy.title, toy.venue, toy.url) == ("A Toy", "Nowhere 2001", "https://example.org/toy")
    assert toy.idea == "Do nothing, well."
    assert toy.tasks == ("image-generation",)
    assert toy.family == "toy_methods_package"


def test_facts_that_are_no_literals_stay_empty(toy_methods: None) -> None:
    following = next(one for one in registry.method_facts() if one.name == "toy-next")
    assert following.title == ""
    assert following.idea == "Go on."


def test_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RequestError, match="unknown method 'pcl': did you mean ppcl?"):
        registry.load_method("pcl")


def test_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RequestError, match="unknown task 'image-generaton': did you mean image-generation?"):
        registry.load_task("image-generaton")


def test_load_task_imports_the_class() -> None:
    assert registry.load_task("image-generation").name == "image-generation"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_package_that_is_not_there\nMETHOD = None", "needs the package 'a_package_that_is_not_there'"),
        ("raise ValueError('on purpose')", "cannot be imported: ValueError: on purpose"),
        ("OTHER = 1", "has no attribute METHOD"),
        ("class METHOD:\n    name = 'broken'", "lacks paper, idea, needs"),
    ],
)
def test_broken_installed_method_is_one_clear_error(install_package: Any, source: str, message: str) -> None:
    install_package("broken_package", {"method": source}, "[compressor.methods]\nbroken = broken_package.method\n")
    with pytest.raises(CompressorError, match=message):
        registry.load_method("broken")


def test_an_installed_method_does_not_hide_a_built_in_one(install_package: Any) -> None:
    install_package("rival_package", {"method": "METHOD = 1"}, "[compressor.methods]\nppcl = rival_package.method\n")
    assert registry.load_method("ppcl").__module__.startswith("compressor.methods.")


def test_import_edit_finds_the_core_edits() -> None:
    from compressor.models.model import EDITS

    registry.import_edit("blocks.assemble")
    assert "blocks.assemble" in EDITS


def test_import_edit_finds_edits_of_installed_packages(install_package: Any) -> None:
    from compressor.models.model import EDITS

    source = """
    from compressor.models.model import edit

    @edit("surgery.cut")
    def cut(module):
        return module
    """
    install_package("edit_package", {"surgery": source}, "[compressor.edits]\nsurgery = edit_package.surgery\n")
    registry.import_edit("surgery.cut")
    assert EDITS.pop("surgery.cut").__module__ == "edit_package.surgery"


@pytest.mark.parametrize("name", ["antigravity.fly", "os:system", "../blocks.assemble", "nothing"])
def test_import_edit_imports_nothing_that_is_not_registered(name: str) -> None:
    before = set(sys.modules)
    registry.import_edit(name)
    assert not {module for module in set(sys.modules) - before if "antigravity" in module}


def test_module_documentation_is_the_head_of_the_file() -> None:
    assert registry.module_documentation("ppcl").startswith("PPCL")


def test_scanning_reads_methods_from_the_folder_of_the_package() -> None:
    import compressor.methods

    folder = Path(next(iter(compressor.methods.__path__)))
    assert (folder / "generation" / "ppcl.py").is_file()
