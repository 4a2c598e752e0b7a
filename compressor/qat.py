"""Quantisation-aware distillation: fine-tune a model under the rounding of an 8-bit engine (built in).

Weights and the inputs of layers are rounded as the exporter will round them, and the weights learn to say, under that
rounding, what the model said before in floats. The calibration of the activations comes first and is held.

Trained: the model that the chain hands on, one that the user names, or a copy of the teacher. Exported: the same graphs
with plain weights, which an `int8` target then calibrates and rounds as usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.data.stream import Stream
from compressor.errors import RequestError
from compressor.layer_patterns import check_patterns, lies_in
from compressor.method import Context, MethodConfig, Needs, OneStudent, Paper
from compressor.models.edits.fake_quantisation import EDIT, observed_ranges, plain, quantised_weights
from compressor.training.phase import Compute, Phases, Step, Train
from compressor.training.self_distillation import SelfDistillationConfig, fine_tuning, given_model
from compressor.training.training_config import make_optim, stream_key

__all__ = ["METHOD", "QAT", "QATConfig"]


class QATConfig(SelfDistillationConfig):
    """Configuration of the fine-tuning under fake quantisation."""

    weight_bits: int = Field(7, ge=2, le=8)
    """Bits of the weights: 7 as ort-int8 exports them by default, 8 for other targets of eight bits."""
    activation_bits: int = Field(8, ge=2, le=8)
    """Bits of the inputs of linear and convolution layers."""
    symmetric: bool = False
    """Activations around a zero point 0, as TensorRT has them; else from the smallest to the largest value."""
    percentile: float = Field(100.0, gt=50, le=100)
    """Share of a batch's values, in percent, inside an activation's range; 100 is all that the calibration sees."""
    calibration_batches: int = Field(8, ge=1)
    """Batches that the activations' ranges are taken on."""
    exclude: tuple[str, ...] = ()
    """Layers that are not rounded, as a target's ``calibration.exclude``: paths of modules, with * and ?."""


class QAT(OneStudent[QATConfig]):
    """The method; see the module's docstring. Masks that the model came with hold in whatever trains it next."""

    name: ClassVar[str] = "qat"
    paper: ClassVar[Paper] = Paper(
        "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        "Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko",
        "CVPR 2018",
        "https://arxiv.org/abs/1712.05877",
    )
    idea: ClassVar[str] = "Fine-tune under the rounding of an 8-bit engine until it says what the float model said."
    needs: ClassVar[Needs] = Needs(
        tasks=("classification", "segmentation", "image-generation"),
        teachers={"teacher": "any"},
        students={"student": "spec"},
        data={"train": frozenset({"image"})},
    )
    Config: ClassVar[type[MethodConfig]] = QATConfig
    default_recipe: ClassVar[Mapping[str, Any]] = {
        "teachers": {"teacher": "demo:scenes-cnn"},
        "data": {"train": "scenes"},
    }

    def phases(self, ctx: Context) -> Phases:
        """Calibrate, then one fine-tuning against the model as it came."""
        config, given = self.config, given_model(ctx)
        check_patterns(config.exclude, [path for path, _ in given.module.named_modules()], "qat.exclude")
        # Norms keep the statistics that the export folds; dropout and dropped labels would only blur the match.
        given.module.eval()
        before = given.copy()
        before.module.requires_grad_(False)
        stream, step = fine_tuning(ctx, config, given, before, self.name)
        key = [config.percentile, config.calibration_batches, list(config.exclude), stream_key(config, stream)]
        found = (yield Compute("calibrate", lambda: self._calibrate(given.module, stream, step), key=key)) or {}
        ranges = {name: ends.tolist() for name, ends in found.items()}
        rounded = given.edit(
            EDIT,
            weight_bits=config.weight_bits,
            activation_bits=config.activation_bits,
            ranges=ranges,
            symmetric=config.symmetric,
            exclude=list(config.exclude),
        )
        self.notes = [self._describe(rounded.module, len(ranges))]
        yield Train(
            "distil",
            config.steps,
            {"student": make_optim(config, [rounded.module])},
            {"train": stream},
            step,
            {"student": rounded.module},
            modes=[(rounded.module, "eval"), (before.module, "eval")],
            key=[change.arguments for change in rounded.info.edits if change.name == EDIT],
        )
        self._student = plain(rounded)

    def _calibrate(self, module: nn.Module, stream: Stream, step: Step) -> dict[str, Tensor]:
        """Ranges of the layers' inputs, (2,) float64 each, on what the training asks."""
        with torch.no_grad(), observed_ranges(module, self.config.percentile) as ranges:
            for i in range(self.config.calibration_batches):
                next(iter(step({"train": stream[i]}, i)))
        kept = {name: ends for name, ends in ranges.items() if not lies_in(name, self.config.exclude)}
        if not kept:
            besides = " besides those of qat.exclude" if self.config.exclude else ""
            raise RequestError(
                f"qat: a {type(module).__name__} has no linear or convolution layer to quantise{besides}"
            )
        return {name: torch.tensor(ends, dtype=torch.float64) for name, ends in kept.items()}

    def _describe(self, module: nn.Module, inputs: int) -> str:
        weights = quantised_weights(module)
        count = sum(weight.value.numel() for weight in weights)
        total = sum(parameter.numel() for parameter in module.parameters())
        return (
            f"qat: trained under {self.config.weight_bits}-bit weights in {len(weights)} layers ({count:,} of "
            f"{total:,} parameters) and {self.config.activation_bits}-bit inputs of {inputs}; stored as floats"
        )


METHOD = QAT
