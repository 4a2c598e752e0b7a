"""What a task is: how a model is packed for deployment, and how it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from compressor.data.dataset import Dataset
from compressor.evaluate import Feed, Metric
from compressor.runtimes.runtime import Array

if TYPE_CHECKING:
    from compressor.deployable import Deployable
    from compressor.models.model import Model

__all__ = ["Figure", "Task"]


@dataclass(frozen=True)
class Figure:
    """A figure of merit in reports."""

    name: str
    label: str
    better: Literal["higher", "lower"]
    unit: str = ""
    headline: bool = False


class Task(Protocol):
    """One task over the data of a recipe.

    Attributes:
        name: On the command line and in recipes.
        fields: What a sample holds, for people.
        figures: What `metrics` computes.
    """

    name: ClassVar[str]
    fields: ClassVar[Mapping[str, str]]
    figures: tuple[Figure, ...]

    def __init__(self, data: Mapping[str, str], options: Mapping[str, Any]) -> None:
        """Args: data specs by role; options of the task (its own keys)."""
        ...

    def dataset(self, role: str = "train", split: str = "train") -> Dataset: ...

    def check(self, model: Model) -> None:
        """Raise a RequestError where the model and the data do not fit."""
        ...

    def deployable(self, model: Model) -> Deployable:
        """Pack a model: teachers and baselines as well as students."""
        ...

    def feeds(self, samples: int) -> dict[str, Feed]:
        """What is run through a driver to measure it."""
        ...

    def metrics(self) -> list[Metric]:
        """Fresh metrics for one evaluation."""
        ...

    def request(self, batch: int) -> dict[str, Array]:
        """A driver's inputs of the given batch size, for timing one request."""
        ...
