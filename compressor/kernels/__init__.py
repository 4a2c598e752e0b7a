"""Triton kernels for distillation and sparse attention, each with autograd, a PyTorch reference and dispatch.

Names are loaded on first use, so that importing this package costs nothing. CUDA tensors go to Triton, all others to
the references; `compressor.kernels.dispatch.backend` overrules that, for example to run the kernels in Triton's
interpreter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.kernels.adaptive_mask import (
        asa_attention,
        block_importance,
        energy_block_mask,
        evenly_spaced_offsets,
        random_offsets,
    )
    from compressor.kernels.block_indices import BlockIndices
    from compressor.kernels.dispatch import backend
    from compressor.kernels.feature_matching import feature_distance
    from compressor.kernels.kl_divergence import CrossEntropyAndKL, ce_and_kl, kl_div_from_logits
    from compressor.kernels.linear_kl import linear_kl_div
    from compressor.kernels.sparse_attention import block_sparse_attention

__all__ = [
    "BlockIndices",
    "CrossEntropyAndKL",
    "asa_attention",
    "backend",
    "block_importance",
    "block_sparse_attention",
    "ce_and_kl",
    "energy_block_mask",
    "evenly_spaced_offsets",
    "feature_distance",
    "kl_div_from_logits",
    "linear_kl_div",
    "random_offsets",
]

_HOMES = {
    "BlockIndices": "block_indices",
    "CrossEntropyAndKL": "kl_divergence",
    "asa_attention": "adaptive_mask",
    "backend": "dispatch",
    "block_importance": "adaptive_mask",
    "block_sparse_attention": "sparse_attention",
    "ce_and_kl": "kl_divergence",
    "energy_block_mask": "adaptive_mask",
    "evenly_spaced_offsets": "adaptive_mask",
    "feature_distance": "feature_matching",
    "kl_div_from_logits": "kl_divergence",
    "linear_kl_div": "linear_kl",
    "random_offsets": "adaptive_mask",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
