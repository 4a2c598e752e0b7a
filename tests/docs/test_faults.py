"""The page of faults names tests that exist, and every test of the faults stands behind a row."""

from __future__ import annotations

import re

from .documents import ROOT, Document

ROWS = Document(ROOT / "docs" / "faults.md").table("fault")


def test_every_fault_names_a_test_that_exists() -> None:
    for fault, _, answer, test in ROWS:
        path, _, name = test.strip("`").partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{fault}: no test {test}"
        assert answer


def test_every_file_of_the_folder_stands_behind_a_fault() -> None:
    named = {test.strip("`").partition("::")[0] for *_, test in ROWS}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "field").glob("test_*.py")} <= named
