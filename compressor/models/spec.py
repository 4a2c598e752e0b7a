"""Model specs: a kind and what it names.

diffusers:DIR_OR_ID[#subfolder]   timm:NAME[@FILE][?key=value,...]   torchvision:NAME   transformers:DIR_OR_ID
run:RUN_DIR[#STUDENT]             python:module:factory              demo:NAME
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from compressor.data.sources import call_factory, import_object
from compressor.errors import ModelError, RequestError, first_line, nearest
from compressor.models.classifier_loading import LIBRARIES, Argument, build_classifier, load_classifier
from compressor.models.model import Model, ModelInfo, load_model
from compressor.models.segmenter_loading import load_segmenter

__all__ = ["KINDS", "build_module", "has_new_weights", "load_model_spec", "load_weights", "split_spec"]

KINDS = ("demo", "diffusers", "python", "run", *LIBRARIES)


def split_spec(spec: str) -> tuple[str, str]:
    """``KIND:ARGUMENT`` as a pair.

    Raises:
        RequestError: The kind is unknown or the argument is missing.
    """
    kind, colon, argument = spec.partition(":")
    if kind not in KINDS:
        raise RequestError(f"unknown model {spec!r}: {nearest(kind, KINDS)} (written as KIND:NAME)")
    if not colon or not argument:
        raise RequestError(f"the model {spec!r} lacks a name after the colon")
    return kind, argument


def load_model_spec(
    spec: str,
    *,
    trust_remote_code: bool = False,
    defaults: Mapping[str, Any] | None = None,
    task: str | None = "classification",
) -> Model:
    """Load a model; `demo:` specs are made by `compressor.models.demos` instead.

    Args:
        spec: ``KIND:NAME``.
        trust_remote_code: Let a model folder bring code that is run.
        defaults: ``num_classes`` and ``in_chans`` of a student whose spec leaves them open (the task's
            ``student_defaults``).
        task: Which of a library's models is meant: "segmentation" for segmenters, else classifiers.

    Raises:
        ModelError: There is no such model, or its files are damaged.
    """
    kind, argument = split_spec(spec)
    if kind == "diffusers":
        return _load_diffusers(argument, trust_remote_code)
    if kind in LIBRARIES:
        loader = load_segmenter if task == "segmentation" else load_classifier
        return loader(kind, argument, defaults=defaults, trust_remote_code=trust_remote_code)
    if kind == "run":
        return load_model(_student_folder(argument))
    if kind == "python":
        made = call_factory(argument, "a model")
        if not isinstance(made, Model):
            raise ModelError(f"{spec} returned a {type(made).__name__}; it must return compressor.models.model.Model")
        return made
    raise ModelError(f"{spec} cannot be loaded here")


def has_new_weights(spec: str) -> bool:
    """Whether a spec names a library's model without weights: such a one has random weights until it is trained."""
    kind, text = split_spec(spec)
    if kind not in LIBRARIES:
        return False
    argument = Argument.parse(text)
    local = argument.name.startswith(("local-dir:", "hf-hub:")) or Path(argument.name).is_dir()
    if kind == "transformers":
        import transformers

        return not argument.take("pretrained", local or argument.name not in transformers.CONFIG_MAPPING)
    return argument.file is None and not local and not argument.take("pretrained", False)


def _student_folder(argument: str) -> Path:
    """``RUN_DIR``, or ``RUN_DIR#NAME`` for another student than the main one."""
    directory, _, name = argument.partition("#")
    return Path(directory) / ("students" if name else "student") / name


def _library_class(library: str, name: str) -> Any:
    module = importlib.import_module(library)
    found = getattr(module, name, None)
    if found is None:
        raise ModelError(
            f"{library} {getattr(module, '__version__', '')} has no class {name}: is a newer version needed?"
        )
    return found


def build_module(info: ModelInfo) -> nn.Module:
    """The unedited module of a description, with random weights."""
    if info.library == "diffusers":
        config = {name: value for name, value in info.config.items() if not name.startswith("_")}
        module: nn.Module = _library_class("diffusers", info.architecture)(**config)
        return module
    if info.library in LIBRARIES:
        return build_classifier(info)
    if info.library == "python":
        module = import_object(info.architecture, "a module")(**info.config)
        return module
    raise ModelError(f"models of the library {info.library!r} cannot be built")


def load_weights(module: nn.Module, directory: Path) -> None:
    """Load ``*.safetensors`` of a directory strictly into a module.

    Raises:
        ModelError: Missing, damaged or ill-fitting weights.
    """
    from safetensors.torch import load_model as load_into

    files = check_weights(directory)
    if len(files) != 1:
        raise ModelError(f"{directory} holds {len(files)} weight files; expected one")
    try:
        load_into(module, str(files[0]), strict=True)
    except (RuntimeError, KeyError) as error:
        raise ModelError(f"the weights in {files[0]} do not fit the model: {first_line(error)}") from error


def check_weights(directory: Path) -> list[Path]:
    """The safetensors files of a directory, each opened once so that a truncated one is named before it is used."""
    from safetensors import SafetensorError, safe_open

    files = sorted(Path(directory).glob("*.safetensors"))
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is truncated or damaged ({first_line(error)}): copy or download it again"
            ) from error
    return files


def _load_diffusers(argument: str, trust_remote_code: bool) -> Model:
    name, _, subfolder = argument.partition("#")
    local = Path(name)
    if local.is_dir():
        return _load_local(local, subfolder)
    if local.exists() or name.startswith((".", "/", "~")):
        raise ModelError(f"diffusers:{name}: there is no such directory")
    return _load_from_hub(name, subfolder or "transformer", trust_remote_code)


def _load_local(directory: Path, subfolder: str) -> Model:
    scheduler = _read_json(directory / "scheduler" / "scheduler_config.json")
    if not subfolder and (directory / "model_index.json").exists():
        subfolder = "transformer" if (directory / "transformer").is_dir() else "unet"
    folder = directory / subfolder if subfolder else directory
    if scheduler is None:
        scheduler = _read_json(folder / ".." / "scheduler" / "scheduler_config.json")
    if (folder / "compressor.json").exists():
        return load_model(folder)
    config = _read_json(folder / "config.json")
    if config is None or "_class_name" not in config:
        raise ModelError(
            f"{folder} is no diffusers model: it holds no config.json with a _class_name "
            "(give the directory that save_pretrained wrote, or PIPELINE_DIR#subfolder)"
        )
    check_weights(folder)
    library_class = _library_class("diffusers", str(config["_class_name"]))
    return _pretrained(library_class, str(folder), {"local_files_only": True}, scheduler)


def _load_from_hub(name: str, subfolder: str, trust_remote_code: bool) -> Model:
    import diffusers

    try:
        # classes that know what their file is called; their common base does not
        config: Any = diffusers.AutoModel.load_config(name, subfolder=subfolder)
    except Exception as error:
        raise ModelError(
            f"diffusers:{name}#{subfolder} is neither a directory nor reachable on the hub: {first_line(error)}"
        ) from error
    try:
        scheduler: Any = diffusers.DDPMScheduler.load_config(name, subfolder="scheduler")
    except Exception:
        scheduler = None  # a repository of one model alone has none; the class's default serves
    library_class = _library_class("diffusers", str(config["_class_name"]))
    return _pretrained(library_class, name, {"subfolder": subfolder}, scheduler)


def _pretrained(library_class: Any, name: str, options: dict[str, Any], scheduler: dict[str, Any] | None) -> Model:
    try:
        module = library_class.from_pretrained(name, **options)
    except Exception as error:
        raise ModelError(f"{library_class.__name__} cannot be loaded from {name}: {first_line(error)}") from error
    config = {key: value for key, value in dict(module.config).items() if not key.startswith("_")}
    extra = {"scheduler": scheduler} if scheduler else {}
    return Model(
        module.float(), ModelInfo("diffusers", library_class.__name__, json.loads(json.dumps(config)), (), extra)
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is no readable JSON: {first_line(error)}") from error
    return value if isinstance(value, dict) else None
