"""Demo teachers that classify: small configurations of timm's classes, trained on the digit scenes.

Every one takes a ``seed``, so that ensembles have teachers that differ: `demo:scenes-cnn?seed=1`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from compressor.data.scenes import scenes
from compressor.method import Context
from compressor.models.classifier_loading import load_classifier
from compressor.models.model import Model
from compressor.training.phase import Phases
from compressor.training.random import hash_seed
from compressor.training.supervised import supervised_phase
from compressor.training.training_config import TrainingConfig

__all__ = ["ScenesCNN", "ScenesCNNSmall", "ScenesViT"]


class ScenesClassifier:
    """A timm classifier of 16x16 digit scenes.

    Args:
        seed: Another seed is another teacher.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    steps: ClassVar[int]
    lr: ClassVar[float]
    task = "classification"
    data = "scenes"
    batch = 64

    def __init__(self, seed: int = 0) -> None:
        self.seed = int(seed)

    def build(self) -> Model:
        """The untrained model; its weights follow from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash_seed(self.name, self.seed))
            return load_classifier("timm", f"{self.architecture},num_classes=10,in_chans=1")

    def fingerprint(self) -> list[Any]:
        """Everything that decides the weights."""
        return [self.name, self.architecture, self.lr, self.batch, self.seed, scenes("train").info.fingerprint]

    def phases(self, model: Model, ctx: Context, steps: int) -> Phases:
        """Cross-entropy on scenes that never repeat within a training."""
        config = TrainingConfig(steps=steps, batch=self.batch, lr=self.lr, weight_decay=1e-2)
        yield supervised_phase(ctx, config, model, tag=f"seed {self.seed}")


class ScenesCNN(ScenesClassifier):
    """A ResNet of four basic blocks, 135,000 parameters."""

    name = "scenes-cnn"
    architecture = "resnet18?layers=[1,1,1,1],channels=[16,32,48,64]"
    steps = 250
    lr = 1e-2


class ScenesCNNSmall(ScenesClassifier):
    """The same at about a third of the width, trained briefly: a student that fine-tuning starts from."""

    name = "scenes-cnn-small"
    architecture = "resnet18?layers=[1,1,1,1],channels=[8,12,16,24]"
    steps = 150
    lr = 1e-2


class ScenesViT(ScenesClassifier):
    """A vision transformer of four blocks of width 64 over 4x4 patches, 200,000 parameters."""

    name = "scenes-vit"
    architecture = "vit_tiny_patch16_224?img_size=16,patch_size=4,embed_dim=64,depth=4,num_heads=4"
    steps = 600
    lr = 2e-3
