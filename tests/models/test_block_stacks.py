"""Anatomies of the five diffusion transformers: walking the blocks equals the library's forward."""

from __future__ import annotations

import diffusers
import pytest
import torch

from compressor.errors import ModelError
from compressor.models.anatomy.blocks import block_stack
from compressor.models.anatomy.diffusion_transformers import unpatchify
from tests.tiny_transformers import NAMES, tiny


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_walk_equals_the_librarys_forward(name: str) -> None:
    model = tiny(name)
    walked = block_stack(model.module).forward(model.sample, model.timestep, model.condition)
    assert torch.equal(walked, model.library_output())
    assert walked.abs().max() > 0.1


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "PixArtTransformer2DModel"])
@torch.no_grad()
def test_walk_equals_the_librarys_forward_when_text_is_padded(name: str) -> None:
    model = tiny(name)
    plain = model.library_output()
    model.condition = model.condition | {"encoder_attention_mask": torch.tensor([[1, 1], [1, 0], [1, 1]])}
    walked = block_stack(model.module).forward(model.sample, model.timestep, model.condition)
    assert torch.equal(walked, model.library_output())
    assert torch.equal(walked[0], plain[0])
    assert not torch.allclose(walked[1], plain[1])


@torch.no_grad()
def test_walk_equals_the_librarys_forward_when_pixart_takes_resolutions() -> None:
    model = tiny("PixArtTransformer2DModel")
    torch.manual_seed(1)
    model.module = diffusers.PixArtTransformer2DModel(
        **model.config | {"use_additional_conditions": True, "attention_head_dim": 24, "cross_attention_dim": 48}
    ).eval()
    walked = block_stack(model.module).forward(model.sample, model.timestep, model.condition)
    assert torch.equal(walked, model.library_output())


@torch.no_grad()
def test_walk_equals_the_librarys_forward_when_sd3_has_dual_attention() -> None:
    model = tiny("SD3Transformer2DModel")
    torch.manual_seed(1)
    model.module = diffusers.SD3Transformer2DModel(**model.config | {"dual_attention_layers": (1, 2)}).eval()
    stack = block_stack(model.module)
    assert torch.equal(stack.forward(model.sample, model.timestep, model.condition), model.library_output())
    pruned = stack.rebuild([stack.blocks[0], stack.blocks[2], stack.blocks[3]])
    assert pruned.config.dual_attention_layers == (1,)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_rebuilt_stack_loads_as_the_plain_class(name: str, tmp_path: object) -> None:
    model = tiny(name)
    stack = block_stack(model.module)
    stack.rebuild([stack.blocks[0], stack.blocks[2], stack.blocks[-1]])
    assert len(stack.blocks) == 3
    model.module.save_pretrained(tmp_path)
    model.module = getattr(diffusers, name).from_pretrained(tmp_path)
    expected = stack.forward(model.sample, model.timestep, model.condition)
    assert torch.allclose(model.library_output(), expected, atol=1e-6)


def test_unpatchify_puts_rows_and_columns_in_place() -> None:
    image = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = image.view(2, 3, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 12)
    assert torch.equal(unpatchify(patches, (4, 6), 2, 3), image)


def test_class_without_anatomy_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(
        ModelError, match=r"blocks of a Linear cannot be walked; classes that can: DiTTransformer2DModel"
    ):
        block_stack(torch.nn.Linear(2, 2))
