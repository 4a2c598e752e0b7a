"""Blocks that lost their feed-forward or text stream, and the edit that assembles them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from compressor.errors import ModelError
from compressor.models.anatomy.blocks import Anchor, State, block_stack
from compressor.models.edits.blocks import (
    PrunedJointBlock,
    after_attention,
    assemble,
    can_prune_ffn,
    can_prune_text,
    shape_block,
    text_tokens,
)
from compressor.models.edits.layout import Slot, layout_key, mark_text_runs, parameters_of_layout, slots_of
from compressor.models.edits.linear_maps import fit_maps, map_modules, set_maps
from compressor.models.model import Model, ModelInfo, load_model, save_model
from tests.tiny_transformers import NAMES, tiny

JOINT = ("QwenImageTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel")


def state_of(name: str) -> tuple[torch.nn.Module, State, object]:
    model = tiny(name)
    stack = block_stack(model.module)
    return stack.blocks[1], stack.begin(model.sample, model.timestep, model.condition), stack


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_after_attention_is_the_state_before_the_feed_forward(name: str) -> None:
    block, state, stack = state_of(name)
    inner = after_attention(block, state)
    silent = copy.deepcopy(block)
    for path in ("img_mlp", "txt_mlp", "ff", "ff_context"):
        if getattr(silent, path, None) is not None:
            for parameter in getattr(silent, path).parameters():
                parameter.zero_()
    expected = stack.run(silent, state)
    for stream, tokens in expected.streams().items():
        assert torch.allclose(inner[stream], tokens, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_block_without_feed_forward_applies_its_map_to_that_state(name: str) -> None:
    block, state, stack = state_of(name)
    inner = after_attention(block, state)
    pruned = shape_block(copy.deepcopy(block), True, "whole")
    for stream, module in map_modules(pruned).items():
        width = inner[stream].shape[-1]
        module.set(torch.full((width, width), 0.01), torch.full((width,), 0.5))
    result = stack.run(pruned, state).streams()
    for stream, tokens in inner.items():
        assert torch.allclose(result[stream], tokens + 0.01 * tokens.sum(-1, keepdim=True) + 0.5, atol=1e-4)


@pytest.mark.parametrize("name", JOINT)
@torch.no_grad()
def test_block_without_text_stream_equals_the_whole_block_when_its_map_is_exact(name: str) -> None:
    block, state, stack = state_of(name)
    whole = stack.run(block, state)
    tokens = text_tokens(block, state)
    pruned = shape_block(copy.deepcopy(block), False, "inside")
    assert isinstance(pruned, PrunedJointBlock)
    width = tokens.shape[-1]
    pruned.tokens_map.set(torch.zeros(width, width), torch.zeros(width))
    result = stack.run(pruned, replace(state, anchor=Anchor(tokens)))
    assert torch.allclose(result.image, whole.image, atol=1e-5)
    assert torch.equal(result.text, state.text)


@torch.no_grad()
def test_anchor_passes_its_own_text_tokens_on() -> None:
    block, state, stack = state_of("QwenImageTransformer2DModel")
    anchor = shape_block(copy.deepcopy(block), False, "anchor")
    result = stack.run(anchor, state)
    assert torch.allclose(result.anchor.tokens, text_tokens(block, state))
    assert torch.allclose(result.image, stack.run(block, state).image, atol=1e-6)


def test_block_without_text_stream_is_refused_behind_no_anchor() -> None:
    block, state, stack = state_of("QwenImageTransformer2DModel")
    with pytest.raises(ModelError, match="stands behind no anchor"):
        stack.run(shape_block(block, False, "inside"), state)


@torch.no_grad()
def test_flux_single_stream_blocks_have_no_width_to_prune() -> None:
    stack = block_stack(tiny("FluxTransformer2DModel").module)
    assert [can_prune_ffn(block) for block in stack.blocks] == [True, True, False, False]
    with pytest.raises(ModelError, match="width of a FluxSingleTransformerBlock cannot be pruned"):
        shape_block(stack.blocks[-1], True, "whole")


@torch.no_grad()
def test_last_sd3_block_keeps_its_width_since_it_drops_the_text_itself() -> None:
    stack = block_stack(tiny("SD3Transformer2DModel").module)
    assert [can_prune_text(block) for block in stack.blocks] == [True, True, True, False]


def test_sizes_are_those_of_the_card() -> None:
    stack = block_stack(tiny("QwenImageTransformer2DModel").module)
    width = 32
    whole, text, ffn, both = (
        parameters_of_layout(stack.blocks, [slot]) / width**2
        for slot in (
            Slot(1, 1, 1),
            Slot(1, 1, 1, text="inside"),
            Slot(1, 1, 1, ffn=True),
            Slot(1, 1, 1, ffn=True, text="inside"),
        )
    )
    # d^2 counts of the card (36, 23, 16, 13), less the text output projection that the card leaves dead, plus biases
    assert whole == pytest.approx(36, rel=0.06)
    assert text == pytest.approx(22, rel=0.06)
    assert ffn == pytest.approx(16, rel=0.06)
    assert both == pytest.approx(12, rel=0.06)


@torch.no_grad()
def test_fitted_maps_bring_the_pruned_stack_near_the_whole_one() -> None:
    model = tiny("QwenImageTransformer2DModel")
    original = block_stack(model.module)
    slots = mark_text_runs(slots_of(4), [(1, 2)])
    slots = [replace(slot, ffn=slot.first == 3) for slot in slots]

    def data(seed: int) -> list[State]:
        torch.manual_seed(seed)
        sample = torch.randn(64, 1, 8, 8)
        text = {"encoder_hidden_states": model.condition["encoder_hidden_states"].repeat(22, 1, 1)[:64]}
        return [original.begin(sample, torch.rand(64), text)]

    maps = fit_maps(original, slots, lambda slot: original.blocks[slot.first], data(0))
    assert set(maps) == {"2-2.tokens", "2-2.state", "3-3.image", "3-3.text"}
    changed = assemble(copy.deepcopy(model.module), [slot.plan for slot in slots])
    stack = block_stack(changed)
    begun = data(1)[0]

    def error() -> float:
        a, b = begun, begun
        for whole, block in zip(original.blocks, stack.blocks, strict=True):
            a, b = original.run(whole, a), stack.run(block, b)
        return float((a.image - b.image).square().sum() / a.image.square().sum())

    before = error()
    set_maps(slots, stack.blocks, maps)
    assert error() < 0.2 * before


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_edited_model_is_saved_and_built_again(name: str, tmp_path: object) -> None:
    made = tiny(name)
    config = json.loads(json.dumps(made.config))
    model = Model(made.module, ModelInfo("diffusers", name, config))
    text = name in JOINT and name != "SD3Transformer2DModel"
    plan = [
        {"source": 0, "text": "anchor" if text else "whole"},
        {"source": 1, "ffn": True, "text": "last" if text else "whole"},
    ]
    edited = model.edit("blocks.assemble", plan=[*plan, {"source": 1}, {"source": 3}])
    expected = block_stack(edited.module).forward(made.sample, made.timestep, made.condition)
    save_model(edited, tmp_path / "student")
    again = load_model(tmp_path / "student")
    assert again.info == edited.info
    assert torch.equal(block_stack(again.module.eval()).forward(made.sample, made.timestep, made.condition), expected)


def test_plan_with_an_unknown_block_is_refused() -> None:
    with pytest.raises(ModelError, match="names block 7; the model has blocks 0 to 3"):
        assemble(tiny("DiTTransformer2DModel").module, [{"source": 7}])


def test_text_run_at_the_end_of_the_network_needs_no_state_map() -> None:
    roles = [slot.text for slot in mark_text_runs(slots_of(4), [(2, 3)])]
    assert roles == ["whole", "whole", "anchor", "inside"]
    assert [slot.text for slot in mark_text_runs(slots_of(5), [(1, 3)])][1:4] == ["anchor", "inside", "last"]


def test_layout_puts_plugs_in_place_of_their_runs() -> None:
    slots = slots_of(6, [Slot(1, 2, 1, plug=True), Slot(3, 4, 3, plug=True)])
    assert [slot.key for slot in slots] == ["0-0", "1-2", "3-4", "5-5"]
    assert layout_key(slots)[1] == {"source": 1, "ffn": False, "text": "whole", "first": 1, "plug": True}
