"""What a method is, what it needs, and the context that it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compressor.data.dataset import Dataset
    from compressor.data.samplers import Sampler
    from compressor.data.stream import Stream, View
    from compressor.deployable import Deployable
    from compressor.models.model import Model
    from compressor.tasks.task import Task
    from compressor.training.phase import Phases
    from compressor.training.random import Randomness

__all__ = ["Context", "Method", "MethodConfig", "Needs", "OneStudent", "Paper"]

ConfigT = TypeVar("ConfigT", bound="MethodConfig")


class MethodConfig(BaseModel):
    """Base of a method's configuration: unknown keys are errors, every field has a description (its help text)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    authors: str
    venue: str
    url: str


@dataclass(frozen=True)
class Needs:
    """What a method needs, so that an impossible recipe fails before any work.

    Attributes:
        tasks: Names of the tasks that it serves, its default first.
        teachers: Roles, each "one", "many" (one or more), "optional" (one or none) or "any" (any number, or none).
        students: Roles, each "copy" (of a teacher or of the chain's model), "spec" (the user may name a model) or "own"
            (the method builds it).
        data: Sample fields that each stream role must hold.
        anatomy: Name of the anatomy that the teacher's class must have ("blocks"), if any.
        first: Why no other method can come before it in a chain; empty where one can.
    """

    tasks: tuple[str, ...]
    teachers: Mapping[str, Literal["one", "many", "optional", "any"]] = field(default_factory=dict)
    students: Mapping[str, Literal["copy", "spec", "own"]] = field(default_factory=lambda: {"student": "copy"})
    data: Mapping[str, frozenset[str]] = field(default_factory=lambda: {"train": frozenset()})
    anatomy: str | None = None
    first: str = ""


class Context(Protocol):
    """What a method is given."""

    task: Task
    device: torch.device
    randomness: Randomness

    def teacher(self, role: str = "teacher") -> Model:
        """The teacher of a role: frozen, in eval mode, the same object at every call."""
        ...

    def teachers(self, role: str = "teacher") -> list[Model]:
        """All teachers of a role."""
        ...

    def student(self, role: str = "student", like: Model | None = None) -> Model:
        """A trainable model: the chain's, else the user's spec, else a copy of ``like``."""
        ...

    def dataset(self, role: str = "train", split: str = "train") -> Dataset:
        """The samples of a role: split "train", "val" or "test"."""
        ...

    def stream(
        self, role: str, size: int, sampler: Sampler | None = None, view: View | None = None, tag: str = ""
    ) -> Stream:
        """Batches of a role; ``size`` is per process. Streams of different tags draw independently."""
        ...

    def rng(self, i: int, tag: str = "", *, shared: bool = False) -> torch.Generator:
        """A CPU generator from (seed, phase, i, tag, rank); ``shared`` leaves out the rank: equal on all processes."""
        ...

    def normal(self, i: int, shape: Sequence[int], tag: str = "") -> Tensor:
        """Standard normal noise (B, ...); row b depends on (seed, phase, i, tag, place in the global batch) alone."""
        ...

    def uniform(self, i: int, size: int, tag: str = "") -> Tensor:
        """Uniform numbers in [0, 1), drawn as `normal` draws."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate a tensor of every process along the first axis."""
        ...

    def reduce(self, x: Tensor, op: Literal["mean", "sum"] = "mean") -> Tensor:
        """Mean or sum of a tensor over all processes."""
        ...

    def shard(self, n: int) -> range:
        """The part of range(n) that this process works on in a `Compute`."""
        ...


class Method(Protocol):
    """One paper. The class name is free; the module's file name (hyphens as underscores) is the method's name.

    A module under ``methods/`` exposes its class as ``METHOD``.

    ``default_recipe`` holds keys of a recipe that needs no download; ``config``, what it changes of the configuration's
    own defaults (the paper's); and ``data_config``, what it changes to suit its small data, left out with any others.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    idea: ClassVar[str]
    needs: ClassVar[Needs]
    Config: ClassVar[type[MethodConfig]]
    default_recipe: ClassVar[Mapping[str, Any]]

    def __init__(self, config: Any) -> None: ...

    def phases(self, ctx: Context) -> Phases:
        """Yield the phases in order; called anew on resume, so it must build the same objects every time."""
        ...

    def student(self) -> Model:
        """The result, which the next method of a chain takes; valid after the phases have run."""
        ...

    def deployables(self, ctx: Context) -> dict[str, Deployable]:
        """What is exported, by name, the main result first."""
        ...


class OneStudent(Generic[ConfigT]):
    """Base of methods whose result is one model, which ``phases`` leave in ``self._student``.

    Args:
        config: The method's configuration.

    Attributes:
        notes: Sentences for the report, which ``phases`` may add to.
    """

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self.notes: list[str] = []
        self._student: Model | None = None

    def student(self) -> Model:
        """The trained student."""
        if self._student is None:
            raise RuntimeError("the phases have not run")
        return self._student

    def deployables(self, ctx: Context) -> dict[str, Deployable]:
        """The student alone, as its task packs it: nothing else of the method remains."""
        return {"student": ctx.task.deployable(self.student())}
