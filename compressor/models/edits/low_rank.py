"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): weights stay, the product of two thin matrices is added.

``W + alpha / rank * up @ down``, ``up`` starting at zero, on linear layers and convolutions (whose kernel positions
count as inputs). Only the thin matrices are trained; `merged` adds them up, so that nothing of them is exported.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.errors import ModelError
from compressor.models.edits.weights import fold_layer, layer_weights, parametrisations
from compressor.models.model import Model, edit

__all__ = ["LowRank", "adapt", "adaptable", "merged"]

EDIT = "low_rank.adapt"


class LowRank(nn.Module):
    """The parametrisation: the weight plus the adapter's product.

    Args:
        weight: (out, in, *kernel), float; only its shape, dtype and device count.
        rank: Of the product.
        alpha: Scale of the product, over the rank.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape[0], weight[0].numel()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, inputs, dtype=weight.dtype, device=weight.device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down).view_as(weight)


def adaptable(module: nn.Module, rank: int) -> list[str]:
    """Names of the weights that an adapter would be smaller than."""
    return [
        weight.name
        for weight in layer_weights(module)
        if rank * (weight.value.shape[0] + weight.value[0].numel()) < weight.value.numel()
    ]


@edit(EDIT)
def adapt(module: nn.Module, rank: int, alpha: float, weights: Sequence[str]) -> nn.Module:
    """Put adapters on weights and freeze everything else.

    Args:
        module: Changed in place.
        rank: See `LowRank`.
        alpha: See `LowRank`.
        weights: Names of `adaptable`.

    Raises:
        ModelError: The module has no such weight.
    """
    known = {weight.name: weight for weight in layer_weights(module)}
    module.requires_grad_(False)
    for name in weights:
        if name not in known:
            raise ModelError(f"an adapter lies on the weight {name}, which a {type(module).__name__} lacks")
        weight = known[name]
        parametrize.register_parametrization(
            weight.owner, weight.attribute, LowRank(weight.value.detach(), rank, alpha)
        )
    return module


def merged(model: Model) -> Model:
    """A model of plain, trainable weights with the adapters added up; the same model where there are none."""
    plain = copy.deepcopy(model.module)
    found = [one for one in layer_weights(plain, LowRank) if parametrisations(one.owner, one.attribute)]
    if not found:
        return model
    for layer in {id(weight.owner): weight.owner for weight in found}.values():
        fold_layer(layer)
    plain.requires_grad_(True)
    return Model(plain, replace(model.info, edits=tuple(one for one in model.info.edits if one.name != EDIT)))
