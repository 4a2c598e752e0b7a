"""Every custom operator keeps its schema and knows the shapes, strides and dtypes of its results without running."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.kernels import BlockIndices

MODULES = ("adaptive_mask", "block_indices", "feature_matching", "kl_divergence", "sparse_attention")


def divergence(device: torch.device) -> tuple[Any, ...]:
    student, teacher = torch.randn(2, 2, 3, 5, 4).to(device)
    rows = torch.ones(2, 3, 4, device=device)
    labels = torch.zeros(2, 3, 4, dtype=torch.int64, device=device)
    return student.transpose(2, 3), teacher.transpose(2, 3), labels, rows, rows, 2.0, 0, 0.5, [3], 1.0, 1.0, True


def attention(device: torch.device) -> tuple[Any, ...]:
    q, k, v = torch.randn(3, 1, 20, 2, 16).to(device).transpose(2, 3)
    indices = BlockIndices.of(torch.ones(1, 2, 2, 2, dtype=torch.bool, device=device))
    lists = indices.by_query, indices.by_key
    assert lists[1] is not None
    return q, k, v, *(part for one in lists for part in (one.starts, one.entries)), [1, 2], 16, 0.25, False


def attention_backward(device: torch.device) -> tuple[Any, ...]:
    q, k, v, *lists, shape, block, scale, causal = attention(device)
    output, lse = torch.ops.compressor.block_sparse_attention(q, k, v, None, *lists[:2], shape, block, scale, causal)
    return q, k, v, None, output, lse, torch.ones_like(output), None, *lists, shape, block, scale, causal


def probe(device: torch.device) -> tuple[Tensor, ...]:
    tokens = torch.arange(4).reshape(1, 1, 2, 2).expand(1, 2, 2, 2).to(device)
    return torch.randn(1, 2, 4, 16).to(device), torch.randn(1, 2, 4, 16).to(device), tokens, tokens


ARGUMENTS: dict[str, Callable[[torch.device], tuple[Any, ...]]] = {
    "divergence_rows": divergence,
    "feature_distances": lambda d: (*torch.randn(2, 2, 3, 4).to(d), torch.ones(2, 4, device=d), "cosine", 1, True),
    "power_sums": lambda d: (torch.randn(2, 3, 4).to(d), 2.0, 1),
    "power_gradient": lambda d: (torch.randn(2, 3, 4).to(d), torch.ones(2, 4, device=d), 2.0, 1),
    "fill_lists": lambda d: (
        torch.ones(1, 1, 2, 3, dtype=torch.bool, device=d),
        torch.tensor([0, 3, 6], dtype=torch.int32, device=d),
        6,
    ),
    "block_sparse_attention": lambda d: (lambda a: (*a[:3], None, *a[3:5], *a[7:]))(attention(d)),
    "block_sparse_attention_backward": attention_backward,
    "largest_weights": probe,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_operator_tells_its_results_without_running(implementation, device, name):
    if implementation != "triton":
        pytest.skip("the references are no operators")
    for module in MODULES:
        importlib.import_module(f"compressor.kernels.{module}_triton")
    operator = getattr(torch.ops.compressor, name).default
    torch.library.opcheck(operator, ARGUMENTS[name](device), test_utils=("test_schema", "test_faketensor"))
