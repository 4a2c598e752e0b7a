"""Edits of a block stack: which blocks remain, and blocks whose text stream or feed-forward is one linear map.

The maps are those of PPCL (Ma et al., CVPR 2026), stage 2: ``x -> x + W x + b`` in place of the normalisation,
modulation, feed-forward and gate that they replace.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.models.anatomy.blocks import Anchor, OwnBlock, State, block_stack
from compressor.models.model import edit

__all__ = [
    "BlockPlan",
    "PrunedJointBlock",
    "PrunedSingleBlock",
    "ResidualMap",
    "after_attention",
    "can_prune_ffn",
    "can_prune_text",
    "text_tokens",
]

TextRole = Literal["whole", "anchor", "inside", "last"]


class BlockPlan(TypedDict, total=False):
    """One block of the assembled stack.

    Keys:
        source: Index of the library block whose structure (and first weights) it has.
        ffn: Whether its feed-forward is a linear map.
        text: "whole"; "anchor": whole, and the blocks after it read its text tokens; "inside": without a text stream;
            "last": without one, and the text state is mapped on here, for the blocks behind the run.
    """

    source: int
    ffn: bool
    text: TextRole


class ResidualMap(nn.Module):
    """``x + W x + b`` over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.linear(x)
        return result

    @torch.no_grad()
    def set(self, weight: Tensor, bias: Tensor) -> None:
        """Take a fitted map."""
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(bias)


@dataclass(frozen=True)
class _JointParts:
    """The inside of a dual-stream block; modulations give shift, scale, gate for attention, then for the MLP."""

    attention: nn.Module
    image_modulation: nn.Linear
    text_modulation: nn.Linear
    image_mlp: nn.Module
    text_mlp: nn.Module


def _joint_parts(block: Any) -> _JointParts | None:
    kind = type(block).__name__
    if kind == "QwenImageTransformerBlock" and not block.zero_cond_t:
        return _JointParts(block.attn, block.img_mod[1], block.txt_mod[1], block.img_mlp, block.txt_mlp)
    plain_sd3 = kind == "JointTransformerBlock" and not (block.use_dual_attention or block.context_pre_only)
    if kind == "FluxTransformerBlock" or plain_sd3:
        return _JointParts(block.attn, block.norm1.linear, block.norm1_context.linear, block.ff, block.ff_context)
    return None


def can_prune_text(block: nn.Module) -> bool:
    """Whether the block has a text stream that a map can stand in for."""
    return _joint_parts(block) is not None


def can_prune_ffn(block: nn.Module) -> bool:
    """Whether the block has a feed-forward after its attention that a map can stand in for."""
    norm = getattr(block, "norm_type", None)
    return _joint_parts(block) is not None or norm in ("ada_norm_zero", "ada_norm_single")


def _normalise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return _normalise(x) * (1 + scale[:, None]) + shift[:, None]


def _attention_context(context: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in context.items() if name != "temb"}


def _clip_half(x: Tensor) -> Tensor:
    """Keep float16 activations finite, as the library's blocks do."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def text_tokens(block: nn.Module, state: State) -> Tensor:
    """The normalised, modulated text (B, M, d) that a dual-stream block's text query, key and value read."""
    if isinstance(block, PrunedJointBlock):
        return block.text_tokens(state)
    parts = _joint_parts(block)
    if parts is None or state.text is None:
        raise ModelError(f"a {type(block).__name__} has no text stream")
    shift, scale = parts.text_modulation(F.silu(state.context["temb"])).chunk(6, dim=-1)[:2]
    return _modulate(state.text, shift, scale)


def after_attention(block: Any, state: State) -> dict[str, Tensor]:
    """The streams after a block's gated attention and before its feed-forward, by name."""
    parts = _joint_parts(block)
    if parts is not None and state.text is not None:
        time = F.silu(state.context["temb"])
        shift, scale, gate = parts.image_modulation(time).chunk(6, dim=-1)[:3]
        text_gate = parts.text_modulation(time).chunk(6, dim=-1)[2]
        image, text = parts.attention(
            hidden_states=_modulate(state.image, shift, scale),
            encoder_hidden_states=text_tokens(block, state),
            **_attention_context(state.context),
        )
        return {"image": state.image + gate[:, None] * image, "text": state.text + text_gate[:, None] * text}
    if can_prune_ffn(block):
        return {"image": _attend_single(block, _single_modulation(block, state), state)}
    raise ModelError(f"a {type(block).__name__} has no feed-forward after its attention")


class _Stream(nn.Module):
    """One stream of a dual-stream block: modulation, and either the block's MLP or a map in its place."""

    def __init__(self, modulation: nn.Linear, mlp: nn.Module | None) -> None:
        super().__init__()
        self.modulation = modulation if mlp is not None else _first_half(modulation)
        self.mlp = mlp
        self.map = ResidualMap(modulation.in_features) if mlp is None else None

    def enter(self, x: Tensor, time: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        shift, scale, *rest = self.modulation(time).chunk(3 if self.mlp is None else 6, dim=-1)
        return _modulate(x, shift, scale), tuple(rest)

    def leave(self, x: Tensor, attention: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        x = x + rest[0][:, None] * attention
        if self.map is not None:
            result: Tensor = self.map(x)
            return result
        assert self.mlp is not None
        _, shift, scale, gate = rest
        return x + gate[:, None] * self.mlp(_modulate(x, shift, scale))


def _first_half(modulation: nn.Linear) -> nn.Linear:
    """The attention branch's half of a modulation layer."""
    half = nn.Linear(modulation.in_features, modulation.out_features // 2, bias=modulation.bias is not None)
    with torch.no_grad():
        half.weight.copy_(modulation.weight[: half.out_features])
        if modulation.bias is not None:
            half.bias.copy_(modulation.bias[: half.out_features])
    return half.to(modulation.weight)


class PrunedJointBlock(OwnBlock):
    """A dual-stream block without its feed-forwards, without its text stream, or with both and marked as an anchor.

    Args:
        block: The library block that it is made of; its parts are taken over, not copied.
        ffn: Replace the feed-forwards (and their half of the modulation) by maps.
        text: See `BlockPlan`.
    """

    def __init__(self, block: nn.Module, *, ffn: bool, text: TextRole) -> None:
        super().__init__()
        parts = _joint_parts(block)
        if parts is None:
            raise ModelError(f"the width of a {type(block).__name__} cannot be pruned")
        width = parts.image_modulation.in_features
        self.role = text
        self.attention = parts.attention
        self.image = _Stream(parts.image_modulation, None if ffn else parts.image_mlp)
        has_text = text in ("whole", "anchor")
        self.text = _Stream(parts.text_modulation, None if ffn else parts.text_mlp) if has_text else None
        self.tokens_map = None if has_text else ResidualMap(width)
        self.text_map = ResidualMap(width) if text == "last" else None
        if not has_text:
            # its output is thrown away; the library's processor only asks that it be there
            self.attention.to_add_out = nn.Identity()

    def text_tokens(self, state: State) -> Tensor:
        """See the function of this name."""
        return self._enter_text(state, F.silu(state.context["temb"]))[0]

    def _enter_text(self, state: State, time: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.text is not None and state.text is not None:
            return self.text.enter(state.text, time)
        if self.tokens_map is None or state.anchor is None:
            raise ModelError("a block without a text stream stands behind no anchor")
        return self.tokens_map(state.anchor.tokens), ()

    def step(self, state: State) -> State:
        time = F.silu(state.context["temb"])
        image, image_rest = self.image.enter(state.image, time)
        tokens, text_rest = self._enter_text(state, time)
        image_out, text_out = self.attention(
            hidden_states=image, encoder_hidden_states=tokens, **_attention_context(state.context)
        )
        image = _clip_half(self.image.leave(state.image, image_out, image_rest))
        text, anchor = state.text, state.anchor
        if self.text is not None and text is not None:
            anchor = Anchor(tokens) if self.role == "anchor" else None
            text = _clip_half(self.text.leave(text, text_out, text_rest))
        elif self.text_map is not None:
            text = _clip_half(self.text_map(text))
        return replace(state, image=image, text=text, anchor=anchor)


def _single_modulation(block: Any, state: State) -> tuple[Tensor, ...]:
    """Shift, scale and gate of a DiT or PixArt block's attention branch, each (B, 1, d)."""
    time = state.context["timestep"]
    if block.norm_type == "ada_norm_zero":
        embedded = block.norm1.emb(time, state.context["class_labels"], hidden_dtype=state.image.dtype)
        values = block.norm1.linear(F.silu(embedded)).unflatten(1, (-1, state.image.shape[-1]))
    else:
        values = block.scale_shift_table[None, :3] + time.unflatten(1, (6, -1))[:, :3]
    return values[:, :3].chunk(3, dim=1)


def _attend_single(block: Any, modulation: tuple[Tensor, ...], state: State) -> Tensor:
    """The image tokens of a DiT or PixArt block before its feed-forward."""
    shift, scale, gate = modulation
    # DiT's norm1 modulates by itself, PixArt's only normalises
    normal = (block.norm1.norm if block.norm_type == "ada_norm_zero" else block.norm1)(state.image)
    image = state.image + gate * block.attn1(normal * (1 + scale) + shift)
    if block.attn2 is not None:
        text, mask = state.context["encoder_hidden_states"], state.context["encoder_attention_mask"]
        image = image + block.attn2(image, encoder_hidden_states=text, attention_mask=mask)
    return image


class PrunedSingleBlock(OwnBlock):
    """A DiT or PixArt block whose feed-forward (and its half of the modulation) is a map.

    Args:
        block: The library block; it is taken over and loses those parts.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        if block.norm_type == "ada_norm_zero":
            block.norm1.linear = _first_half(block.norm1.linear)
        else:
            block.scale_shift_table = nn.Parameter(block.scale_shift_table.detach()[:3].clone())
        block.ff = None
        self.block = block
        self.map = ResidualMap(block.attn1.to_q.in_features)

    def step(self, state: State) -> State:
        return replace(state, image=self.map(_attend_single(self.block, _single_modulation(self.block, state), state)))


@edit("blocks.assemble")
def assemble(module: nn.Module, plan: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Rebuild a block stack from copies of its own blocks.

    Args:
        module: A class with a block-stack anatomy; changed in place.
        plan: The blocks of the result in order, as `BlockPlan` mappings.
    """
    stack = block_stack(module)
    old = stack.blocks
    new: list[nn.Module] = []
    sources = [int(entry["source"]) for entry in plan]
    for place, entry in enumerate(plan):
        source = sources[place]
        if not 0 <= source < len(old):
            raise ModelError(f"the plan names block {source}; the model has blocks 0 to {len(old) - 1}")
        # shaping takes a block apart, so all uses of it but the last get copies
        block = copy.deepcopy(old[source]) if source in sources[place + 1 :] else old[source]
        new.append(shape_block(block, bool(entry.get("ffn", False)), entry.get("text", "whole")))
    return stack.rebuild(new)


def shape_block(block: nn.Module, ffn: bool, text: TextRole) -> nn.Module:
    if not ffn and text == "whole":
        return block
    if _joint_parts(block) is not None:
        return PrunedJointBlock(block, ffn=ffn, text=text)
    if text == "whole" and can_prune_ffn(block):
        return PrunedSingleBlock(block)
    raise ModelError(f"the width of a {type(block).__name__} cannot be pruned")
