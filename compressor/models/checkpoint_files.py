"""Checkpoints of other programs: read without running code, and loaded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor.errors import ModelError, first_line

__all__ = ["load_state", "read_state"]

_WRAPPINGS = ("state_dict_ema", "state_dict", "model_ema", "model")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: safetensors, or a file of `torch.save` that holds nothing but tensors.

    Raises:
        ModelError: The file is missing, damaged, or would run code.
    """
    if not path.is_file():
        raise ModelError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
        raise ModelError(f"{path} is truncated, damaged or no checkpoint ({first_line(error)})") from error
    except Exception as error:  # the unpickler's own error
        raise ModelError(
            f"{path} holds more than tensors and would run code: save its state_dict as safetensors"
        ) from error
    for key in _WRAPPINGS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    state = {str(k).removeprefix("module."): v for k, v in dict(found).items() if isinstance(v, Tensor)}
    if not state:
        raise ModelError(f"{path} holds no tensors")
    return state


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a checkpoint strictly.

    Raises:
        ModelError: It is of another architecture or of another number of classes.
    """
    own = module.state_dict()
    for name, tensor in state.items():
        if name in own and own[name].shape != tensor.shape:
            raise ModelError(
                f"{path} does not fit {type(module).__name__}: {name} has the shape {tuple(tensor.shape)}, "
                f"the model's has {tuple(own[name].shape)}"
            )
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        what = f"{len(missing)} tensors are missing ({missing[0]}, ...)" if missing else ""
        more = f"{len(unexpected)} are unknown ({unexpected[0]}, ...)" if unexpected else ""
        raise ModelError(f"{path} does not fit {type(module).__name__}: {' and '.join(filter(None, (what, more)))}")
    module.load_state_dict(dict(state))
