"""Segmenters of timm, torchvision and transformers: loaded and described. Specs are written as classifiers' are.

    torchvision:NAME[@FILE][?key=value,...]    deeplabv3_*, lraspp_*, fcn_*
    transformers:DIR_OR_ID[?key=value,...]     a ...ForSemanticSegmentation (Segformer, UperNet, BEiT, ...)
    transformers:KIND[?key=value,...]          a new one of transformers' model type (segformer): such is a student
    timm:NAME[@FILE][?key=value,...]           an encoder of timm with the decoder of DeepLabV3+

Keys are those of classifiers; `timm:` takes the decoder's ``width`` and ``atrous_rates`` too, and its
``pretrained=true`` downloads the encoder's weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from compressor.errors import ModelError
from compressor.models.checkpoint_files import load_state, read_state
from compressor.models.classifier_loading import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Argument,
    as_json,
    create_torchvision,
    for_channels,
    library_names,
    new_config,
    quiet,
    refuse_missing,
    reported,
    torchvision_normalisation,
    transformers_preprocessing,
    with_normalisation,
)
from compressor.models.model import Model, ModelInfo

__all__ = ["load_segmenter"]

USUAL_CLASSES = 21
"""Where nothing says how many there are; torchvision's number."""
FIXED_SIZES = ("beit", "data2vec-vision", "dpt")
"""Kinds of transformers' models whose position embeddings are made for one size."""


def load_segmenter(
    library: str, text: str, *, defaults: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> Model:
    """Load a segmenter.

    Args:
        library: "timm", "torchvision" or "transformers".
        text: What stands behind the colon of a spec.
        defaults: ``num_classes`` and ``in_chans`` of a student, where the spec leaves them open and brings no weights.
        trust_remote_code: Let a transformers folder bring code that is run.

    Raises:
        ModelError: There is no such model, or its weights are damaged or do not fit.
    """
    argument, given = Argument.parse(text), dict(defaults or {})
    changes: dict[str, Any] = {key: argument.take(key) for key in ("mean", "std") if key in argument.options}
    if library == "timm":
        model = _load_timm(argument, given)
    elif library == "torchvision":
        model = _load_torchvision(argument, given)
    else:
        model = _load_transformers(argument, given, trust_remote_code)
    model.module.eval()
    return with_normalisation(model, changes, f"{library}:{text}")


# --- timm ------------------------------------------------------------------------------------------------------------


def _load_timm(argument: Argument, defaults: Mapping[str, Any]) -> Model:
    import timm

    from compressor.models.segmentation_nets import TimmSegmenter

    pretrained = bool(argument.take("pretrained", False))
    state = read_state(argument.file) if argument.file is not None else {}
    known = {"num_classes": len(state["classifier.bias"])} if "classifier.bias" in state else defaults
    options: dict[str, Any] = {"in_chans": 3, "num_classes": USUAL_CLASSES, **known, **argument.options}
    own: dict[str, Any] = {
        key: options.pop(key) for key in ("num_classes", "in_chans", "width", "atrous_rates") if key in options
    }
    config = {"backbone": argument.name, **own, "options": options}
    with reported(f"timm:{argument.name}"):
        module = TimmSegmenter(**config, pretrained=pretrained)
    if argument.file is not None:
        load_state(module, state, argument.file)
    facts = timm.get_pretrained_cfg(argument.name.partition(".")[0])
    channels = int(own["in_chans"])
    extra = {
        "mean": for_channels(getattr(facts, "mean", None) or IMAGENET_MEAN, channels),
        "std": for_channels(getattr(facts, "std", None) or IMAGENET_STD, channels),
        "channels": channels,
    }
    size = options.get("img_size")  # vision transformers take the size that they were made for
    if size is not None and not options.get("dynamic_img_size"):
        extra["size"] = [int(size), int(size)] if isinstance(size, int) else [int(edge) for edge in size]
    where = f"{TimmSegmenter.__module__}:{TimmSegmenter.__name__}"
    return Model(module, ModelInfo("python", where, as_json(config), (), extra))


# --- torchvision -----------------------------------------------------------------------------------------------------


def _load_torchvision(argument: Argument, defaults: Mapping[str, Any]) -> Model:
    name, pretrained, config = argument.name, bool(argument.take("pretrained", False)), dict(argument.options)
    if config.pop("in_chans", 3) != 3:
        raise ModelError(f"torchvision:{name} takes colour images only; timm models have in_chans=1")
    if pretrained and "num_classes" in config:
        raise ModelError(f"torchvision:{name}: pretrained weights have their own classes; leave num_classes out")
    if argument.file is not None:
        module = _from_file(name, argument.file, config)
    else:
        if not pretrained and "num_classes" in defaults:
            config = {"num_classes": defaults["num_classes"], **config}
        module = create_torchvision(name, config, pretrained)
    config.pop("weights_backbone", None)  # what was downloaded once is among the weights now
    extra: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "channels": 3}
    if pretrained:
        extra |= torchvision_normalisation(name)
        config = {"aux_loss": True} if getattr(module, "aux_classifier", None) is not None else {}
    return Model(module, ModelInfo("torchvision", name, as_json(config), (), extra))


def _from_file(name: str, path: Path, config: dict[str, Any]) -> nn.Module:
    """The module of a checkpoint, which says how many classes it has and whether there is an auxiliary head."""
    state = read_state(path)
    if "num_classes" not in config:
        biases = [value for key, value in state.items() if key.startswith("classifier.") and key.endswith(".bias")]
        if not biases:
            raise ModelError(f"{path} holds no weights of a segmenter's classifier: is it one of torchvision:{name}?")
        config["num_classes"] = len(biases[-1])
    if any(key.startswith("aux_classifier.") for key in state):
        config["aux_loss"] = True
    module = create_torchvision(name, config)
    load_state(module, state, path)
    return module


# --- transformers ----------------------------------------------------------------------------------------------------


def _load_transformers(argument: Argument, defaults: Mapping[str, Any], trust_remote_code: bool) -> Model:
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
        factory = transformers.AutoModelForSemanticSegmentation
        if pretrained:
            named = library_names(options)
            module, report = factory.from_pretrained(name, **named, **common, output_loading_info=True)
            refuse_missing(name, report, new_head="num_labels" in named, kind="segmenter")
        else:
            new = new_config(name, kind, {**library_names(defaults), **library_names(options)}, common)
            module = factory.from_config(new, trust_remote_code=trust_remote_code)
    stored = as_json(module.config.to_dict())
    extra = {"channels": _channels(stored), **({} if kind else transformers_preprocessing(name, local))}
    for key, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        extra[key] = for_channels(extra.get(key, usual), extra["channels"])
    size = stored.get("image_size")
    if size and stored.get("model_type") in FIXED_SIZES:
        extra["size"] = [int(size), int(size)] if isinstance(size, int) else [int(edge) for edge in size]
    names = [stored["id2label"][key] for key in sorted(stored["id2label"], key=int)]
    if not all(label == f"LABEL_{k}" for k, label in enumerate(names)):
        extra["classes"] = names
    return Model(module.float(), ModelInfo("transformers", type(module).__name__, stored, (), extra))


def _channels(config: Mapping[str, Any]) -> int:
    """Channels of the images, which UperNet's kind keeps with its backbone."""
    backbone = config.get("backbone_config")
    inner = backbone.get("num_channels") if isinstance(backbone, Mapping) else None
    return int(config.get("num_channels") or inner or 3)
