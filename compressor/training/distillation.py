"""What methods share that train one student network: the student, the loop, the teachers' logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import nn

from compressor.data.stream import Stream
from compressor.method import Context, OneStudent
from compressor.models.classifier import Classifier
from compressor.models.image_network import ImageNetwork
from compressor.training.phase import Step, Train
from compressor.training.supervised import Supervision
from compressor.training.teacher_cache import TeacherLogits
from compressor.training.training_config import TrainingConfig, make_optim, stream_key

__all__ = ["LogitTrainingConfig", "StudentMethod", "teacher_logits", "train_phase"]


class LogitTrainingConfig(TrainingConfig):
    """Keys of a training that reads nothing of its teachers but their logits."""

    cache_teacher: bool = False
    """Keep the teachers' logits on disk: batches that repeat (`views`) and later runs do not ask the teachers again."""
    teacher_top_k: int | None = Field(None, ge=1)
    """Use only the largest logits of a teacher, the rest evenly spread; None uses all."""


class StudentMethod(OneStudent[Any]):
    """Base of methods whose student is a classifier, or what else the task makes of a model (a segmenter)."""

    def start(self, ctx: Context) -> tuple[Any, list[Any]]:
        """The student, which fits the data, and the teachers: `ImageNetwork`s of the task's kind.

        Raises:
            RequestError: The student does not fit the data.
        """
        teachers = ctx.teachers()
        self._student = ctx.student(like=teachers[0])
        ctx.task.check(self._student)
        network = getattr(ctx.task, "network", Classifier)
        return network(self._student), [network(teacher) for teacher in teachers]


def train_phase(
    name: str,
    config: TrainingConfig,
    stream: Stream,
    step: Step,
    student: ImageNetwork,
    teachers: Sequence[ImageNetwork],
    others: Mapping[str, nn.Module] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Train:
    """A phase with one optimiser, "student", that owns the student and all other modules.

    Args:
        name: Of the phase.
        config: Steps, rates.
        stream: Of the batches "train".
        step: Yields updates of "student".
        student: What is trained.
        teachers: They stay in eval mode.
        others: Further trained modules by name (projections, a regressor).
        state: What else must survive a kill.
    """
    trained = {"student": student.module, **(others or {})}
    return Train(
        name,
        config.steps,
        {"student": make_optim(config, trained.values())},
        {"train": stream},
        step,
        {**trained, **(state or {})},
        modes=[*((module, "train") for module in trained.values()), *((t.module, "eval") for t in teachers)],
    )


def teacher_logits(
    ctx: Context, config: LogitTrainingConfig, teachers: Sequence[ImageNetwork], stream: Stream
) -> TeacherLogits:
    """The teachers' logits of a stream, kept on disk if the configuration says so."""
    info = stream.dataset.info
    return TeacherLogits(
        teachers,
        len(ctx.dataset().info.classes),
        stream,
        stream_key(config, stream),
        cache=config.cache_teacher,
        top_k=config.teacher_top_k,
        positions=tuple(info.shape[1:]) if Supervision.of(ctx).field == "mask" else (),
    )
