"""DataDAM (Sajedi et al. 2023, arXiv 2310.00093): a few images per class that random networks attend to like the data.

In networks drawn afresh at every step, the class means of the spatial attention maps of all layers but the last must
agree between real and synthetic images, and those of the final embeddings weakly. Trained: the pixels of the synthetic
images, then a student on them. Exported: the distilled set and the student.

Paper and official code differ. The power of the maps: 4 against 1; the paper's is the default here. The scale: the code
sums over classes and multiplies by 100, which is followed. The norm of the random networks: the paper's table says
instance norm, the code trains with batch norm in training mode, which is followed. Departures of our own: the student
has instance norm by default, as few images make poor batch statistics, and its optimiser keeps its momentum where the
rate drops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compressor.data.dataset import DataInfo
from compressor.data.distilled_set import picture_sheet, write_folder, write_tensors
from compressor.data.samplers import PerField
from compressor.data.siamese import Operation, siamese_augmentation, suitable_operations
from compressor.data.stream import Batch
from compressor.data.synthetic_images import Start, SyntheticImages, check_images_per_class, starting_images
from compressor.data.views import Augmentation
from compressor.deployable import Deployable
from compressor.errors import RequestError
from compressor.losses.features import spatial_attention_map
from compressor.losses.statistics import squared_class_mean_distance
from compressor.method import Context, MethodConfig, Needs, Paper
from compressor.models.classifier import Classifier
from compressor.models.convnet import convnet_depth, convnet_model, random_convnet
from compressor.models.model import Model
from compressor.training.distillation import StudentMethod, train_phase
from compressor.training.phase import Compute, Optim, Phases, Train, Update
from compressor.training.supervised import label_loss
from compressor.training.training_config import TrainingConfig, make_stream

__all__ = [
    "METHOD",
    "DataDAM",
    "DataDAMConfig",
    "attention_matching_loss",
    "feature_matching_loss",
    "spatial_attention_map",
]


def attention_matching_loss(
    real_features: Tensor, syn_features: Tensor, *, num_classes: int, power: float = 4.0, scale: float = 100.0
) -> Tensor:
    """Squared distance of the class-mean attention maps of one layer (one summand of the paper's ``L_SAM``).

    Maps are normalised before they are averaged over a class; the distance is summed over classes and positions.

    Args:
        real_features: ``(K * Nr, C, H, W)`` float, class-blocked, after the ReLU and before the pooling; detached.
        syn_features: ``(K * Ns, C, H, W)``, class-blocked in the same order; Ns may differ from Nr.
        num_classes: K.
        power: Exponent of the maps.
        scale: Factor of the sum.

    Returns:
        Scalar at least 0, of the features' dtype.
    """
    real_maps = spatial_attention_map(real_features.detach(), power=power)
    syn_maps = spatial_attention_map(syn_features, power=power)
    return scale * squared_class_mean_distance(real_maps, syn_maps, num_classes)


def feature_matching_loss(
    real_embeddings: Tensor,
    syn_embeddings: Tensor,
    *,
    num_classes: int,
    task_balance: float = 0.01,
    scale: float = 100.0,
) -> Tensor:
    """Squared distance of the class-mean embeddings (``L_MMD``, the term that stands in for the last layer's maps).

    Args:
        real_embeddings: ``(K * Nr, D)`` float, class-blocked, flattened output of the feature extractor; detached.
        syn_embeddings: ``(K * Ns, D)``, class-blocked in the same order; Ns may differ from Nr.
        num_classes: K.
        task_balance: The paper's lambda, the weight against the attention terms.
        scale: Factor of the sum, the same as that of the attention terms.

    Returns:
        Scalar at least 0, of the embeddings' dtype.
    """
    return scale * task_balance * squared_class_mean_distance(real_embeddings.detach(), syn_embeddings, num_classes)


# --- the method ------------------------------------------------------------------------------------------------------


class MatchConfig(MethodConfig):
    """How the pixels are trained."""

    steps: int = Field(8000, ge=0)
    """Steps; every one draws a new random network."""
    batch: int = Field(64, ge=1)
    """Real images of every class in a step of one process; classes that have fewer show some twice."""
    lr: float | None = Field(None, gt=0)
    """Learning rate of the normalised pixels; None is the paper's: 1 up to 50 images a class, 10 beyond."""
    momentum: float = Field(0.5, ge=0, lt=1)
    """Momentum of sgd."""


class SetTrainingConfig(TrainingConfig):
    """How the student is trained on the set; the defaults are the paper's for 10 images of 10 classes."""

    steps: int = Field(3600, ge=0)
    """Training steps; the official code takes 1800 epochs."""
    batch: int = Field(64, ge=2)
    """Images in a batch of one process; the whole set where it is smaller."""
    optimizer: Literal["adamw", "adam", "sgd"] = "sgd"
    """The optimiser."""
    lr: float = Field(0.01, gt=0)
    """Highest learning rate."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight decay; biases and the weights of norms have none."""
    schedule: Literal["one-cycle", "cosine", "linear", "steps", "constant"] = "steps"
    """How the learning rate moves."""
    milestones: tuple[float, ...] = (0.5,)
    """For the schedule "steps": after which shares of the training the rate falls to a tenth."""
    augment: Augmentation = "none"
    """What is done to an image before the siamese augmentation, which the method's own key names."""


class DataDAMConfig(MethodConfig):
    """Keys of the method."""

    images_per_class: int = Field(10, ge=1)
    """Synthetic images of every class."""
    init: Start = "real"
    """What they start as: random real images of the class, noise, or those that cover the class (k-center)."""
    match: MatchConfig = MatchConfig()
    """The training of the pixels."""
    power: float = Field(4.0, ge=1)
    """Exponent of the attention maps; the official script has 1, which suits few pixels."""
    attention_weight: float = Field(1.0, ge=0)
    """Weight of the attention maps; 0 leaves the embeddings alone, which is distribution matching (DM)."""
    task_balance: float | None = Field(None, ge=0)
    """Weight of the embeddings (the paper's lambda); None is the paper's: 0.01, or 0.02 from 64 pixels up."""
    augment: tuple[Operation, ...] | None = None
    """Siamese augmentations, one of which is drawn a class and step; None takes all that suit the data, [] none."""
    clip: bool = False
    """Keep the pixels in what can be shown; otherwise the pictures of the set lose what lies outside."""
    width: int = Field(128, ge=1)
    """Channels of the random networks, and of the default student."""
    depth: int | None = Field(None, ge=2)
    """Blocks of both; by default 3 up to 47 pixels, 4 up to 95, 6 beyond."""
    norm: Literal["batch", "instance", "none"] = "batch"
    """Norm of the random networks; batch norm uses the statistics of the batch."""
    student_norm: Literal["batch", "instance", "none"] = "instance"
    """Norm of the default student."""
    student: SetTrainingConfig = SetTrainingConfig()
    """The training of the student on the set; it sees the same kinds of augmentation, drawn for every image."""


class DataDAM(StudentMethod):
    """The method; see the module's docstring."""

    name: ClassVar[str] = "datadam"
    paper: ClassVar[Paper] = Paper(
        "DataDAM: Efficient Dataset Distillation with Attention Matching",
        "Sajedi, Khaki, Amjadian, Liu, Lawryshyn, Plataniotis",
        "ICCV 2023",
        "https://arxiv.org/abs/2310.00093",
    )
    idea: ClassVar[str] = "Learn a few images per class that random networks attend to as they do to the real ones."
    needs: ClassVar[Needs] = Needs(
        tasks=("classification",),
        students={"student": "spec"},
        data={"train": frozenset({"image", "label"})},
    )
    Config: ClassVar[type[MethodConfig]] = DataDAMConfig
    default_recipe: ClassVar[Mapping[str, Any]] = {
        "data": {"train": "digits:16"},
        "data_config": {
            "match": {"steps": 500},
            "power": 1.0,
            "width": 32,
            "augment": ["crop", "scale", "rotate"],
            "clip": True,
            "student": {"steps": 1000},
        },
    }

    def __init__(self, config: DataDAMConfig) -> None:
        super().__init__(config)
        self._images: SyntheticImages | None = None

    @property
    def images(self) -> SyntheticImages:
        """The synthetic images; valid after the phases have run."""
        if self._images is None:
            raise RuntimeError("the phases have not run")
        return self._images

    def phases(self, ctx: Context) -> Phases:
        """Choose what the images start as, match, train the student on them."""
        config: DataDAMConfig = self.config
        dataset = ctx.dataset("train")
        info = dataset.info
        labels = check_images_per_class(dataset, config.images_per_class if config.init != "noise" else 1)
        student, own = self._new_student(ctx, info)
        start = yield Compute(
            "start",
            lambda: starting_images(
                dataset, labels, config.images_per_class, config.init, ctx.rng(0, "start", shared=True)
            ),
            key=[config.images_per_class, config.init, info.fingerprint],
        )
        if start is None:
            raise RuntimeError("a Compute phase is answered with its result")
        images = self._images = SyntheticImages(start["images"], start["mean"], start["std"], len(info.classes))
        images.to(ctx.device)
        if own:
            student.info.extra.update(mean=start["mean"].tolist(), std=start["std"].tolist())
        yield self._matching(ctx, info, labels, images)
        self._note_clipping(images)
        yield self.student_phase(ctx, student)

    def _new_student(self, ctx: Context, info: DataInfo) -> tuple[Model, bool]:
        """The student that the user named, else the ConvNet; and whether it is the latter.

        Raises:
            RequestError: It does not fit the data.
        """
        config: DataDAMConfig = self.config
        usual = convnet_model(
            info.shape[0],
            info.shape[1:],
            len(info.classes),
            width=config.width,
            depth=self._depth(info),
            norm=config.student_norm,
        )
        self._student = ctx.student(like=usual)
        ctx.task.check(self._student)
        return self._student, self._student.info == usual.info

    def _depth(self, info: DataInfo) -> int:
        depth = self.config.depth if self.config.depth is not None else convnet_depth(info.shape[1:])
        if depth < 2:
            shape = "x".join(map(str, info.shape))
            raise RequestError(f"datadam needs images of at least 4x4 pixels, the set {info.name!r} has {shape}")
        return int(depth)

    def _operations(self, info: DataInfo) -> tuple[Operation, ...]:
        asked: tuple[Operation, ...] | None = self.config.augment
        return suitable_operations(info) if asked is None else asked

    # -- matching --

    def _matching(self, ctx: Context, info: DataInfo, labels: np.ndarray[Any, Any], images: SyntheticImages) -> Train:
        config: DataDAMConfig = self.config
        classes = len(info.classes)
        stream = ctx.stream("train", classes * config.match.batch, tag="match")
        stream = replace(stream, sampler=PerField(tuple(labels.tolist()), parts=stream.shard[1]))
        operations = self._operations(info)
        losses = self._matching_losses(ctx, info)

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            real = images.normalise(batches["train"]["image"])
            yield Update("images", losses(*_siamese(ctx, i, classes, operations, real, images.images), i))

        lr = config.match.lr
        if lr is None:
            lr = 1.0 if config.images_per_class <= 50 else 10.0
        optimizer = Optim(
            [images.images],
            kind="sgd",
            lr=lr,
            options={"momentum": config.match.momentum},
            after_step=[images.clip] if config.clip else [],
        )
        facts = config.model_dump(mode="json", exclude={"student", "student_norm"})
        return Train(
            "match",
            config.match.steps,
            {"images": optimizer},
            {"train": stream},
            step,
            {"images": images},
            key=[facts, info.fingerprint],
        )

    def _matching_losses(self, ctx: Context, info: DataInfo) -> Callable[[Tensor, Tensor, int], dict[str, Tensor]]:
        """The losses of step i, of real and synthetic images (both class-blocked) in that step's random network."""
        config: DataDAMConfig = self.config
        depth, classes = self._depth(info), len(info.classes)
        balance = config.task_balance
        if balance is None:
            balance = 0.01 if max(info.shape[1:]) < 64 else 0.02

        def losses(real: Tensor, synthetic: Tensor, i: int) -> dict[str, Tensor]:
            seed = ctx.rng(i, "network", shared=True).initial_seed()
            network = random_convnet(seed, info.shape[0], info.shape[1:], classes, config.width, depth, config.norm)
            network.to(ctx.device).train().requires_grad_(False)
            with torch.no_grad():
                real_maps, real_embeddings = network.features(real)
            maps, embeddings = network.features(synthetic)
            found = {
                "features": feature_matching_loss(
                    real_embeddings, embeddings, num_classes=classes, task_balance=balance
                )
            }
            if config.attention_weight:
                # The embeddings stand for the last layer.
                pairs = zip(real_maps[:-1], maps[:-1], strict=True)
                terms = [attention_matching_loss(a, b, num_classes=classes, power=config.power) for a, b in pairs]
                found["attention"] = config.attention_weight * torch.stack(terms).sum()
            return found

        return losses

    # -- the student --

    def student_phase(self, ctx: Context, model: Model, name: str = "student") -> Train:
        """The training of a classifier on the images, the method's own student or a further one.

        Args:
            ctx: The context.
            model: Fits the data.
            name: Of the phase; its batches depend on it.
        """
        config: DataDAMConfig = self.config
        images, info, student = self.images, ctx.dataset("train").info, Classifier(model)
        dataset = images.dataset(info)
        training = config.student.model_copy(update={"batch": max(2, min(config.student.batch, len(dataset)))})
        stream = make_stream(ctx, training, tag=name, dataset=dataset)
        operations = self._operations(info)

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            batch = batches["train"]
            shown = siamese_augmentation(batch["image"], operations, ctx.rng(i, "augment"), shared=False)
            logits = student(images.pixels(shown))
            yield Update("student", {"cross_entropy": label_loss(logits, batch["label"])})

        phase = train_phase(name, training, stream, step, student, [])
        phase.key = [operations, training.augment, model.info.architecture, model.info.config]
        return phase

    def _note_clipping(self, images: SyntheticImages) -> None:
        pixels = images.pixels(images.images.detach())
        outside = float(((pixels < 0) | (pixels > 1)).float().mean())
        self.notes = []
        if outside > 1e-3:
            self.notes.append(
                f"{outside:.1%} of the synthetic pixels lie outside [0, 1]: the set's pictures are clipped there, its "
                "tensors are not (clip=true avoids it)."
            )

    # -- what is handed over --

    def deployables(self, ctx: Context) -> dict[str, Deployable]:
        """The student; beside it the distilled set as tensors, as a folder of pictures and as a sheet."""
        deployable: Deployable = ctx.task.deployable(self.student())
        info, images = ctx.dataset("train").info, self.images
        pixels, labels = images.pixels(images.images.detach()).cpu().numpy(), images.labels.cpu().numpy()
        deployable.results["distilled.safetensors"] = partial(
            write_tensors, images=pixels, labels=labels, classes=info.classes
        )
        if pixels.shape[1] in (1, 3):
            deployable.results["distilled"] = partial(write_folder, images=pixels, labels=labels, classes=info.classes)
            sheet = picture_sheet(pixels, labels)
            deployable.results["distilled.png"] = lambda path: _write_bytes(path, sheet)
        return {"student": deployable}


def _siamese(
    ctx: Context, i: int, classes: int, operations: tuple[Operation, ...], real: Tensor, synthetic: Tensor
) -> tuple[Tensor, Tensor]:
    """Both class-blocked batches, augmented: real and synthetic images of a class undergo the same change."""
    pairs = zip(real.chunk(classes), synthetic.chunk(classes), strict=True)
    changed = [
        tuple(
            siamese_augmentation(block, operations, ctx.rng(i, f"augment {label}", shared=True), shared=True)
            for block in pair
        )
        for label, pair in enumerate(pairs)
    ]
    return torch.cat([pair[0] for pair in changed]), torch.cat([pair[1] for pair in changed])


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


METHOD = DataDAM
