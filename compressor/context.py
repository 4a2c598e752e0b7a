"""The context that methods are given: models and data by role, devices, randomness, processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from compressor.data.dataset import Dataset
from compressor.data.samplers import Sampler, Shuffled
from compressor.data.stream import Stream, View, stack
from compressor.errors import RequestError, nearest
from compressor.models.model import Model
from compressor.tasks.task import Task
from compressor.training.distributed import Distributed
from compressor.training.random import Randomness, hash_seed

__all__ = ["RunContext"]


class RunContext:
    """A `compressor.method.Context`.

    Args:
        task: The task over the recipe's data.
        teachers: Models by role; they are frozen and put in eval mode here.
        randomness: The run's random numbers; its phase is set by the engine.
        distributed: The processes.
        chained: Student of the method before this one, if any.
        students: Loaders of the models that the user named, by role.
        name: Position and name of the method, part of the streams' seeds.
    """

    def __init__(
        self,
        task: Task,
        teachers: Mapping[str, Sequence[Model]],
        randomness: Randomness,
        distributed: Distributed,
        *,
        chained: Model | None = None,
        students: Mapping[str, Callable[[], Model]] | None = None,
        name: str = "",
    ) -> None:
        self.task, self.randomness, self.distributed, self.name = task, randomness, distributed, name
        self.device = distributed.device
        self._teachers = {role: [self._freeze(model) for model in models] for role, models in teachers.items()}
        self._chained, self._students = chained, dict(students or {})

    def _freeze(self, model: Model) -> Model:
        model.module.requires_grad_(False).eval().to(self.device)
        return model

    def teachers(self, role: str = "teacher") -> list[Model]:
        if role not in self._teachers:
            raise RequestError(f"there is no teacher in the role {role!r}: {nearest(role, self._teachers)}")
        return self._teachers[role]

    def teacher(self, role: str = "teacher") -> Model:
        models = self.teachers(role)
        if len(models) != 1:
            raise RequestError(f"the role {role!r} has {len(models)} teachers; this method takes one")
        return models[0]

    def student(self, role: str = "student", like: Model | None = None) -> Model:
        if role == "student" and self._chained is not None:
            model = self._chained.copy()
        elif role in self._students:
            model = self._students[role]()
        elif like is not None:
            model = like.copy()
        else:
            raise RequestError(f"name a student model: --student {role}=SPEC")
        model.module.requires_grad_(True).to(self.device)
        return model

    def dataset(self, role: str = "train", split: str = "train") -> Dataset:
        return self.task.dataset(role, split)

    def stream(
        self, role: str, size: int, sampler: Sampler | None = None, view: View | None = None, tag: str = ""
    ) -> Stream:
        seed = hash_seed(self.randomness.seed, self.name, role, tag)
        shard = (self.distributed.rank, self.distributed.processes)
        chosen = sampler if sampler is not None else Shuffled()
        return Stream(self.dataset(role), size, chosen, view or stack, seed, shard, self.device)

    def rng(self, i: int, tag: str = "", *, shared: bool = False) -> torch.Generator:
        return self.randomness.generator(i, tag, shared)

    def normal(self, i: int, shape: Sequence[int], tag: str = "") -> Tensor:
        return self.randomness.normal(i, shape, tag)

    def uniform(self, i: int, size: int, tag: str = "") -> Tensor:
        return self.randomness.uniform(i, size, tag)

    def gather(self, x: Tensor) -> Tensor:
        return self.distributed.gather(x)

    def reduce(self, x: Tensor, op: Literal["mean", "sum"] = "mean") -> Tensor:
        return self.distributed.reduce(x, op)

    def shard(self, n: int) -> range:
        return self.distributed.shard(n)
