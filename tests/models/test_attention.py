"""Adaptive block-sparse processors in small random diffusers transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError, RequestError
from compressor.kernels.sparse_attention import dense_mask
from compressor.models import attention as attention_module
from compressor.models.attention import AdaptiveAttention, set_adaptive_attention, z_order
from compressor.models.model import Model, ModelInfo, load_model, save_model

SPARSE = AdaptiveAttention(block_size=4, samples=2, min_retain_ratio=0.3, max_retain_ratio=0.3)

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 2,
    "num_layers": 2,
    "sample_size": 8,
    "norm_num_groups": 1,
    "num_embeds_ada_norm": 10,
}


def dit() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(**DIT).eval()
    sample = torch.randn(2, 2, 8, 8)
    time, label = torch.tensor([5, 9]), torch.tensor([1, 3])
    return net, lambda net: net(sample, timestep=time, class_labels=label).sample


def wan() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    net = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2,
        out_channels=2,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    sample, text = torch.randn(2, 2, 3, 6, 6), torch.randn(2, 3, 8)
    return net, lambda net: net(sample, timestep=torch.tensor([5, 9]), encoder_hidden_states=text).sample


def qwen_image(masked: bool = False) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    net = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 4),
    ).eval()
    sample, text = torch.randn(2, 24, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2]) if masked else None
    return (
        net,
        lambda net: (
            net(
                hidden_states=sample,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=mask,
                timestep=torch.tensor([0.2, 0.7]),
                img_shapes=[[(1, 4, 6)]] * 2,
            ).sample
        ),
    )


NETWORKS = {"dit": dit, "wan": wan, "qwen-image": qwen_image, "qwen-image-masked": lambda: qwen_image(masked=True)}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ordered", [False, True])
def test_network_equals_the_dense_one_when_all_blocks_are_kept(name, ordered):
    net, run = NETWORKS[name]()
    grid = {"dit": (4, 4), "wan": (3, 3, 3)}.get(name, (4, 6)) if ordered else None
    with torch.no_grad():
        expected = run(net)
        changed = set_adaptive_attention(net, replace(SPARSE, min_retain_ratio=1, max_retain_ratio=1, grid=grid))
        got = run(net)
    assert len(changed) == 2, "one self-attention a block; cross-attention stays"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_equals_dense_attention_under_the_same_mask(name):
    net, run = NETWORKS[name]()
    set_adaptive_attention(net, SPARSE)
    masks = []

    def masked_dense(q, k, v, mask, block_size, pool_size, key_padding_mask):
        masks.append(mask)
        seen = dense_mask(mask, q.shape[2], k.shape[2], block_size, key_padding_mask=key_padding_mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    with torch.no_grad():
        sparse = run(net)
        with mock.patch.object(attention_module, "asa_attention", masked_dense):
            dense = run(net)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
    kept = torch.stack([mask.float().mean() for mask in masks])
    assert (kept < 0.9).all() and len(masks) == 2, "some blocks are left out in every layer"


def test_text_is_always_seen_and_sees_everything():
    q, k = torch.randn(1, 2, 22, 8), torch.randn(1, 2, 22, 8)
    mask = SPARSE.block_mask(q, k, text_tokens=5)
    assert mask[..., -2:].all() and mask[..., -2:, :].all(), "tokens 17..21 lie in blocks 4 and 5 of 0..5"
    assert (mask[..., :4, :4].sum(-1) == 1).all()


def test_probe_is_random_in_training_and_fixed_in_evaluation():
    net, run = dit()
    set_adaptive_attention(net, SPARSE)
    with torch.no_grad():
        assert torch.equal(run(net), run(net))
        net.train()
        torch.manual_seed(1)
        drawn = [run(net) for _ in range(3)]
    assert not (torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2]))


@pytest.mark.parametrize("pool_size", [None, 3])
def test_gradients_reach_every_projection(pool_size):
    net, run = wan()
    set_adaptive_attention(net, replace(SPARSE, pool_size=pool_size))
    run(net).square().sum().backward()
    for projection in (net.blocks[0].attn1.to_q, net.blocks[0].attn1.to_k, net.blocks[0].attn1.to_v):
        assert projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("pool_size", [None, 3])
def test_exported_graph_equals_the_network(pool_size, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, _ = dit()
    set_adaptive_attention(net, replace(SPARSE, pool_size=pool_size, grid=(4, 4)))

    class Export(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, sample: Tensor, time: Tensor, label: Tensor) -> Tensor:
            return self.net(sample, timestep=time, class_labels=label).sample

    inputs = torch.randn(2, 2, 8, 8), torch.tensor([5, 9]), torch.tensor([1, 3])
    with torch.no_grad():
        expected = Export()(*inputs)
        program = torch.onnx.export(Export().eval(), inputs, dynamo=True, verbose=False)
    program.save(tmp_path / "net.onnx")
    operators = {node.op_type for node in program.model.graph}
    assert not any("compressor" in str(operator) for operator in operators)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    (got,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_model_with_the_edit_is_saved_and_built_again(tmp_path):
    net, run = dit()
    model = Model(net, ModelInfo("diffusers", "DiTTransformer2DModel", DIT))
    model = model.edit("attention.blade", block_size=4, samples=2, max_retain_ratio=0.3, grid=[4, 4])
    save_model(model, tmp_path / "student")
    again = load_model(tmp_path / "student")
    assert again.info.edits == model.info.edits
    with torch.no_grad():
        torch.testing.assert_close(run(again.module.eval()), run(model.module))


@pytest.mark.parametrize("grid", [(4,), (3, 5), (2, 3, 5)])
def test_z_order_visits_every_cell_once(grid):
    assert z_order(grid).sort().values.tolist() == list(range(int(np.prod(grid))))


def test_z_order_keeps_neighbours_together():
    assert z_order((4, 4))[:4].tolist() == [0, 1, 4, 5]
    assert z_order((2, 2, 2)).tolist() == list(range(8))


def test_models_without_self_attention_and_wrong_settings_are_refused():
    with pytest.raises(ModelError, match="has no self-attention that can be made block-sparse"):
        set_adaptive_attention(nn.Linear(2, 2), SPARSE)
    with pytest.raises(RequestError, match="samples must lie in 1..4"):
        AdaptiveAttention(block_size=4, samples=5)
    with pytest.raises(RequestError, match="energy_threshold must lie in 0..1"):
        AdaptiveAttention(energy_threshold=1.5)
    with pytest.raises(RequestError, match="pool_size"):
        AdaptiveAttention(pool_size=0)
