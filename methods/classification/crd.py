"""CRD (Tian, Krishnan & Isola 2020, arXiv 1910.10699): maximise what student and teacher features tell of each other.

Both features are projected to one unit sphere, where a critic tells the pair of one image from pairs with images of
other classes, thousands of them from memory banks. Trained: the student and both projections. Exported: the student.

The critic is a noise-contrastive estimate: the official code divides the scores by constants ``Z`` estimated from the
first batch, which the paper's critic ``h(T, S)`` leaves out. The code is followed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.data.dataset import labels_of
from compressor.data.stream import Batch
from compressor.errors import RequestError
from compressor.losses.contrastive import noise_contrastive_loss
from compressor.losses.features import unit_vectors
from compressor.losses.precision import at_least_float32
from compressor.method import Context, MethodConfig, Needs, Paper
from compressor.models.classifier import Classifier
from compressor.training.distillation import StudentMethod, train_phase
from compressor.training.phase import Phases, Update
from compressor.training.supervised import label_loss
from compressor.training.training_config import TrainingConfig, make_stream

__all__ = [
    "CRD",
    "METHOD",
    "ContrastiveMemory",
    "NegativeSampler",
    "ProjectionHead",
    "contrast_scores",
    "crd_loss",
    "log_normalizer",
]


def contrast_scores(anchors: Tensor, candidates: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Scaled similarities of each anchor with its candidates: the exponents of the critic ``h(T, S)`` (section 3.1).

    Args:
        anchors: ``(B, d)`` unit vectors.
        candidates: ``(B, 1 + K, d)`` unit vectors of the other network: the positive, then K negatives; detached.
        temperature: tau, above 0.

    Returns:
        ``(B, 1 + K)``; float32 or wider.
    """
    anchors = at_least_float32(anchors)
    return (candidates.detach().to(anchors.dtype) @ anchors[:, :, None])[:, :, 0] / temperature


def log_normalizer(scores: Tensor, num_samples: int) -> Tensor:
    """Logarithm of the constant Z that makes ``exp(score) / Z`` sum to about 1 over the data set.

    ``Z = n * mean(exp(scores))`` over one batch, as the official code estimates it once (after Wu et al. 2018).

    Args:
        scores: ``(B, 1 + K)``.
        num_samples: n.

    Returns:
        Scalar, detached.
    """
    scores = scores.detach()
    return torch.logsumexp(scores.flatten(), dim=0) + math.log(num_samples / scores.numel())


def crd_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    student_log_normalizer: Tensor,
    teacher_log_normalizer: Tensor,
    *,
    num_samples: int,
) -> Tensor:
    """The critic's loss with each network as the anchor, added up (``L_critic``, section 3.1, normalised).

    Args:
        student_scores: ``(B, 1 + K)``: the student's projections against the teacher's bank.
        teacher_scores: ``(B, 1 + K)``: the teacher's projections against the student's bank; it trains the teacher's
            projection, the student gets no gradient from it.
        student_log_normalizer: Scalar log Z of the student's scores.
        teacher_log_normalizer: Scalar log Z of the teacher's scores.
        num_samples: n, the size of the training set.

    Returns:
        Scalar at least 0.
    """
    student = noise_contrastive_loss(student_scores - student_log_normalizer, num_samples)
    teacher = noise_contrastive_loss(teacher_scores - teacher_log_normalizer, num_samples)
    return student + teacher


class ProjectionHead(nn.Module):
    """A linear map to the unit sphere, where both networks meet (``g^S`` and ``g^T``, section 3.1)."""

    def __init__(self, in_features: int, out_features: int = 128) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Project ``(B, ...)`` features, flattened; returns ``(B, out_features)`` unit vectors."""
        return unit_vectors(self.linear(features.flatten(start_dim=1)))


class ContrastiveMemory(nn.Module):
    """The projections that both networks last gave to every training sample, and the constants Z.

    All of it is buffers, so that ``state_dict`` carries it over an interruption.

    Args:
        num_samples: n, the size of the training set.
        dimension: d of the projections.
        momentum: Share of the old entry when a row is updated, in [0, 1).
        generator: Of the random start, uniform in +-sqrt(3 / d), so that rows have about unit length.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_normalizers: Tensor

    def __init__(
        self,
        num_samples: int,
        dimension: int = 128,
        *,
        momentum: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.momentum = momentum
        bound = math.sqrt(3 / dimension)
        for name in ("student_bank", "teacher_bank"):
            start = torch.rand(num_samples, dimension, generator=generator)
            self.register_buffer(name, (2 * start - 1) * bound)
        self.register_buffer("log_normalizers", torch.full((2,), torch.nan))

    def forward(self, student: Tensor, teacher: Tensor, candidates: Tensor, *, temperature: float = 0.07) -> Tensor:
        """`crd_loss` of a batch against the banks as they are; the first call fixes the constants Z.

        Args:
            student: ``(B, d)`` projections of the student.
            teacher: ``(B, d)`` projections of the teacher.
            candidates: ``(B, 1 + K)`` int64 sample indices: the samples themselves, then their negatives.
            temperature: tau, above 0.

        Returns:
            Scalar.
        """
        num_samples = self.student_bank.shape[0]
        student_scores = contrast_scores(student, self.teacher_bank[candidates], temperature=temperature)
        teacher_scores = contrast_scores(teacher, self.student_bank[candidates], temperature=temperature)
        estimates = torch.stack([log_normalizer(scores, num_samples) for scores in (student_scores, teacher_scores)])
        self.log_normalizers.copy_(torch.where(self.log_normalizers.isnan(), estimates, self.log_normalizers))
        student_log_normalizer, teacher_log_normalizer = self.log_normalizers.clone()
        return crd_loss(
            student_scores, teacher_scores, student_log_normalizer, teacher_log_normalizer, num_samples=num_samples
        )

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, indices: Tensor) -> None:
        """Move the rows of a batch towards its projections, and back to unit length.

        Args:
            student: ``(B, d)`` projections of the student.
            teacher: ``(B, d)`` projections of the teacher.
            indices: ``(B,)`` int64 sample indices, each at most once.
        """
        for bank, projections in ((self.student_bank, student), (self.teacher_bank, teacher)):
            mixed = self.momentum * bank[indices] + (1 - self.momentum) * projections.to(bank.dtype)
            bank[indices] = unit_vectors(mixed)


class NegativeSampler:
    """Draws, for each sample, others of different classes.

    Args:
        labels: ``(n,)`` int64 class of every training sample. ``torch.arange(n)`` makes every sample a class of its
            own, the variant without labels.

    Raises:
        RequestError: All samples are of one class.
    """

    def __init__(self, labels: Tensor) -> None:
        _, classes, counts = labels.cpu().unique(return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise RequestError("contrastive distillation needs training samples of at least two classes")
        self._order = classes.argsort(stable=True)
        self._classes, self._counts, self._starts = classes, counts, counts.cumsum(0) - counts

    def __call__(self, indices: Tensor, num_negatives: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw uniformly, with replacement.

        Args:
            indices: ``(B,)`` int64 sample indices.
            num_negatives: K.
            generator: A CPU generator.

        Returns:
            ``(B, 1 + K)`` int64 on the device of ``indices``: the samples themselves, then their negatives.
        """
        classes = self._classes[indices.cpu()]
        start, count = self._starts[classes][:, None], self._counts[classes][:, None]
        share = torch.rand(len(classes), num_negatives, generator=generator, dtype=torch.float64)
        place = (share * (len(self._order) - count)).long()
        # Samples lie sorted by class: a place at or after the own class's block lies behind that block.
        negatives = self._order[torch.where(place < start, place, place + count)]
        return torch.cat([indices[:, None], negatives.to(indices.device)], dim=1)


class Config(TrainingConfig):
    """Configuration of CRD."""

    negatives: int = Field(16384, ge=1)
    """Samples of other classes that each image is told from."""
    dimension: int = Field(128, ge=1)
    """Width of the space in which both networks meet."""
    temperature: float = Field(0.07, gt=0)
    """Divides the similarities."""
    memory_momentum: float = Field(0.5, ge=0, lt=1)
    """Share of the old entry when the memory of a sample is updated."""
    use_labels: bool = True
    """Draw negatives from other classes; otherwise from all other samples."""
    contrast_weight: float = Field(0.8, ge=0)
    """Weight of the contrastive loss."""
    label_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy with the labels."""


class CRD(StudentMethod):
    """The method; see the module's docstring. The features are what a network's last linear layer reads."""

    name: ClassVar[str] = "crd"
    paper: ClassVar[Paper] = Paper(
        "Contrastive Representation Distillation",
        "Tian, Krishnan, Isola",
        "ICLR 2020",
        "https://arxiv.org/abs/1910.10699",
    )
    idea: ClassVar[str] = "Tell an image's pair of student and teacher features from pairs of different images."
    needs: ClassVar[Needs] = Needs(
        tasks=("classification",),
        teachers={"teacher": "one"},
        students={"student": "spec"},
        data={"train": frozenset({"image", "label"})},
    )
    Config: ClassVar[type[MethodConfig]] = Config
    default_recipe: ClassVar[Mapping[str, Any]] = {
        "teachers": {"teacher": "demo:scenes-cnn"},
        "students": {"student": "timm:resnet18?layers=[1,1,1,1],channels=[8,12,16,24]"},
        "data": {"train": "scenes"},
        "data_config": {"negatives": 512, "contrast_weight": 0.05},
    }

    def phases(self, ctx: Context) -> Phases:
        """One training of the student and both projections, beside the memory."""
        config = self.config
        student, teachers = self.start(ctx)
        teacher, stream = teachers[0], make_stream(ctx, config)
        shape, labels = stream.dataset.info.shape, torch.from_numpy(labels_of(stream.dataset))
        sampler = NegativeSampler(labels if config.use_labels else torch.arange(len(labels)))
        heads = [network.head(shape) for network in (student, teacher)]
        project = nn.ModuleList(self._projection(n, h, shape) for n, h in zip((student, teacher), heads, strict=True))
        project.to(ctx.device)
        generator = ctx.rng(0, "memory", shared=True)
        memory = ContrastiveMemory(
            len(labels), config.dimension, momentum=config.memory_momentum, generator=generator
        ).to(ctx.device)

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            batch = batches["train"]
            logits, features = student.embed(batch["image"], heads[0])
            with torch.no_grad():
                _, wanted = teacher.embed(batch["image"], heads[1])
            ours, theirs = project[0](features), project[1](wanted)
            candidates = sampler(batch["index"], config.negatives, ctx.rng(i, "negatives"))
            contrast = memory(ours, theirs, candidates, temperature=config.temperature)
            if i == 0:  # the constants are estimated on each process's own batch
                memory.log_normalizers.copy_(ctx.reduce(memory.log_normalizers))
            losses = {
                "labels": config.label_weight * label_loss(logits, batch["label"]),
                "contrast": config.contrast_weight * contrast,
            }
            yield Update("student", losses)
            rows = [ctx.gather(part.detach()) for part in (ours, theirs, batch["index"])]
            memory.update(*_first_of_each(*rows))

        others = {"projections": project}
        yield train_phase("distil", config, stream, step, student, teachers, others, {"memory": memory})

    def _projection(self, network: Classifier, head: str, shape: Sequence[int]) -> ProjectionHead:
        device = next(network.parameters()).device
        with torch.no_grad():
            network.module.eval()
            _, embedding = network.embed(torch.zeros(1, *shape, device=device), head)
        return ProjectionHead(embedding.shape[1], self.config.dimension)


def _first_of_each(student: Tensor, teacher: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a batch without those of a sample that is in it already, which the end of an epoch can bring."""
    seen: set[int] = set()
    keep = [k for k, index in enumerate(indices.tolist()) if not (index in seen or seen.add(index))]  # type: ignore[func-returns-value]
    return student[keep], teacher[keep], indices[keep]


METHOD = CRD
