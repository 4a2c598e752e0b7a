"""Block stacks of diffusers' diffusion transformers: Qwen-Image, FLUX, SD3, DiT and PixArt.

Each walks its model as the library's ``forward`` does; the tests hold them against it. Samples are always
(B, C, H, W): classes that take packed 2x2 patches are packed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.models.anatomy.blocks import BlockStack, State
from compressor.models.anatomy.diffusion_nets import ConditionField, register

__all__ = ["DiTStack", "FluxStack", "PixArtStack", "QwenImageStack", "SD3Stack"]

PACK = 2
"""Qwen-Image and FLUX take latents packed in 2x2 patches, whatever their `patch_size` says."""


def pack(sample: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H/2 * W/2, C * 4)."""
    return F.pixel_unshuffle(sample, PACK).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H/2 * W/2, C * 4) to (B, C, H, W)."""
    height, width = size
    grid = tokens.transpose(1, 2).unflatten(2, (height // PACK, width // PACK))
    return F.pixel_shuffle(grid, PACK)


def unpatchify(tokens: Tensor, size: tuple[int, int], patch: int, channels: int) -> Tensor:
    """(B, H/p * W/p, p * p * C) to (B, C, H, W), channels last within a patch."""
    rows, columns = size[0] // patch, size[1] // patch
    grid = tokens.unflatten(1, (rows, columns)).unflatten(3, (patch, patch, channels))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _replace_list(blocks: Sequence[nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(list(blocks))


@register
class QwenImageStack(BlockStack):
    """`diffusers.QwenImageTransformer2DModel`: dual-stream blocks, velocity of a rectified flow, timestep = sigma."""

    library_class = "QwenImageTransformer2DModel"
    joint = True

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.module.transformer_blocks)

    @property
    def channels(self) -> int:
        return int(self.module.config.in_channels) // PACK**2

    def condition_fields(self) -> dict[str, ConditionField]:
        return {
            "encoder_hidden_states": ConditionField(("tokens", int(self.module.config.joint_attention_dim))),
            "encoder_attention_mask": ConditionField(("tokens",), optional=True),
        }

    def begin(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> State:
        net, size = self.module, (sample.shape[-2], sample.shape[-1])
        image = net.img_in(pack(sample))
        text = net.txt_in(net.txt_norm(condition["encoder_hidden_states"]))
        time = net.time_text_embed(timestep.to(image.dtype), image)
        # one entry serves the whole batch; a list of its length would fix the batch size in an exported graph
        shapes = [[(1, size[0] // PACK, size[1] // PACK)]]
        positions = net.pos_embed(shapes, max_txt_seq_len=text.shape[1], device=image.device)
        mask = condition.get("encoder_attention_mask")
        context = {
            "encoder_hidden_states_mask": None if mask is None else mask.bool(),
            "temb": time,
            "image_rotary_emb": positions,
        }
        return State(image, text, context, size)

    def end(self, state: State) -> Tensor:
        tokens = self.module.proj_out(self.module.norm_out(state.image, state.context["temb"]))
        return unpack(tokens, state.size)

    def rebuild(self, blocks: Sequence[nn.Module]) -> nn.Module:
        self.module.transformer_blocks = _replace_list(blocks)
        self.module.register_to_config(num_layers=len(blocks))
        return self.module  # type: ignore[no-any-return]


@register
class FluxStack(BlockStack):
    """`diffusers.FluxTransformer2DModel`: dual-stream blocks, then single-stream blocks over both; timestep = sigma.

    Guidance-distilled variants (``guidance_embeds``) are called at the guidance scale `guidance`.
    """

    library_class = "FluxTransformer2DModel"
    joint = True
    guidance = 3.5

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.module.transformer_blocks, *self.module.single_transformer_blocks]

    @property
    def channels(self) -> int:
        return int(self.module.config.in_channels) // PACK**2

    def condition_fields(self) -> dict[str, ConditionField]:
        config = self.module.config
        return {
            "encoder_hidden_states": ConditionField(("tokens", int(config.joint_attention_dim))),
            "pooled_projections": ConditionField((int(config.pooled_projection_dim),)),
        }

    def begin(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> State:
        net, size = self.module, (sample.shape[-2], sample.shape[-1])
        image = net.x_embedder(pack(sample))
        text = net.context_embedder(condition["encoder_hidden_states"])
        time, pooled = timestep.to(image.dtype) * 1000, condition["pooled_projections"]
        if net.config.guidance_embeds:
            embedded = net.time_text_embed(time, torch.full_like(time, self.guidance * 1000), pooled)
        else:
            embedded = net.time_text_embed(time, pooled)
        rows, columns = size[0] // PACK, size[1] // PACK
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(image)
        ids = F.pad(torch.cat([grid.new_zeros(text.shape[1], 2), grid]), (1, 0))
        return State(image, text, {"temb": embedded, "image_rotary_emb": net.pos_embed(ids)}, size)

    def end(self, state: State) -> Tensor:
        tokens = self.module.proj_out(self.module.norm_out(state.image, state.context["temb"]))
        return unpack(tokens, state.size)

    def rebuild(self, blocks: Sequence[nn.Module]) -> nn.Module:
        single = [type(block).__name__ == "FluxSingleTransformerBlock" for block in blocks]
        first = single.index(True) if True in single else len(blocks)
        self.module.transformer_blocks = _replace_list(blocks[:first])
        self.module.single_transformer_blocks = _replace_list(blocks[first:])
        self.module.register_to_config(num_layers=first, num_single_layers=len(blocks) - first)
        return self.module  # type: ignore[no-any-return]


@register
class SD3Stack(BlockStack):
    """`diffusers.SD3Transformer2DModel`: dual-stream blocks (the last drops its text), timestep = 1000 sigma."""

    library_class = "SD3Transformer2DModel"
    joint = True

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.module.transformer_blocks)

    @property
    def channels(self) -> int:
        return int(self.module.config.in_channels)

    def condition_fields(self) -> dict[str, ConditionField]:
        config = self.module.config
        return {
            "encoder_hidden_states": ConditionField(("tokens", int(config.joint_attention_dim))),
            "pooled_projections": ConditionField((int(config.pooled_projection_dim),)),
        }

    def begin(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> State:
        net = self.module
        image = net.pos_embed(sample).contiguous()
        time = net.time_text_embed(timestep, condition["pooled_projections"])
        text = net.context_embedder(condition["encoder_hidden_states"])
        return State(image, text, {"temb": time}, (sample.shape[-2], sample.shape[-1]))

    def end(self, state: State) -> Tensor:
        net = self.module
        tokens = net.proj_out(net.norm_out(state.image, state.context["temb"]))
        return unpatchify(tokens, state.size, net.config.patch_size, net.out_channels)

    def rebuild(self, blocks: Sequence[nn.Module]) -> nn.Module:
        dual = tuple(k for k, block in enumerate(blocks) if getattr(block, "use_dual_attention", False))
        self.module.transformer_blocks = _replace_list(blocks)
        self.module.register_to_config(num_layers=len(blocks), dual_attention_layers=dual)
        return self.module  # type: ignore[no-any-return]


class _OneStream(BlockStack):
    """DiT-like models: the blocks carry image tokens only."""

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.module.transformer_blocks)

    @property
    def channels(self) -> int:
        return int(self.module.config.in_channels)

    def call(self, block: nn.Module, state: State) -> State:
        return replace(state, image=block(state.image, **state.context))

    def rebuild(self, blocks: Sequence[nn.Module]) -> nn.Module:
        self.module.transformer_blocks = _replace_list(blocks)
        self.module.register_to_config(num_layers=len(blocks))
        return self.module  # type: ignore[no-any-return]


@register
class DiTStack(_OneStream):
    """`diffusers.DiTTransformer2DModel`: class labels, integer timesteps; the first block embeds time for the end."""

    library_class = "DiTTransformer2DModel"

    def condition_fields(self) -> dict[str, ConditionField]:
        # one more than the classes: the row of dropped labels
        return {"class_labels": ConditionField((), embeddings=int(self.module.config.num_embeds_ada_norm) + 1)}

    def begin(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> State:
        context = {"timestep": timestep, "class_labels": condition["class_labels"]}
        return State(self.module.pos_embed(sample), None, context, (sample.shape[-2], sample.shape[-1]))

    def end(self, state: State) -> Tensor:
        net, context = self.module, state.context
        first = net.transformer_blocks[0]
        # a block of our own holds the library's as `block`
        time = getattr(first, "block", first).norm1.emb(
            context["timestep"], context["class_labels"], hidden_dtype=state.image.dtype
        )
        shift, scale = net.proj_out_1(F.silu(time)).chunk(2, dim=1)
        tokens = net.proj_out_2(net.norm_out(state.image) * (1 + scale[:, None]) + shift[:, None])
        return unpatchify(tokens, state.size, net.patch_size, net.out_channels)


@register
class PixArtStack(_OneStream):
    """`diffusers.PixArtTransformer2DModel`: text by cross-attention (constant over the blocks), shared modulation."""

    library_class = "PixArtTransformer2DModel"

    def condition_fields(self) -> dict[str, ConditionField]:
        config = self.module.config
        width = config.caption_channels or config.cross_attention_dim
        return {
            "encoder_hidden_states": ConditionField(("tokens", int(width))),
            "encoder_attention_mask": ConditionField(("tokens",), optional=True),
        }

    def begin(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> State:
        net, batch = self.module, sample.shape[0]
        image = net.pos_embed(sample)
        added = self._micro_conditions(sample) if net.use_additional_conditions else None
        modulation, time = net.adaln_single(timestep, added, batch_size=batch, hidden_dtype=image.dtype)
        text = condition["encoder_hidden_states"]
        if net.caption_projection is not None:
            text = net.caption_projection(text)
        mask = condition.get("encoder_attention_mask")
        # as the library: an additive bias with one query axis, -10000 where there is no token
        bias = None if mask is None else ((1 - mask.to(image.dtype)) * -10000.0).unsqueeze(1)
        context = {"encoder_hidden_states": text, "encoder_attention_mask": bias, "timestep": modulation}
        return State(image, None, {**context, "embedded_timestep": time}, (sample.shape[-2], sample.shape[-1]))

    def _micro_conditions(self, sample: Tensor) -> dict[str, Tensor]:
        """Resolution in pixels (8 per latent) and aspect ratio, as the pipeline passes them."""
        batch, (height, width) = sample.shape[0], sample.shape[-2:]
        size = sample.new_tensor([8.0 * height, 8.0 * width]).expand(batch, 2)
        return {"resolution": size, "aspect_ratio": sample.new_full((batch, 1), height / width)}

    def call(self, block: nn.Module, state: State) -> State:
        context = {name: value for name, value in state.context.items() if name != "embedded_timestep"}
        return replace(state, image=block(state.image, **context))

    def end(self, state: State) -> Tensor:
        net = self.module
        shift, scale = (net.scale_shift_table[None] + state.context["embedded_timestep"][:, None]).chunk(2, dim=1)
        tokens = net.proj_out(net.norm_out(state.image) * (1 + scale) + shift)
        return unpatchify(tokens, state.size, net.config.patch_size, net.out_channels)
