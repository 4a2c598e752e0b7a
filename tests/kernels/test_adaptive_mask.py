"""The adaptive mask of Video-BLADE: the probe, the threshold and the attention with its pooled branch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from compressor.errors import RequestError
from compressor.kernels import (
    adaptive_mask,
    asa_attention,
    block_importance,
    energy_block_mask,
    evenly_spaced_offsets,
    random_offsets,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def draw(*shape: int, seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def exact_importance(q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor, block_size: int) -> Tensor:
    """Block by block, in float64."""
    blocks = [-(-x.shape[2] // block_size) for x in (q, k)]
    result = torch.zeros(*q.shape[:2], *blocks, dtype=torch.float64)
    for b, h in np.ndindex(*q.shape[:2]):

        def sampled(x: Tensor, index: Tensor, count: int, b: int = b, h: int = h) -> list[Tensor]:
            last = x.shape[2] - 1
            return [
                x[b, h, [min(i * block_size + o, last) for o in index[b, h].tolist()]].double().cpu()
                for i in range(count)
            ]

        keys = sampled(k, k_index, blocks[1])
        for i, queries in enumerate(sampled(q, q_index, blocks[0])):
            scores = [queries @ key.t() / math.sqrt(q.shape[-1]) for key in keys]
            largest = torch.cat(scores, dim=1).amax(dim=1, keepdim=True)
            result[b, h, i] = torch.stack([(score - largest).exp().amax() for score in scores])
    return (result / result.sum(-1, keepdim=True)).to(q.device)


@pytest.mark.parametrize(("queries", "keys", "samples"), [(64, 64, 4), (50, 70, 5), (16, 33, 16)])
def test_importance_equals_the_probe_written_out(implementation, device, queries, keys, samples):
    q, k = draw(2, 2, queries, 16, seed=0, device=device), draw(2, 2, keys, 16, seed=1, device=device)
    q_index, k_index = (
        random_offsets(2, 2, 16, samples, torch.Generator().manual_seed(seed)).to(device) for seed in (2, 3)
    )
    importance = block_importance(q, k, q_index, k_index, 16)
    torch.testing.assert_close(importance.double(), exact_importance(q, k, q_index, k_index, 16), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(importance.sum(-1), torch.ones_like(importance[..., 0]))


def test_importance_does_not_depend_on_how_many_blocks_are_scored_at_once(monkeypatch):
    q, k = draw(1, 2, 60, 8, seed=0, device="cpu"), draw(1, 2, 60, 8, seed=1, device="cpu")
    index = evenly_spaced_offsets(8, 3).expand(1, 2, 3)
    whole = block_importance(q, k, index, index, 8)
    monkeypatch.setattr(adaptive_mask, "_SCORES_AT_ONCE", 1)
    torch.testing.assert_close(block_importance(q, k, index, index, 8), whole)


def test_offsets_lie_within_a_block_without_repetition():
    assert evenly_spaced_offsets(128, 32).tolist() == list(range(2, 128, 4))
    assert evenly_spaced_offsets(8, 3).tolist() == [1, 4, 6]
    drawn = random_offsets(2, 3, 8, 8, torch.Generator().manual_seed(0))
    assert (drawn.sort(dim=-1).values == torch.arange(8)).all() and drawn[0, 0].tolist() != drawn[1, 2].tolist()
    with pytest.raises(RequestError, match="cannot be probed"):
        random_offsets(1, 1, 8, 9)


def test_mask_keeps_blocks_until_their_mass_reaches_the_threshold():
    importance = torch.tensor([[[[0.1, 0.5, 0.3, 0.06, 0.04]]]])
    kept = energy_block_mask(importance, 0.85, min_retain_ratio=0.0, max_retain_ratio=1.0)
    assert kept.tolist() == [[[[False, True, True, False, False]]]], "the block that crosses 0.85 is not counted"
    at_most = energy_block_mask(importance, 0.95, min_retain_ratio=0.0, max_retain_ratio=0.2)
    assert at_most.tolist() == [[[[False, True, False, False, False]]]]
    at_least = energy_block_mask(importance, 0.1, min_retain_ratio=0.6, max_retain_ratio=1.0)
    assert at_least.tolist() == [[[[True, True, True, False, False]]]]
    exactly = energy_block_mask(importance, 0.9, min_retain_ratio=0.8, max_retain_ratio=0.2)
    assert exactly.sum() == 1, "the upper bound holds where the two contradict each other"


def test_forced_rows_and_columns_are_turned_on_afterwards():
    mask = energy_block_mask(torch.rand(1, 2, 6, 6), 0.5, 0.1, 0.2, force_last=2)
    assert mask[..., -2:].all() and mask[..., -2:, :].all()
    assert (mask[..., :4, :4].sum(-1) <= 1).all()


@pytest.mark.parametrize("pool_size", [None, 4, 7])
def test_asa_equals_one_softmax_over_kept_and_pooled_keys(implementation, device, pool_size):
    q, k, v = (draw(1, 2, 50, 16, seed=seed, device=device).requires_grad_() for seed in range(3))
    mask = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(3)).to(device) > 0.5
    mask[..., 0] = True

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.double(), k.double(), v.double()
        token = torch.arange(50, device=device)
        scores = q @ k.transpose(-1, -2) / 4
        scores = scores.masked_fill(~mask[:, :, token // 16][..., token // 16], -math.inf)
        if pool_size is not None:
            windows = -(-50 // pool_size) * pool_size
            filled = torch.arange(windows, device=device).clamp(max=49)
            pooled_k, pooled_v = (x[:, :, filled].unflatten(2, (-1, pool_size)).mean(3) for x in (k, v))
            scores = torch.cat([scores, q @ pooled_k.transpose(-1, -2) / 4 + math.log(pool_size)], dim=-1)
            v = torch.cat([v, pooled_v], dim=2)
        return scores.softmax(-1) @ v

    output = asa_attention(q, k, v, mask, block_size=16, pool_size=pool_size)
    expected = exact(q, k, v)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = draw(*output.shape, seed=4, device=device)
    gradients = torch.autograd.grad((output * upstream).sum(), (q, k, v))
    for got, wanted in zip(gradients, torch.autograd.grad((expected * upstream).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool_size", [None, 4])
def test_dense_form_for_exports_equals_the_sparse_one(device, pool_size):
    q, k, v = (draw(2, 2, 50, 16, seed=seed, device=device) for seed in range(3))
    mask = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(3)).to(device) > 0.5
    mask[..., 0] = True
    padding = torch.arange(50, device=device).expand(2, 50) > 40
    arguments = (q, k, v, mask, 16, pool_size, padding)
    torch.testing.assert_close(
        adaptive_mask.dense_asa_attention(*arguments), asa_attention(*arguments), rtol=1e-5, atol=1e-5
    )


def test_whole_attention_compiles_into_one_graph_that_calls_the_kernels(implementation, device):
    q, k, v = (draw(1, 2, 64, 16, seed=seed, device=device).requires_grad_() for seed in range(3))
    offsets = evenly_spaced_offsets(16, 4).to(device).expand(1, 2, 4)
    called = set()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = energy_block_mask(block_importance(q, k, offsets, offsets, 16), 0.9, 0.3, 0.6)
        return asa_attention(q, k, v, mask, block_size=16, pool_size=4)

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        called.update(str(node.target) for part in graph.modules() for node in part.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(attend, backend=aot_autograd(fw_compiler=note), fullgraph=True)(q, k, v)
    torch.testing.assert_close(compiled, attend(q, k, v), rtol=1e-4, atol=1e-5)
    compiled.sum().backward()
    kernels = {name for name in called if name.startswith("compressor.")}
    assert bool(kernels) == (implementation == "triton")


@pytest.mark.skipif(not (GOLDEN / "blade.json").exists(), reason="the numbers of the authors' code are not here")
@pytest.mark.parametrize("case", ["importance_64", "mask_wan", "asa_g"])
def test_functions_give_the_numbers_of_the_authors_code(implementation, device, case):
    (entry,) = (c for c in json.loads((GOLDEN / "blade.json").read_text())["cases"] if c["id"] == case)
    arrays = np.load(GOLDEN / "blade.npz", allow_pickle=False)
    arguments = {
        name: torch.from_numpy(arrays[value[1:]]).to(device) if isinstance(value, str) else value
        for name, value in entry["args"].items()
    }
    got = getattr(adaptive_mask, entry["function"].split(":")[1])(**arguments)
    expected = torch.from_numpy(arrays[entry["expected"][""][1:]]).to(device)
    if expected.dtype == torch.bool:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got.double(), expected.double(), rtol=entry["rtol"], atol=entry["atol"])
