"""`python:module:factory`: the user's own module, beside which the command is run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from compressor.data.sources import load_data
from compressor.errors import CompressorError
from compressor.models.spec import load_model_spec


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module into the working directory, which is not on the path; imported modules are forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield lambda name, text: (tmp_path / f"{name}.py").write_text(text)
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


def test_a_module_of_the_working_directory_is_found(write) -> None:
    write("own_part", "value = 3\n")
    write("own_set", "from own_part import value\n\ndef squares(split):\n    return [split] * value\n")
    assert load_data("python:own_set:squares", "val") == ["val"] * 3


def test_a_module_of_the_working_directory_hides_no_installed_one(write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("json", "def loads(text):\n    raise RuntimeError('not that one')\n")
    monkeypatch.delitem(sys.modules, "json")
    assert load_data("python:json:loads", "3") == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import own_missing", "cannot be imported: No module named 'own_missing'"),
        ("1 / 0", "python:own_model:made cannot be imported: ZeroDivisionError: division by zero"),
        ("def mad(): pass", "has no attribute 'made'"),
        ("def made(): {}['a']", "python:own_model:made failed: KeyError: 'a'"),
        ("def made(): pass", "returned a NoneType; it must return compressor.models.model.Model"),
    ],
)
def test_what_a_users_module_does_wrong_is_told_in_one_line(write, text: str, message: str) -> None:
    write("own_model", text + "\n")
    with pytest.raises(CompressorError) as caught:
        load_model_spec("python:own_model:made")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
