"""Block-sparse attention against dense attention under the same mask in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import RequestError
from compressor.kernels import BlockIndices, backend, block_sparse_attention


def draw(*shape: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def block_mask(batch: int, heads: int, queries: int, keys: int, block_size: int, device: torch.device) -> Tensor:
    blocks = -(-queries // block_size), -(-keys // block_size)
    return (torch.rand(batch, heads, *blocks, generator=torch.Generator().manual_seed(9)) > 0.4).to(device)


def exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_size: int, causal: bool = False, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Entry by entry what may be seen, then a softmax, in float64."""
    query, key = torch.arange(q.shape[2], device=q.device), torch.arange(k.shape[2], device=q.device)
    seen = mask[:, :, query // block_size][..., key // block_size]
    if causal:
        seen = seen & (key[None, :] <= query[:, None])
    if padding is not None:
        seen = seen & ~padding[:, None, None, :]
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = torch.where(seen, (scores - scores.amax(-1, keepdim=True).detach()).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    lse = torch.where(seen, scores, -torch.inf).logsumexp(-1) if bool(seen.any(-1).all()) else None
    if lse is None:
        empty = ~seen.any(-1)
        lse = torch.where(seen | empty[..., None], torch.where(empty[..., None], 0.0, scores), -torch.inf).logsumexp(-1)
        lse = lse.masked_fill(empty, -torch.inf)
    return weights / total.clamp(min=1e-300) @ v.double(), lse


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    block_size: int,
    *,
    causal: bool = False,
    padding: Tensor | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Output, log-sum-exp and all gradients, those through the log-sum-exp too."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    output, lse = block_sparse_attention(
        *inputs, mask, block_size=block_size, causal=causal, key_padding_mask=padding, return_lse=True
    )
    expected, expected_lse = exact(*inputs, mask, block_size, causal, padding)
    assert output.dtype == q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)
    of_output = draw(*q.shape, seed=5, device=q.device)
    of_lse = torch.where(expected_lse.isfinite(), draw(*q.shape[:3], seed=6, device=q.device), 0.0)

    def gradients(output: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        finite = torch.where(lse.isfinite(), lse, 0.0)
        return torch.autograd.grad((output * of_output).sum() + (finite * of_lse).sum(), inputs)

    for got, wanted in zip(gradients(output, lse), gradients(expected, expected_lse), strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [64, 128])
def test_attention_equals_float64_with_full_blocks(implementation, device, dtype, block_size):
    q, k, v = (draw(1, 2, 256, 16, seed=seed, device=device, dtype=dtype) for seed in range(3))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    check(q, k, v, block_mask(1, 2, 256, 256, block_size, device), block_size, tolerance=tolerance)


@pytest.mark.parametrize("head_dim", [16, 20, 32, 64, 72, 128])
def test_attention_equals_float64_for_every_width_of_a_head(implementation, device, head_dim):
    q, k, v = (draw(1, 1, 40, head_dim, seed=seed, device=device) for seed in range(3))
    check(q, k, v, block_mask(1, 1, 40, 40, 16, device), 16)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(50, 50), (70, 33), (20, 64)])
def test_attention_equals_float64_for_ragged_and_unequal_lengths(implementation, device, causal, padded, queries, keys):
    q = draw(2, 2, queries, 16, seed=0, device=device)
    k, v = (draw(2, 2, keys, 16, seed=seed, device=device) for seed in (1, 2))
    padding = None
    if padded:
        padding = (torch.rand(2, keys, generator=torch.Generator().manual_seed(3)) > 0.6).to(device)
    check(q, k, v, block_mask(2, 2, queries, keys, 16, device), 16, causal=causal, padding=padding)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_masks_are_shared_by_batches_and_heads(implementation, device, shape):
    q, k, v = (draw(2, 3, 48, 16, seed=seed, device=device) for seed in range(3))
    check(q, k, v, block_mask(*shape, 48, 48, 16, device), 16)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_attention_equals_float64_for_any_shape_and_mask(implementation, device, data):
    queries, keys = data.draw(st.integers(1, 60), label="queries"), data.draw(st.integers(1, 60), label="keys")
    block_size = data.draw(st.sampled_from([16, 32, 48]), label="block_size")
    causal = data.draw(st.booleans(), label="causal")
    blocks = -(-queries // block_size) * -(-keys // block_size)
    bits = data.draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks), label="mask")
    mask = torch.tensor(bits, device=device).reshape(1, 1, -(-queries // block_size), -1)
    q = draw(1, 2, queries, 16, seed=0, device=device)
    k, v = (draw(1, 2, keys, 16, seed=seed, device=device) for seed in (1, 2))
    check(q, k, v, mask, block_size, causal=causal)


def test_all_blocks_kept_equals_torch_attention(implementation, device):
    q, k, v = (draw(2, 2, 50, 32, seed=seed, device=device) for seed in range(3))
    everything = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=device)
    for causal in (False, True):
        torch.testing.assert_close(
            block_sparse_attention(q, k, v, everything, block_size=16, causal=causal),
            F.scaled_dot_product_attention(q, k, v, is_causal=causal),
            rtol=1e-5,
            atol=1e-5,
        )


def test_queries_without_a_block_give_zeros_and_zero_gradients(implementation, device):
    q, k, v = (draw(1, 1, 48, 16, seed=seed, device=device).requires_grad_() for seed in range(3))
    mask = torch.tensor([[[[True, False, True], [False, False, False], [False, False, True]]]], device=device)
    output, lse = block_sparse_attention(q, k, v, mask, block_size=16, return_lse=True)
    (output.sum() + lse.exp().sum()).backward()
    assert (output[0, 0, 16:32] == 0).all() and (lse[0, 0, 16:32] == -math.inf).all()
    assert (q.grad[0, 0, 16:32] == 0).all()
    assert (k.grad[0, 0, 16:32] == 0).all() and (v.grad[0, 0, 16:32] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_extreme_scores_stay_finite(implementation, device):
    q, k, v = (draw(1, 1, 32, 16, seed=seed, device=device) for seed in range(3))
    check(q * 1e4, k, v, torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device), 16, tolerance=2e-2)


def test_strided_heads_need_no_copy_and_scale_is_obeyed(implementation, device):
    packed = draw(2, 40, 3, 2, 16, seed=0, device=device)
    q, k, v = (packed[:, :, part].transpose(1, 2) for part in range(3))
    mask = block_mask(2, 2, 40, 40, 16, device)
    check(q, k, v, mask, 16)
    doubled = block_sparse_attention(q * 2, k, v, mask, block_size=16, scale=0.1)
    torch.testing.assert_close(doubled, block_sparse_attention(q, k, v, mask, block_size=16, scale=0.2))


def test_outputs_over_disjoint_blocks_merge_through_their_log_sums(implementation, device):
    q, k, v = (draw(1, 1, 32, 16, seed=seed, device=device) for seed in range(3))
    left = torch.tensor([[[[True, False], [False, True]]]], device=device)
    (a, a_lse), (b, b_lse) = (
        block_sparse_attention(q, k, v, mask, block_size=16, return_lse=True) for mask in (left, ~left)
    )
    share = torch.sigmoid(a_lse - b_lse)[..., None]
    torch.testing.assert_close(
        share * a + (1 - share) * b, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5
    )


def test_indices_made_once_serve_many_calls(implementation, device):
    q, k, v = (draw(1, 2, 48, 16, seed=seed, device=device).requires_grad_() for seed in range(3))
    mask = block_mask(1, 2, 48, 48, 16, device)
    for capacity in (None, mask.numel()):
        indices = BlockIndices.of(mask, capacity=capacity)
        torch.testing.assert_close(
            block_sparse_attention(q, k, v, indices, block_size=16),
            block_sparse_attention(q, k, v, mask, block_size=16),
        )
    without_keys = BlockIndices.of(mask, with_keys=False)
    block_sparse_attention(q, k, v, without_keys, block_size=16).sum().backward()
    with pytest.raises(RequestError, match="causal=False"):
        block_sparse_attention(q, k, v, indices, block_size=16, causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_lists_hold_the_kept_blocks_in_order(implementation, device, causal):
    mask = torch.tensor([[[[True, False, True], [True, True, True]]]], device=device)
    indices = BlockIndices.of(mask, causal=causal)
    assert indices.by_query.starts.tolist() == ([0, 1, 3] if causal else [0, 2, 5])
    total = indices.by_query.starts[-1]
    assert indices.by_query.entries[:total].tolist() == ([0, 0, 1] if causal else [0, 2, 0, 1, 2])
    assert indices.by_key.starts.tolist() == ([0, 2, 3, 3] if causal else [0, 2, 3, 5])
    assert indices.by_key.entries[:total].tolist() == ([0, 1, 1] if causal else [0, 1, 1, 0, 1])


def test_compiled_attention_equals_the_eager_one(implementation, device):
    q, k, v = (draw(1, 2, 40, 16, seed=seed, device=device).requires_grad_() for seed in range(3))
    mask = block_mask(1, 2, 40, 40, 16, device)

    def loss(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        output, lse = block_sparse_attention(q, k, v, mask, block_size=16, return_lse=True)
        return output.square().sum() + torch.where(lse > -1e30, lse, 0.0).sum()

    expected = torch.autograd.grad(loss(q, k, v, mask), (q, k, v))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(q, k, v, mask)
    for got, wanted in zip(torch.autograd.grad(compiled, (q, k, v)), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_attention_passes_gradcheck_in_float64():
    inputs = [torch.randn(1, 1, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[[[True, False, True], [False, True, False], [True, True, True]]]])
    with backend("reference"):
        assert torch.autograd.gradcheck(
            lambda q, k, v: block_sparse_attention(q, k, v, mask, block_size=3, return_lse=True), inputs, fast_mode=True
        )


def test_impossible_masks_and_options_are_refused():
    q = torch.zeros(1, 2, 40, 16)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(RequestError, match=r"block_mask must be bool \(1 or 1, 2 or 1, 1, 1\)"):
        block_sparse_attention(q, q, q, mask, block_size=64)
    with pytest.raises(RequestError, match="block_mask must be bool"):
        block_sparse_attention(q, q, q, mask.float(), block_size=16)
    with pytest.raises(RequestError, match="scale must be above 0"):
        block_sparse_attention(q, q, q, mask, block_size=16, scale=-1.0)
    with pytest.raises(RequestError, match="key_padding_mask must be bool"):
        block_sparse_attention(q, q, q, mask, block_size=16, key_padding_mask=torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(RequestError, match="q must be"):
        block_sparse_attention(q, q[:, :1], q[:, :1], mask, block_size=16)
    with pytest.raises(RequestError, match="block_mask must be bool"):
        BlockIndices.of(mask[0])
