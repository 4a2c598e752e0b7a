"""Sparse weights: masks by magnitude, a parametrisation that holds them through training, and the fold at export.

Three patterns: ``N:M`` keeps N of every M neighbouring inputs of an output (2:4 is what sparse tensor cores read), a
share (``0.8``) zeroes the smallest weights of a layer, ``block:ROWSxCOLUMNS:SHARE`` its blocks of smallest norm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.errors import ModelError, RequestError
from compressor.models.edits.weights import Weight, fold_layer, layer_weights, parametrisations
from compressor.models.model import Model, edit
from compressor.recipe import parse_sparsity

__all__ = [
    "SparsityMask",
    "fits_pattern",
    "fold",
    "folded",
    "mask_layers",
    "masked_weights",
    "sparsity_mask",
    "weights_of",
]

# --- the mathematics -------------------------------------------------------------------------------------------------


def fits_pattern(shape: Sequence[int], pattern: str) -> bool:
    """Whether a weight (out, in, ...) divides into the groups or blocks of a pattern; a share fits every weight."""
    kind, numbers = _read(pattern)
    if kind == "groups":
        return shape[1] % int(numbers[1]) == 0
    if kind == "blocks":
        return shape[0] % int(numbers[0]) == 0 and shape[1] % int(numbers[1]) == 0
    return True


def sparsity_mask(weight: Tensor, pattern: str) -> Tensor:
    """Which weights stay: those of largest magnitude; of equal ones the first.

    Args:
        weight: (out, in) of a linear layer or (out, in, *kernel) of a convolution, float.
        pattern: ``N:M``: N of each M consecutive inputs of an output stay; a convolution's at every position of its
            kernel. A share in (0, 1): so many of all weights go, rounded. ``block:RxC:SHARE``: so many of all blocks of
            R outputs and C inputs (a convolution's at every position of its kernel) go, by their Euclidean norm.

    Returns:
        Bool, the weight's shape. A weight that does not divide into groups or blocks stays whole.

    Raises:
        RequestError: The pattern is none, or the weight has fewer than two axes.
    """
    kind, numbers = _read(pattern)
    if weight.dim() < 2:
        raise RequestError(f"a sparse weight has two axes or more (outputs, inputs), not {weight.dim()}")
    if not fits_pattern(weight.shape, pattern):
        return torch.ones_like(weight, dtype=torch.bool)
    size = weight.detach().abs().float()
    if kind == "share":
        return _largest(size.flatten(), size.numel() - round(numbers[0] * size.numel())).view_as(size)
    planes = size.flatten(2).permute(2, 0, 1) if size.dim() > 2 else size[None]  # (kernel positions, out, in)
    if kind == "groups":
        kept = _largest(planes.unflatten(-1, (-1, int(numbers[1]))), int(numbers[0])).flatten(-2)
    else:
        kept = _block_mask(planes, int(numbers[0]), int(numbers[1]), numbers[2])
    return kept.permute(1, 2, 0).reshape(weight.shape).contiguous()


def _block_mask(planes: Tensor, rows: int, columns: int, share: float) -> Tensor:
    """The mask of planes (K, out, in), by the norms of their blocks, all ranked together."""
    count, outputs, inputs = planes.shape
    blocks = planes.view(count, outputs // rows, rows, inputs // columns, columns)
    norms = blocks.square().sum((2, 4))
    kept = _largest(norms.flatten(), norms.numel() - round(share * norms.numel())).view_as(norms)
    return kept[:, :, None, :, None].expand_as(blocks).reshape(planes.shape)


def _largest(values: Tensor, count: int) -> Tensor:
    """Marks the ``count`` largest along the last axis; exactly so many, also where some are equal."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    marked = torch.zeros_like(values, dtype=torch.bool)
    return marked.scatter(-1, order[..., :count], True)


def _read(pattern: str) -> tuple[str, tuple[float, ...]]:
    """A pattern as its kind, "groups" (N, M), "share" (share,) or "blocks" (rows, columns, share)."""
    try:
        plain = parse_sparsity(pattern)
    except ValueError as error:
        raise RequestError(f"the sparsity pattern {pattern!r} {error}") from error
    if plain.startswith("block:"):
        _, size, share = plain.split(":")
        return "blocks", (*map(float, size.split("x")), float(share))
    if ":" in plain:
        return "groups", tuple(map(float, plain.split(":")))
    return "share", (float(plain),)


# --- masks in a module -----------------------------------------------------------------------------------------------


class SparsityMask(nn.Module):
    """The parametrisation: the weight, but zero where the mask is.

    Whatever an optimiser does to the weight below, its zeros stay.

    Args:
        mask: Bool, the weight's shape; a buffer, saved with the weights.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def weights_of(module: nn.Module) -> Iterator[Weight]:
    """The weights that a mask may lie on, or lies on already; those that something else parametrises are left out."""
    return layer_weights(module, SparsityMask)


def masked_weights(module: nn.Module) -> list[Weight]:
    """The weights that a mask is on."""
    return [weight for weight in weights_of(module) if parametrisations(weight.owner, weight.attribute)]


@edit("sparsity.mask")
def mask_layers(module: nn.Module, pattern: str, weights: Sequence[str]) -> nn.Module:
    """Hold weights sparse from now on.

    Args:
        module: Changed in place.
        pattern: See `sparsity_mask`; the masks follow the weights' present magnitudes.
        weights: Names of `weights_of`.

    Raises:
        ModelError: The module has no such weight.
    """
    known = {weight.name: weight for weight in weights_of(module)}
    for name in weights:
        if name not in known:
            raise ModelError(f"a sparsity mask lies on the weight {name}, which a {type(module).__name__} lacks")
        mask = SparsityMask(sparsity_mask(known[name].value, pattern))
        parametrize.register_parametrization(known[name].owner, known[name].attribute, mask)
    return module


def fold(module: nn.Module) -> nn.Module:
    """The module with plain weights, zero where a mask is: a copy, or the module itself where there is no mask."""
    if not masked_weights(module):
        return module
    plain = copy.deepcopy(module)
    for layer in {id(weight.owner): weight.owner for weight in masked_weights(plain)}.values():
        fold_layer(layer)
    return plain


def folded(model: Model) -> Model:
    """The model without masks and without the edits that made them; the same model where there are none."""
    module = fold(model.module)
    if module is model.module:
        return model
    edits = tuple(change for change in model.info.edits if change.name != "sparsity.mask")
    return Model(module, replace(model.info, edits=edits))
