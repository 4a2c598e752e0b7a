"""Small models for the methods that change a model and train it to return what it returned before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.models.edits.sparsity import masked_weights
from compressor.models.model import Model
from compressor.recipe import Recipe
from compressor.recipe_resolution import Flags
from compressor.registry import load_method
from compressor.tasks.classification import Classification
from compressor.tasks.image_generation import ImageGeneration
from compressor.training.phase import Train
from tests.method_runs import Trained, run_method
from tests.tiny_transformers import tiny

SMALL: dict[str, dict[str, Any]] = {
    "sparsity": {"steps": 2, "batch": 8, "min_weights": 16},
    "qat": {"steps": 3, "batch": 8, "calibration_batches": 2},
}


def denoiser(**extra: Any) -> Model:
    return tiny("QwenImageTransformer2DModel", layers=2).model(**extra)


def images() -> Classification:
    return Classification({"train": "scenes"}, {})


def run(
    directory: Path,
    name: str,
    config: Mapping[str, Any],
    *,
    teacher: Model,
    task: Any = None,
    chained: Model | None = None,
    kill: tuple[str, int] | None = None,
    watch: Callable[[Train], object] = lambda phase: None,
) -> Trained:
    """Run a method on the digits, or on a task."""
    method_class = load_method(name)
    method = method_class(method_class.Config.model_validate(config))
    task = task or ImageGeneration({"train": "digits"}, {})
    return run_method(directory, method, task, teachers=[teacher], chained=chained, kill=kill, watch=watch)


def state_of(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def zeros(model: Model) -> dict[str, Tensor]:
    return {weight.name: weight.value.detach() == 0 for weight in masked_weights(model.module)}


def resolved(**flags: Any) -> Recipe:
    return Recipe().resolve(Flags(**flags))
