"""Export-time replacements hold inside their context alone and may not change the outputs."""

from __future__ import annotations

import contextlib

import pytest
import torch
from diffusers.models.transformers import transformer_qwenimage
from torch import nn

from compressor.errors import ArtifactError
from compressor.exporters.replacements import REPLACEMENTS, Replacement, replaced, rotate_by_table


def test_rotation_by_a_table_equals_the_complex_product():
    x, angles = torch.randn(2, 5, 3, 8), torch.randn(5, 4)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    product = numbers * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    assert torch.allclose(rotate_by_table(x, table), torch.view_as_real(product).flatten(3), atol=1e-6)


def test_qwen_rotary_embedding_is_real_inside_and_itself_again_outside(models):
    graph = models("QwenImageTransformer2DModel").graphs["denoiser"]
    rotary = graph.module.module.pos_embed
    original, before = transformer_qwenimage.apply_rotary_emb_qwen, graph.module.eval()(**graph.inputs)
    with replaced(graph.module, graph.inputs) as names:
        assert names == ["Qwen-Image's complex rotary embedding"]
        assert transformer_qwenimage.apply_rotary_emb_qwen is not original
        tables = rotary([[(1, 4, 4)]], max_txt_seq_len=2, device=torch.device("cpu"))
        assert not any(table.is_complex() for table in tables)
    assert transformer_qwenimage.apply_rotary_emb_qwen is original and "forward" not in vars(rotary)
    assert torch.equal(graph.module(**graph.inputs), before)


def test_replacement_that_changes_the_outputs_is_refused():
    @contextlib.contextmanager
    def wrong(module, inputs):
        module.bias.data += 1
        yield

    broken = Replacement("a broken one", ("torch.nn:Linear",), wrong)
    with (
        pytest.raises(ArtifactError, match="a broken one changes the outputs"),
        replaced(nn.Linear(2, 2), {"input": torch.randn(1, 2)}, [broken]),
    ):
        pass


def test_module_that_needs_none_is_not_run():
    class Loud(nn.Module):
        def forward(self):
            raise RuntimeError

    with replaced(Loud(), {}, REPLACEMENTS) as names:
        assert names == []
