"""Images that are trained: the parameters of data set distillation, and what they start as."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from compressor.data.dataset import ArrayDataset, DataInfo, Dataset, labels_of
from compressor.errors import RequestError

__all__ = ["Start", "SyntheticImages", "check_images_per_class", "k_center", "starting_images"]

Start = Literal["real", "noise", "k-center"]
STATISTICS_SAMPLES = 2000

Array = np.ndarray[Any, Any]


class SyntheticImages(nn.Module):
    """As many images of every class, class-blocked, in normalised pixels.

    Args:
        images: ``(K * n, C, H, W)`` float32, normalised, class-blocked.
        mean: ``(C,)`` of the real set's pixels in [0, 1].
        std: ``(C,)``.
        num_classes: K.

    Attributes:
        images: The parameter.
        labels: ``(K * n,)`` int64: n times 0, n times 1, ...
    """

    images: nn.Parameter
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, images: Tensor, mean: Tensor, std: Tensor, num_classes: int) -> None:
        super().__init__()
        self.images = nn.Parameter(images.clone())
        per_class = len(images) // num_classes
        self.register_buffer("labels", torch.arange(num_classes).repeat_interleave(per_class))
        self.register_buffer("mean", mean.float().view(-1, 1, 1))
        self.register_buffer("std", std.float().view(-1, 1, 1))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] as normalised ones."""
        return (pixels - self.mean) / self.std

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised pixels as raw ones, in which [0, 1] can be shown; others may occur."""
        return images * self.std + self.mean

    @torch.no_grad()
    def clip(self) -> None:
        """Move every pixel into what can be shown."""
        low, high = self.normalise(torch.zeros_like(self.mean)), self.normalise(torch.ones_like(self.mean))
        self.images.copy_(self.images.clamp(low, high))

    def dataset(self, info: DataInfo) -> ArrayDataset:
        """The images, normalised, with their labels.

        Args:
            info: Of the real set: the classes and what suits its images.
        """
        images, labels = self.images.detach().cpu().numpy(), self.labels.cpu().numpy()
        key = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
        own = DataInfo(f"{info.name} distilled", key, info.classes, info.shape, None, info.extra)
        return ArrayDataset(own, {"image": images, "label": labels})


def check_images_per_class(dataset: Dataset, count: int) -> Array:
    """The labels (N,) of a set in which every class has at least ``count`` images.

    Raises:
        RequestError: It has fewer than two classes, or a class has fewer images.
    """
    classes, labels = dataset.info.classes, labels_of(dataset)
    if len(classes) < 2:
        raise RequestError(f"the set {dataset.info.name!r} has {len(classes)} classes: at least two are needed")
    counts = np.bincount(labels, minlength=len(classes))
    fewest = int(counts.argmin())
    if counts[fewest] < count:
        raise RequestError(
            f"class {classes[fewest]!r} of the set {dataset.info.name!r} has {counts[fewest]} images, {count} a class "
            "are asked for: lower images_per_class, or start from noise (init=noise)"
            if count > 1
            else f"class {classes[fewest]!r} of the set {dataset.info.name!r} has no image: add some, or remove it"
        )
    return labels


def starting_images(
    dataset: Dataset, labels: Array, per_class: int, start: Start, generator: torch.Generator
) -> dict[str, Tensor]:
    """What synthetic images start as, and the statistics of the real ones.

    Args:
        dataset: Samples with ``image`` (C, H, W) in [0, 1].
        labels: (N,) of all samples; every class has enough of them (`check_images_per_class`).
        per_class: Images of every class.
        start: "real": random images of the class; "noise": standard normal; "k-center": images of the class that
            cover it (`k_center` in pixels).
        generator: On the CPU.

    Returns:
        ``images`` (K * per_class, C, H, W) normalised, class-blocked; ``mean`` and ``std`` (C,) of at most 2000 images.
    """
    some = torch.randperm(len(dataset), generator=generator)[:STATISTICS_SAMPLES].tolist()
    pixels = _read(dataset, some).double()
    mean = pixels.mean(dim=(0, 2, 3)).float()
    std = pixels.std(dim=(0, 2, 3)).float().clamp(min=1e-3)
    classes, blocks = len(dataset.info.classes), []
    for label in range(classes):
        if start == "noise":
            blocks.append(torch.randn((per_class, *dataset.info.shape), generator=generator))
            continue
        members = torch.from_numpy(np.flatnonzero(labels == label))
        if start == "real":
            chosen = members[torch.randperm(len(members), generator=generator)[:per_class]]
        else:
            chosen = members[k_center(_read(dataset, members.tolist()).flatten(1), per_class)]
        blocks.append((_read(dataset, chosen.tolist()) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    return {"images": torch.cat(blocks), "mean": mean, "std": std}


def k_center(features: Tensor, count: int) -> Tensor:
    """Greedy k-center (Sener & Savarese 2018, algorithm 1): every next point is the one farthest from those chosen.

    Args:
        features: ``(N, D)`` float; the first choice is the point nearest to their mean.
        count: Points to choose, at most N.

    Returns:
        ``(count,)`` int64 indices, all different unless points coincide.
    """
    distance = (features - features.mean(dim=0)).square().sum(dim=1)
    chosen = [int(distance.argmin())]
    nearest = torch.full_like(distance, float("inf"))
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).square().sum(dim=1))
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def _read(dataset: Dataset, places: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(dataset[place]["image"], np.float32) for place in places]))
