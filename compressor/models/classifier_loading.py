"""Classifiers of timm, torchvision and transformers: loaded, described, and built again from the description.

    timm:NAME[@FILE][?key=value,...]       a timm model; with FILE, its weights (.safetensors, or .pth of tensors)
    timm:DIR                               a folder that timm wrote (``local-dir:`` in timm's own words)
    torchvision:NAME[@FILE][?key=value,...]
    transformers:DIR_OR_ID[?key=value,...]
    transformers:KIND[?key=value,...]      a new one of transformers' model type (vit, convnext): such is a student

Keys are the arguments of the library's own constructor (``num_classes``, ``in_chans``, ``img_size``, ...), and:
``pretrained=true`` downloads weights; ``mean=[..]`` and ``std=[..]`` replace the normalisation that the library knows.
Without FILE and ``pretrained`` the weights of timm and torchvision models are random: such a model is a student.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressor.errors import ModelError, RequestError, first_line, nearest
from compressor.models.checkpoint_files import load_state, read_state
from compressor.models.model import Model, ModelInfo
from compressor.spec_options import split_options

__all__ = [
    "LIBRARIES", "Argument", "build_classifier", "create_timm", "create_torchvision", "create_transformers",
    "load_classifier", "new_config", "write_library_files",
]  # fmt: skip

LIBRARIES = ("timm", "torchvision", "transformers")

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass
class Argument:
    """A spec behind its kind, taken apart."""

    name: str
    file: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Argument:
        """Read ``NAME[@FILE][?key=value,key=value]``.

        Raises:
            RequestError: A key without a value, or a value that cannot be read.
        """
        before, options = (text, {}) if Path(text).is_dir() else split_options(text)
        name, at, file = before.partition("@")
        return cls(name, Path(file) if at else None, options)

    def take(self, key: str, default: Any = None) -> Any:
        """Remove and return an option."""
        return self.options.pop(key, default)


def load_classifier(
    library: str, text: str, *, defaults: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> Model:
    """Load a classifier.

    Args:
        library: One of `LIBRARIES`.
        text: What stands behind the colon of a spec.
        defaults: ``num_classes`` and ``in_chans`` of a student, where the spec leaves them open and brings no weights.
        trust_remote_code: Let a transformers folder bring code that is run.

    Raises:
        ModelError: There is no such model, or its weights are damaged or do not fit.
    """
    argument = Argument.parse(text)
    changes: dict[str, Any] = {key: argument.take(key) for key in ("mean", "std") if key in argument.options}
    if library == "timm":
        model = _load_timm(argument, dict(defaults or {}))
    elif library == "torchvision":
        model = _load_torchvision(argument, dict(defaults or {}))
    else:
        model = _load_transformers(argument, dict(defaults or {}), trust_remote_code)
    model.module.eval()
    return with_normalisation(model, changes, f"{library}:{text}")


def with_normalisation(model: Model, changes: Mapping[str, Any], spec: str) -> Model:
    """The model with the ``mean`` and ``std`` that its spec gives.

    Raises:
        RequestError: They are no numbers.
    """
    for key, value in changes.items():
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(isinstance(number, (int, float)) for number in numbers):
            raise RequestError(f"{spec}: {key} must be one number a channel, as in {key}=[0.5,0.5,0.5]")
        model.info.extra[key] = [float(number) for number in numbers]
    return model


def build_classifier(info: ModelInfo) -> nn.Module:
    """The module of a description, with random weights: a classifier, or another class of the same libraries."""
    if info.library == "timm":
        return create_timm(info.architecture, info.config)
    if info.library == "torchvision":
        return create_torchvision(info.architecture, info.config)
    return create_transformers(info.architecture, info.config)


def write_library_files(model: Model, directory: Path) -> None:
    """Beside saved weights, the configuration by which the library itself loads the folder, if it has such a thing."""
    info, module = model.info, model.module
    if info.edits:
        return
    if info.library == "timm":
        normalisation = {key: info.extra[key] for key in ("mean", "std") if key in info.extra}
        config = {
            "architecture": info.architecture,
            "num_classes": module.num_classes,
            "model_args": info.config,
            "pretrained_cfg": as_json(_pretrained_facts(module)) | normalisation | {"num_classes": module.num_classes},
        }
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    elif info.library == "transformers":
        module.config.save_pretrained(directory)  # type: ignore[operator, union-attr]
        processor: dict[str, Any] = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        processor |= {"image_mean": info.extra.get("mean"), "image_std": info.extra.get("std")}
        (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


# --- timm ------------------------------------------------------------------------------------------------------------


def _load_timm(argument: Argument, defaults: dict[str, Any]) -> Model:
    name = argument.name.removeprefix("local-dir:")
    if name != argument.name or Path(name).is_dir():
        return _load_timm_folder(Path(name), argument)
    pretrained = bool(argument.take("pretrained", False)) or name.startswith("hf-hub:")
    config = argument.options
    if argument.file is not None:
        state = read_state(argument.file)
        config = _classes_of(state, _timm_head(name), config)
        module = create_timm(name, config)
        load_state(module, state, argument.file)
    else:
        config = {**defaults, **config}
        module = create_timm(name, config, pretrained)
    return _timm_model(module, name.partition(".")[0] if "hf-hub:" not in name else _hub_name(module), config)


def _load_timm_folder(folder: Path, argument: Argument) -> Model:
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture, known = stored["architecture"], dict(stored.get("pretrained_cfg") or stored)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"timm:{folder} is no folder that timm wrote: its config.json names no architecture"
        ) from error
    weights = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin")), *sorted(folder.glob("*.pth"))]
    if not weights:
        raise ModelError(f"timm:{folder} holds no weights (model.safetensors)")
    config = {**(stored.get("model_args") or {}), **argument.options}
    config.setdefault("num_classes", stored.get("num_classes", known.get("num_classes", 1000)))
    module = create_timm(architecture, config)
    load_state(module, read_state(weights[0]), weights[0])
    model = _timm_model(module, architecture, config)
    model.info.extra.update({key: list(known[key]) for key in ("mean", "std") if known.get(key)})
    if stored.get("label_names"):
        model.info.extra["classes"] = list(stored["label_names"])
    return model


def create_timm(name: str, config: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """A model of timm by its name and the arguments of its constructor."""
    import timm

    plain = name.partition(".")[0]
    if not name.startswith("hf-hub:") and not timm.is_model(plain):
        raise ModelError(f"timm has no model {plain!r}: {nearest(plain, timm.list_models())}")
    with reported(f"timm:{name}"):
        module: nn.Module = timm.create_model(name, pretrained=pretrained, **config)
    return module


def _timm_head(name: str) -> str | None:
    import timm

    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        raise ModelError(f"timm has no model {plain!r}: {nearest(plain, timm.list_models())}")
    head = getattr(timm.get_pretrained_cfg(plain), "classifier", None)
    return head if isinstance(head, str) else None


def _hub_name(module: nn.Module) -> str:
    return str(_pretrained_facts(module)["architecture"])


def _pretrained_facts(module: nn.Module) -> dict[str, Any]:
    facts: Any = module.pretrained_cfg
    return dict(facts)


def _timm_model(module: nn.Module, architecture: str, config: Mapping[str, Any]) -> Model:
    known = _pretrained_facts(module)
    channels = int(config.get("in_chans", (known.get("input_size") or (3,))[0]))
    extra: dict[str, Any] = {
        "mean": for_channels(known.get("mean") or IMAGENET_MEAN, channels),
        "std": for_channels(known.get("std") or IMAGENET_STD, channels),
        "channels": channels,
    }
    embed = getattr(module, "patch_embed", None)
    fixed = getattr(embed, "strict_img_size", None)
    if known.get("fixed_input_size", False) if fixed is None else fixed:
        size = getattr(embed, "img_size", None) or config.get("img_size") or known["input_size"][1:]
        extra["size"] = [int(size), int(size)] if isinstance(size, int) else [int(edge) for edge in size]
    return Model(module, ModelInfo("timm", architecture, as_json(dict(config)), (), extra))


def for_channels(values: Any, channels: int) -> list[float]:
    numbers = [float(value) for value in values]
    return numbers if len(numbers) == channels else [round(sum(numbers) / len(numbers), 6)] * channels


# --- torchvision -----------------------------------------------------------------------------------------------------


def _load_torchvision(argument: Argument, defaults: dict[str, Any]) -> Model:
    pretrained, config = bool(argument.take("pretrained", False)), dict(argument.options)
    if config.pop("in_chans", 3) != 3:
        raise ModelError(f"torchvision:{argument.name} takes colour images only; timm models have in_chans=1")
    classes = {"num_classes": defaults["num_classes"]} if "num_classes" in defaults else {}
    if argument.file is not None:
        state = read_state(argument.file)
        config = _classes_of(state, None, config)
        module = create_torchvision(argument.name, config)
        load_state(module, state, argument.file)
    elif pretrained and "num_classes" in config:
        raise ModelError(
            f"torchvision:{argument.name}: pretrained weights have their own classes; leave num_classes out"
        )
    elif pretrained:
        module = create_torchvision(argument.name, config, pretrained)
    else:
        config = {**classes, **config}
        module = create_torchvision(argument.name, config)
    extra: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "channels": 3}
    if pretrained:
        extra |= torchvision_normalisation(argument.name)
    if isinstance(size := getattr(module, "image_size", None), int):
        extra["size"] = [size, size]
    return Model(module, ModelInfo("torchvision", argument.name, as_json(config), (), extra))


def create_torchvision(name: str, config: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """A classifier or segmenter of torchvision by its name and the arguments of its constructor."""
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    segmenters = torchvision.models.list_models(module=torchvision.models.segmentation)
    if name not in (*known, *segmenters):
        raise ModelError(f"torchvision has no classifier or segmenter {name!r}: {nearest(name, [*known, *segmenters])}")
    # GoogLeNet and Inception draw their weights from a truncated normal of scipy unless they are told not to.
    slow: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") and not pretrained else {}
    if name in segmenters:
        slow = {"weights_backbone": None}  # they would be downloaded
    with reported(f"torchvision:{name}"):
        module: nn.Module = torchvision.models.get_model(
            name, weights="DEFAULT" if pretrained else None, **{**slow, **config}
        )
    return module


def torchvision_normalisation(name: str) -> dict[str, Any]:
    import torchvision

    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    found = {key: getattr(transforms, key, None) for key in ("mean", "std")}
    return {key: [float(number) for number in value] for key, value in found.items() if value}


# --- transformers ----------------------------------------------------------------------------------------------------


def _load_transformers(argument: Argument, defaults: dict[str, Any], trust_remote_code: bool) -> Model:
    import transformers

    name, local = argument.name, Path(argument.name).is_dir()
    if not local and (Path(name).exists() or name.startswith((".", "/", "~"))):
        raise ModelError(f"transformers:{name}: there is no such directory")
    if local and not (Path(name) / "config.json").is_file():
        raise ModelError(f"transformers:{name} holds no config.json: give the folder that save_pretrained wrote")
    kind = not local and name in transformers.CONFIG_MAPPING
    pretrained, options = bool(argument.take("pretrained", not kind)), dict(argument.options)
    common = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    with reported(f"transformers:{name}"), quiet(transformers):
        factory = transformers.AutoModelForImageClassification
        if pretrained:
            module, report = factory.from_pretrained(name, **library_names(options), **common, output_loading_info=True)
            refuse_missing(name, report, new_head="num_labels" in library_names(options))
        else:
            new = new_config(name, kind, {**library_names(defaults), **library_names(options)}, common)
            module = factory.from_config(new, trust_remote_code=trust_remote_code)
    config = as_json(module.config.to_dict())
    known = {} if kind else transformers_preprocessing(name, local)
    extra = {"channels": int(config.get("num_channels") or 3), **known}
    for key in ("mean", "std"):
        extra[key] = for_channels(extra.get(key, [0.5]), extra["channels"])
    size = config.get("image_size")
    if size:
        extra["size"] = [int(size), int(size)] if isinstance(size, int) else [int(edge) for edge in size]
    names = [config["id2label"][key] for key in sorted(config["id2label"], key=int)]
    if not all(name == f"LABEL_{k}" for k, name in enumerate(names)):
        extra["classes"] = names
    return Model(module.float(), ModelInfo("transformers", type(module).__name__, config, (), extra))


def new_config(name: str, kind: bool, options: Mapping[str, Any], where: Mapping[str, Any]) -> Any:
    """The configuration of a model with new weights: of a ``kind`` of transformers' models, or a folder's own."""
    import transformers

    values = {key: value for key, value in options.items() if key != "ignore_mismatched_sizes"}
    if kind:
        return transformers.AutoConfig.for_model(name, **values)
    return transformers.AutoConfig.from_pretrained(name, **values, **where)


def refuse_missing(name: str, report: Mapping[str, Any], new_head: bool, kind: str = "classifier") -> None:
    """A folder without the head of its kind would silently get a random one."""
    missing = sorted(report.get("missing_keys") or ())
    if missing and not new_head:
        raise ModelError(
            f"transformers:{name} is no trained {kind}: it holds no weights for {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; "
            "?num_classes=N gives it a new head, ?pretrained=false all new weights"
        )


def create_transformers(architecture: str, config: Mapping[str, Any]) -> nn.Module:
    """A model of a class of transformers by its configuration."""
    import transformers

    found = getattr(transformers, architecture, None)
    if found is None:
        raise ModelError(
            f"transformers {transformers.__version__} has no class {architecture}: is a newer version needed?"
        )
    with reported(f"transformers:{architecture}"):
        module: nn.Module = found(found.config_class.from_dict(dict(config)))
    return module


def library_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """transformers calls them ``num_labels`` and ``num_channels``."""
    names = {"num_classes": "num_labels", "in_chans": "num_channels", "img_size": "image_size"}
    renamed = {names.get(key, key): value for key, value in options.items()}
    if "num_labels" in renamed:
        renamed["ignore_mismatched_sizes"] = True
    return renamed


def transformers_preprocessing(name: str, local: bool) -> dict[str, Any]:
    """Mean and standard deviation for pixels in [0, 1], from ``preprocessor_config.json``."""
    from transformers.utils import cached_file

    path = Path(name) / "preprocessor_config.json" if local else None
    if not local:
        with contextlib.suppress(Exception):  # a repository without it has no preprocessing to tell of
            path = Path(str(cached_file(name, "preprocessor_config.json")))
    if path is None or not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is no readable JSON: {error}") from error
    scale = 255 * float(stored.get("rescale_factor", 1 / 255)) if stored.get("do_rescale", True) else 255.0
    normalised = stored.get("do_normalize", True) and stored.get("image_mean") and stored.get("image_std")
    mean, std = (stored["image_mean"], stored["image_std"]) if normalised else ([0.0], [1.0])
    mean, std = ([value] if isinstance(value, (int, float)) else value for value in (mean, std))
    return {"mean": [float(value) / scale for value in mean], "std": [float(value) / scale for value in std]}


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the progress bar of a few milliseconds."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled() if hasattr(logging, "is_progress_bar_enabled") else True
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# --- what they share --------------------------------------------------------------------------------------------------


def _classes_of(state: Mapping[str, Tensor], head: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the number of classes that a checkpoint's head shows, where it is not given."""
    if "num_classes" in config:
        return dict(config)
    weight = state.get(f"{head}.weight") if head else None
    if weight is None:
        matrices = [tensor for tensor in state.values() if tensor.dim() >= 2]
        weight = matrices[-1] if matrices else None
    return dict(config) if weight is None else {**config, "num_classes": int(weight.shape[0])}


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Whatever a library raises while it makes a model, as one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{what} cannot be made: {first_line(error)}") from error


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
