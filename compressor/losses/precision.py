"""The precision that losses are computed in: never less than float32, whatever autocast hands over."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_least_float32"]


def at_least_float32(x: Tensor) -> Tensor:
    """Return float16 and bfloat16 tensors as float32, wider ones as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
