"""Demo teachers that segment: a CNN and a transformer, small configurations of library classes, on the digit scenes.

Every one takes a ``seed``, so that teachers can differ: `demo:scenes-segmenter?seed=1`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from compressor.data.segmented_scenes import segmented_scenes
from compressor.method import Context
from compressor.models.model import Model
from compressor.models.segmenter_loading import load_segmenter
from compressor.training.phase import Phases
from compressor.training.random import hash_seed
from compressor.training.supervised import supervised_phase
from compressor.training.training_config import TrainingConfig

__all__ = ["ScenesSegformer", "ScenesSegmenter"]


class _ScenesDemo:
    """A segmenter of 32x32 digit scenes.

    Args:
        seed: Another seed is another teacher.
    """

    name: ClassVar[str]
    library: ClassVar[str]
    architecture: ClassVar[str]
    steps: ClassVar[int]
    lr: ClassVar[float]
    task = "segmentation"
    data = "scenes:32?masks=true"
    batch = 32

    def __init__(self, seed: int = 0) -> None:
        self.seed = int(seed)

    def build(self) -> Model:
        """The untrained model; its weights follow from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash_seed(self.name, self.seed))
            return load_segmenter(self.library, f"{self.architecture},num_classes=11,in_chans=1")

    def fingerprint(self) -> list[Any]:
        """Everything that decides the weights."""
        facts = [self.name, self.library, self.architecture, self.lr, self.batch, self.seed]
        return [*facts, segmented_scenes("train").info.fingerprint]

    def phases(self, model: Model, ctx: Context, steps: int) -> Phases:
        """Cross-entropy on scenes that never repeat within a training."""
        config = TrainingConfig(steps=steps, batch=self.batch, lr=self.lr, weight_decay=1e-2)
        yield supervised_phase(ctx, config, model, tag=f"seed {self.seed}")


class ScenesSegmenter(_ScenesDemo):
    """DeepLabV3+ on a ResNet of four basic blocks (timm)."""

    name = "scenes-segmenter"
    library = "timm"
    architecture = "resnet18?layers=[1,1,1,1],channels=[16,32,48,64],output_stride=8,width=48"
    steps = 400
    lr = 1e-2


class ScenesSegformer(_ScenesDemo):
    """SegFormer of four stages of one block (transformers)."""

    name = "scenes-segformer"
    library = "transformers"
    architecture = (
        "segformer?depths=[1,1,1,1],hidden_sizes=[32,48,64,96],num_attention_heads=[1,2,2,4],sr_ratios=[4,2,1,1],"
        "mlp_ratios=[2,2,2,2],decoder_hidden_size=64"
    )
    steps = 500
    lr = 3e-3
