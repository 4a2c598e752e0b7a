"""CNN-ViT collaboration (Zhu et al. 2023, arXiv 2307.12574): two small segmenters teach each other while they learn.

A CNN and a vision transformer train together on the labels, without a teacher. Their early layers mimic each other's
features; deeper features and logits are passed on, region by region and pixel by pixel, from the student that is more
reliable there. Trained: both students and the adapters between their early layers. Exported: each student.

No official code was published. The structure is the paper's; distances, the criterion of reliability (the cross-entropy
with the labels) and the weights are the most direct reading of its abstract, so its figures must not be claimed for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.data.stream import Batch
from compressor.deployable import Deployable
from compressor.errors import RequestError
from compressor.kernels import feature_distance
from compressor.losses.dense import map_cross_entropy, pixel_cross_entropy, region_mean
from compressor.losses.divergence import kl_divergence
from compressor.losses.precision import at_least_float32
from compressor.method import Context, MethodConfig, Needs, Paper
from compressor.models.model import Model
from compressor.models.segmenter import Segmenter
from compressor.training.curves import polynomial
from compressor.training.phase import Optim, Phases, Train, Update
from compressor.training.training_config import BatchConfig, make_stream, parameter_groups

__all__ = [
    "METHOD", "CnnVitCollab", "CnnVitCollabConfig", "hfd_loss", "pixel_bsd_loss", "region_bsd_loss",
    "region_reliability",
]  # fmt: skip


def hfd_loss(projected_features: Tensor, target_features: Tensor) -> Tensor:
    """Heterogeneous feature distillation: mean cosine distance over batch and positions.

    Args:
        projected_features: ``(B, C, h, w)`` float: one student's low-layer features after its adapter. Resized
            bilinearly where its size differs from the target's.
        target_features: ``(B, C, H, W)`` float: the other student's low-layer features as they are; detached.

    Returns:
        Scalar in [0, 2]. Positions with a zero vector count as distance 1.
    """
    _check_channels(projected_features, target_features)
    size = target_features.shape[-2:]
    if projected_features.shape[-2:] != size:
        projected_features = F.interpolate(projected_features, size, mode="bilinear", align_corners=False)
    return feature_distance(projected_features, target_features, "cosine")


@torch.no_grad()
def region_reliability(
    cnn_logits: Tensor, vit_logits: Tensor, labels: Tensor, grid_size: tuple[int, int], ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Which student has the lower mean cross-entropy in each region of a grid.

    Args:
        cnn_logits: ``(B, K, H, W)`` float.
        vit_logits: ``(B, K, H, W)`` float.
        labels: ``(B, H, W)`` int64.
        grid_size: ``(gh, gw)``; regions are the bins of adaptive pooling.
        ignore_index: The label of pixels that leave the mean.

    Returns:
        ``(cnn_wins, valid)``, both ``(B, gh, gw)`` bool: the CNN teaches there (ties go to the transformer), and the
        region holds a labelled pixel. Where it does not, both are False.
    """
    height, width = grid_size
    cnn_error, labelled = pixel_cross_entropy(cnn_logits, labels, ignore_index=ignore_index)
    vit_error, _ = pixel_cross_entropy(vit_logits, labels, ignore_index=ignore_index)
    cnn_mean, valid = region_mean(cnn_error, labelled, (height, width))
    vit_mean, _ = region_mean(vit_error, labelled, (height, width))
    return (cnn_mean < vit_mean) & valid, valid


def region_bsd_loss(
    cnn_features: Tensor, vit_features: Tensor, cnn_wins: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Region-wise bidirectional selective distillation: cosine distance of pooled features, towards the better side.

    Args:
        cnn_features: ``(B, C, h, w)`` float, the last features before the classifier.
        vit_features: ``(B, C, h', w')`` float.
        cnn_wins: ``(B, gh, gw)`` bool, from `region_reliability`.
        valid: ``(B, gh, gw)`` bool, likewise.

    Returns:
        ``(loss_cnn, loss_vit)``, scalars in [0, 2]: mean over the regions that the transformer teaches, with gradient
        for the CNN alone; and the reverse. A mean over no regions is a differentiable 0.
    """
    _check_channels(cnn_features, vit_features)
    height, width = valid.shape[-2:]
    cnn = F.adaptive_avg_pool2d(at_least_float32(cnn_features), (height, width))
    vit = F.adaptive_avg_pool2d(at_least_float32(vit_features), (height, width))
    loss_cnn = feature_distance(cnn, vit, "cosine", valid & ~cnn_wins)
    loss_vit = feature_distance(vit, cnn, "cosine", valid & cnn_wins)
    return loss_cnn, loss_vit


def pixel_bsd_loss(
    cnn_logits: Tensor, vit_logits: Tensor, labels: Tensor, temperature: float = 1.0, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Pixel-wise bidirectional selective distillation: ``T ** 2 * KL`` towards the student that is better at a pixel.

    Args:
        cnn_logits: ``(B, K, H, W)`` float.
        vit_logits: ``(B, K, H, W)`` float.
        labels: ``(B, H, W)`` int64; they choose the direction, nothing else.
        temperature: T, above 0.
        ignore_index: The label of pixels that are left out.

    Returns:
        ``(loss_cnn, loss_vit)``, scalars in nats: mean over the pixels where the transformer's cross-entropy is
        strictly lower, with gradient for the CNN alone; and the reverse. A mean over no pixels is a differentiable 0.
    """
    with torch.no_grad():
        cnn_error, labelled = pixel_cross_entropy(cnn_logits, labels, ignore_index=ignore_index)
        vit_error, _ = pixel_cross_entropy(vit_logits, labels, ignore_index=ignore_index)
    vit_teaches, cnn_teaches = labelled & (vit_error < cnn_error), labelled & (cnn_error < vit_error)
    loss_cnn = kl_divergence(cnn_logits, vit_logits, temperature=temperature, mask=vit_teaches, dim=1)
    loss_vit = kl_divergence(vit_logits, cnn_logits, temperature=temperature, mask=cnn_teaches, dim=1)
    return temperature**2 * loss_cnn, temperature**2 * loss_vit


def _check_channels(x: Tensor, y: Tensor) -> None:
    if x.shape[:2] != y.shape[:2]:
        raise RequestError(
            f"features of {x.shape[1]} and {y.shape[1]} channels (batches of {x.shape[0]} and {y.shape[0]}) cannot be "
            "compared: project one side to the other's channels"
        )


class NetworkTraining(MethodConfig):
    """How one of the students is trained, and where its features are read."""

    optimizer: Literal["adamw", "adam", "sgd"] = "sgd"
    """The optimiser."""
    lr: float = Field(0.01, gt=0)
    """Highest learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight decay; biases and the weights of norms have none."""
    power: float = Field(0.9, ge=0)
    """The rate falls as (1 - step / steps) to this power; 0 leaves it constant."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient; None for no limit."""
    low_layer: str | None = None
    """Layer of the early features; by default the first stage of stride 4."""
    head: str | None = None
    """Layer that reads the last features; by default the one that gives the logits."""


class ViTTraining(NetworkTraining):
    """The same, with the usual values of vision transformers."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """The optimiser."""
    lr: float = Field(6e-5, gt=0)
    """Highest learning rate."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay; biases and the weights of norms have none."""
    power: float = Field(1.0, ge=0)
    """The rate falls as (1 - step / steps) to this power; 0 leaves it constant."""


class CnnVitCollabConfig(BatchConfig):
    """Configuration of CNN-ViT collaboration."""

    batch: int = Field(16, ge=2)
    """Images in a batch of one process."""
    hfd_weight: float = Field(0.1, ge=0)
    """Weight of the early layers' features."""
    region_weight: float = Field(0.1, ge=0)
    """Weight of the last features, region by region."""
    pixel_weight: float = Field(1.0, ge=0)
    """Weight of the logits, pixel by pixel. With all three at 0 each student learns by itself."""
    temperature: float = Field(1.0, gt=0)
    """Softens the logits of both."""
    grid: tuple[int, int] = (8, 8)
    """Rows and columns of regions in an image."""
    main: Literal["cnn", "vit"] = "cnn"
    """Whose artifacts come first, and which student the next method of a chain takes."""
    cnn: NetworkTraining = NetworkTraining()
    """The CNN."""
    vit: ViTTraining = ViTTraining()
    """The vision transformer."""


class Adapters(nn.Module):
    """What stands between the students in training: HFD's adapters, and a projection where the widths differ.

    Args:
        cnn_low: Channels of the CNN's early features.
        vit_low: Of the transformer's.
        cnn_last: Channels of the CNN's last features.
        vit_last: Of the transformer's.
    """

    def __init__(self, cnn_low: int, vit_low: int, cnn_last: int, vit_last: int) -> None:
        super().__init__()
        self.cnn_to_vit, self.vit_to_cnn = _adapter(cnn_low, vit_low), _adapter(vit_low, cnn_low)
        self.last: nn.Module = nn.Identity() if cnn_last == vit_last else nn.Conv2d(vit_last, cnn_last, 1)

    def of(self, name: str) -> list[nn.Module]:
        """What a student's optimiser owns beside the student: the modules behind whose outputs it learns."""
        return [self.cnn_to_vit] if name == "cnn" else [self.vit_to_cnn, self.last]


def _adapter(channels: int, target: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, target, 1), nn.BatchNorm2d(target), nn.ReLU(), nn.Conv2d(target, target, 1)
    )


class CnnVitCollab:
    """The method; see the module's docstring.

    Args:
        config: The method's configuration.
    """

    name: ClassVar[str] = "cnn-vit-collab"
    paper: ClassVar[Paper] = Paper(
        "A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for Semantic Segmentation",
        "Zhu, Luo, Zheng, Wang, Wang",
        "ICCV 2023",
        "https://arxiv.org/abs/2307.12574",
    )
    idea: ClassVar[str] = "A CNN and a transformer learn together; where one is more reliable it teaches the other."
    needs: ClassVar[Needs] = Needs(
        tasks=("segmentation",),
        students={"cnn": "spec", "vit": "spec"},
        data={"train": frozenset({"image", "mask"})},
        first="it trains two students of its own",
    )
    Config: ClassVar[type[MethodConfig]] = CnnVitCollabConfig
    default_recipe: ClassVar[Mapping[str, Any]] = {
        "students": {
            "cnn": "timm:resnet18?layers=[1,1,1,1],channels=[12,16,24,32],output_stride=8,width=32",
            "vit": "transformers:segformer?depths=[1,1,1,1],hidden_sizes=[16,32,48,64],num_attention_heads=[1,2,2,4],"
            "sr_ratios=[4,2,1,1],mlp_ratios=[2,2,2,2],decoder_hidden_size=48",
        },
        "data": {"train": "scenes:32?masks=true"},
        "data_config": {
            "steps": 1200,
            "batch": 32,
            "cnn": {"optimizer": "adamw", "lr": 5e-3, "weight_decay": 0.01},
            "vit": {"lr": 3e-3},
        },
    }

    def __init__(self, config: Any) -> None:
        self.config = config
        self.notes: list[str] = []
        self._students: dict[str, Model] = {}

    def phases(self, ctx: Context) -> Phases:
        """One training of both students on the same batches."""
        config = self.config
        models = {name: ctx.student(name) for name in ("cnn", "vit")}
        for model in models.values():
            ctx.task.check(model)
        other = "vit" if config.main == "cnn" else "cnn"
        self._students = {name: models[name] for name in (config.main, other)}
        self.notes = [
            f"student is the {config.main} ({models[config.main].info.architecture}); {other} "
            f"({models[other].info.architecture}) learnt beside it"
        ]
        cnn, vit = Segmenter(models["cnn"]), Segmenter(models["vit"])
        stream = make_stream(ctx, config)
        shape = stream.dataset.info.shape
        places = {"cnn": _places(cnn, shape, config.cnn), "vit": _places(vit, shape, config.vit)}
        adapters = _adapters(cnn, vit, shape, places).to(ctx.device)
        ignore_index = int(stream.dataset.info.extra.get("ignore_index", 255))

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            image, labels = batches["train"]["image"], batches["train"]["mask"]
            cnn_logits, cnn_low, cnn_last = cnn.low_and_last(image, *places["cnn"])
            vit_logits, vit_low, vit_last = vit.low_and_last(image, *places["vit"])
            losses = {
                "labels-cnn": map_cross_entropy(cnn_logits, labels, ignore_index=ignore_index),
                "labels-vit": map_cross_entropy(vit_logits, labels, ignore_index=ignore_index),
            }
            if config.hfd_weight:
                losses["hfd-cnn"] = config.hfd_weight * hfd_loss(adapters.cnn_to_vit(cnn_low), vit_low)
                losses["hfd-vit"] = config.hfd_weight * hfd_loss(adapters.vit_to_cnn(vit_low), cnn_low)
            if config.region_weight:
                wins, valid = region_reliability(cnn_logits, vit_logits, labels, config.grid, ignore_index)
                to_cnn, to_vit = region_bsd_loss(cnn_last, adapters.last(vit_last), wins, valid)
                losses |= {"region-cnn": config.region_weight * to_cnn, "region-vit": config.region_weight * to_vit}
            if config.pixel_weight:
                to_cnn, to_vit = pixel_bsd_loss(cnn_logits, vit_logits, labels, config.temperature, ignore_index)
                losses |= {"pixel-cnn": config.pixel_weight * to_cnn, "pixel-vit": config.pixel_weight * to_vit}
            yield Update(("cnn", "vit"), losses)

        trained = {"cnn": cnn.module, "vit": vit.module, "adapters": adapters}
        yield Train(
            "collaborate",
            config.steps,
            {
                name: _optim(getattr(config, name), [trained[name], *adapters.of(name)], config.steps)
                for name in ("cnn", "vit")
            },
            {"train": stream},
            step,
            trained,
            modes=[(module, "train") for module in trained.values()],
        )

    def student(self) -> Model:
        """The main student."""
        return next(iter(self.students().values()))

    def students(self) -> dict[str, Model]:
        """Both, the main one first."""
        if not self._students:
            raise RuntimeError("the phases have not run")
        return self._students

    def deployables(self, ctx: Context) -> dict[str, Deployable]:
        """Each student by itself; the adapters are left behind."""
        return {name: ctx.task.deployable(model) for name, model in self.students().items()}


def _places(network: Segmenter, shape: Sequence[int], config: NetworkTraining) -> tuple[str, str]:
    """(low layer, head) of a student for images of the shape (C, H, W)."""
    head = config.head or network.head(shape)
    if config.low_layer is not None:
        return network.layers(shape, [config.low_layer])[0].name, head
    stages = network.layers(shape)
    deep = [stage for stage in stages if 4 * stage.shape[1] <= shape[1] + 3]
    return (deep or stages)[0].name, head


def _adapters(cnn: Segmenter, vit: Segmenter, shape: Sequence[int], places: Mapping[str, tuple[str, str]]) -> Adapters:
    """Adapters of the widths that one image shows."""
    widths: list[int] = []
    for which in (1, 2):
        for name, network in (("cnn", cnn), ("vit", vit)):
            training = [module for module in network.module.modules() if module.training]
            network.module.eval()
            with torch.no_grad():
                image = torch.zeros(1, *shape, device=next(network.parameters()).device)
                widths.append(network.low_and_last(image, *places[name])[which].shape[1])
            for module in training:
                module.training = True
    return Adapters(*widths)


def _optim(config: NetworkTraining, modules: Sequence[nn.Module], steps: int) -> Optim:
    return Optim(
        parameter_groups(modules, config.weight_decay),
        kind=config.optimizer,
        lr=config.lr,
        options={"momentum": config.momentum} if config.optimizer == "sgd" else {},
        schedule=polynomial(max(steps, 1), config.power),
        clip_norm=config.clip_norm,
    )


METHOD = CnnVitCollab
