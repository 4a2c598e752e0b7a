"""A library module together with what must be known to call it, save it and build it again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from compressor.atomic import atomic_directory, write_json
from compressor.errors import ModelError, RequestError, nearest

__all__ = ["EDITS", "Edit", "Model", "ModelInfo", "edit", "load_model", "save_model"]

EditFunction = Callable[..., nn.Module]
EDITS: dict[str, EditFunction] = {}
"""Structural changes by name: functions ``(module, **arguments) -> module`` with JSON arguments."""


def edit(name: str) -> Callable[[EditFunction], EditFunction]:
    """Register a function as a structural change that can be recorded and replayed."""

    def register(function: EditFunction) -> EditFunction:
        if name in EDITS and EDITS[name].__module__ != function.__module__:
            raise RequestError(f"two edits are named {name!r}")
        EDITS[name] = function
        return function

    return register


@dataclass(frozen=True)
class Edit:
    """One recorded structural change.

    Attributes:
        name: Registered name, "module:function"; the module is imported on replay.
        arguments: JSON arguments.
    """

    name: str
    arguments: dict[str, Any]

    def apply(self, module: nn.Module) -> nn.Module:
        if self.name not in EDITS:
            from compressor.registry import import_edit

            import_edit(self.name)
        if self.name not in EDITS:
            raise ModelError(f"the model was made with an unknown edit {self.name!r}: {nearest(self.name, EDITS)}")
        return EDITS[self.name](module, **self.arguments)


@dataclass(frozen=True)
class ModelInfo:
    """What the weights alone do not say.

    Attributes:
        library: "diffusers", "timm", "transformers", "torchvision" or "python".
        architecture: Class or architecture name in that library, or ``package.module:factory`` for "python".
        config: The class's configuration (JSON) that builds the unedited module.
        edits: Structural changes after that, in order.
        extra: JSON facts by name: prediction type, schedule, input size, mean and std, class names, ...
    """

    library: str
    architecture: str
    config: dict[str, Any]
    edits: tuple[Edit, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Model:
    """A real library module and its description."""

    module: nn.Module
    info: ModelInfo

    def edit(self, name: str, **arguments: Any) -> Model:
        """Apply a registered edit to the module (in place where the edit does so) and record it."""
        change = Edit(name, json.loads(json.dumps(arguments)))
        return Model(change.apply(self.module), replace(self.info, edits=(*self.info.edits, change)))

    def copy(self) -> Model:
        """An independent model with the same weights, every parameter trainable."""
        return Model(copy.deepcopy(self.module).requires_grad_(True), copy.deepcopy(self.info))

    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())


MODEL_FILE = "compressor.json"
WEIGHTS_FILE = "model.safetensors"


def save_model(model: Model, directory: Path) -> None:
    """Write ``compressor.json`` and ``model.safetensors``; a plain library class also as the library itself loads it.

    A diffusers model without edits, or whose edits left a plain library class (``info.extra["plain"]``), is saved with
    the library's own ``save_pretrained``; timm and transformers get their own configuration beside the weights.
    """
    from safetensors.torch import save_model as save_weights

    from compressor.models.classifier_loading import write_library_files

    with atomic_directory(directory) as temporary:
        if model.info.library == "diffusers" and (not model.info.edits or model.info.extra.get("plain")):
            model.module.save_pretrained(temporary)  # type: ignore[operator]
            write_json(temporary / MODEL_FILE, _describe(model.info) | {"weights": "diffusers"})
        else:
            save_weights(model.module, str(temporary / WEIGHTS_FILE))
            write_library_files(model, temporary)
            write_json(temporary / MODEL_FILE, _describe(model.info) | {"weights": WEIGHTS_FILE})


def _describe(info: ModelInfo) -> dict[str, Any]:
    return {"schema": 1, **asdict(info), "edits": [asdict(change) for change in info.edits]}


def load_model(directory: Path) -> Model:
    """Build the module from its description, replay its edits, load the weights strictly.

    Raises:
        ModelError: The directory holds no model of ours, or the weights are damaged or do not fit.
    """
    from compressor.models.spec import build_module, load_weights

    path = Path(directory) / MODEL_FILE
    try:
        stored: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        edits = tuple(Edit(**change) for change in stored["edits"])
        info = ModelInfo(stored["library"], stored["architecture"], stored["config"], edits, stored["extra"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{directory} holds no model saved by compressor ({path.name}: {error})") from error
    module = build_module(info)
    for change in info.edits:
        module = change.apply(module)
    load_weights(module, Path(directory))
    return Model(module, info)
