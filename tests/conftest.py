"""What tests of several folders share: packages that are installed beside compressor for the length of a test."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

InstallPackage = Callable[..., None]

TOY_METHODS = '''
"""Three methods that train nothing, for the command line and recipes.

Trained: nothing. Exported: nothing.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from compressor.method import MethodConfig, Needs, Paper

PAPER = Paper("Toys", "A. Author", "Nowhere 2000", "https://example.org")


class Part(MethodConfig):
    """A part."""

    steps: int = Field(10, ge=0)
    """Steps of this part."""
    lr: float = 0.1
    """Its rate."""


class Config(MethodConfig):
    """Keys of the toy."""

    keep: float = Field(0.5, gt=0, le=1)
    """Share that stays."""
    mode: Literal["fast", "slow"] = "fast"
    """How."""
    budget: float = 1.0
    """Has the name of a recipe key."""
    names: list[str] | int = 0
    """Names, or how many."""
    part: Part = Part(steps=20, lr=0.5)
    """A part of it."""


class OwnConfig(MethodConfig):
    """Keys of the last toy."""

    pattern: str
    """A key without a default."""


class Base:
    def __init__(self, config: Any) -> None:
        self.config = config

    def phases(self, ctx: Any) -> Any:
        yield from ()

    def student(self) -> Any:
        raise NotImplementedError

    def deployables(self, ctx: Any) -> Any:
        return {}


class Toy(Base):
    name: ClassVar[str] = "toy"
    paper: ClassVar[Paper] = Paper("A Toy", "A. Author", venue="Nowhere 2001", url="https://example.org/toy")
    idea: ClassVar[str] = "Do nothing, well."
    needs: ClassVar[Needs] = Needs(tasks=("image-generation",), teachers={"teacher": "one"})
    Config: ClassVar = Config
    default_recipe: ClassVar = {
        "teachers": {"teacher": "demo:x"},
        "data": {"train": "digits"},
        "config": {"keep": 0.25},
        "data_config": {"names": ["digits"]},
    }


class Next(Base):
    name: ClassVar[str] = "toy-next"
    paper: ClassVar[Paper] = PAPER
    idea: ClassVar[str] = "Go on."
    needs: ClassVar[Needs] = Needs(
        tasks=("image-generation",),
        teachers={"extra": "optional"},
        students={"student": "spec"},
        data={"train": frozenset(), "pairs": frozenset({"image"})},
    )
    Config: ClassVar = Part
    default_recipe: ClassVar = {"data": {"train": "other", "pairs": "digits"}}


class Own(Base):
    name: ClassVar[str] = "toy-own"
    paper: ClassVar[Paper] = PAPER
    idea: ClassVar[str] = "Build it."
    needs: ClassVar[Needs] = Needs(
        tasks=("image-generation", "video"), teachers={"a": "many", "b": "one"}, students={"student": "own"}
    )
    Config: ClassVar = OwnConfig
    default_recipe: ClassVar = {}
'''

TOY_ENTRY_POINTS = """
[compressor.methods]
toy = toy_methods_package.methods:Toy
toy-next = toy_methods_package.methods:Next
toy-own = toy_methods_package.methods:Own
"""


@pytest.fixture
def install_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InstallPackage:
    """Install a distribution: its modules and its entry points, as pip would leave them."""

    def install(name: str, modules: Mapping[str, str], entry_points: str) -> None:
        site = tmp_path / f"site-{name}"
        package, info = site / name, site / f"{name}-1.0.dist-info"
        package.mkdir(parents=True)
        info.mkdir()
        (package / "__init__.py").write_text("")
        for module, source in modules.items():
            (package / f"{module}.py").write_text(textwrap.dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        monkeypatch.syspath_prepend(str(site))
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        importlib.invalidate_caches()

    return install


@pytest.fixture
def toy_methods(install_package: InstallPackage) -> None:
    """The methods ``toy``, ``toy-next`` and ``toy-own`` of an installed package."""
    install_package("toy_methods_package", {"methods": TOY_METHODS}, TOY_ENTRY_POINTS)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Demos and other results that are kept go to a folder of the test session, and to those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
