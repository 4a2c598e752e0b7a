"""Diffusers' UNets: `UNet2DModel` (classes) and `UNet2DConditionModel` (text; SDXL's pooled text and sizes)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.models.anatomy.diffusion_nets import ConditionField, DiffusionNet, register

__all__ = ["ConditionalUNet", "UNet"]

LATENT_SCALE = 8
"""Pixels a latent: SDXL is told sizes in pixels."""


class _MiddleReached(Exception):
    """Ends a forward behind the middle block."""

    def __init__(self, features: Tensor) -> None:
        self.features = features


class _AnyUNet(DiffusionNet):
    """What both classes share: labels, and the middle block."""

    @property
    def channels(self) -> int:
        return int(self.module.config.out_channels)

    def class_field(self) -> dict[str, ConditionField]:
        """The class labels, if the model takes any."""
        count, kind = self.module.config.num_class_embeds, self.module.config.class_embed_type
        if kind is not None:
            raise ModelError(f"a {self.library_class} with class embeddings of type {kind!r} cannot be called here")
        return {} if count is None else {"class_labels": ConditionField((), embeddings=int(count))}

    def middle(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        block: nn.Module | None = self.module.mid_block
        if block is None:
            raise ModelError(f"this {self.library_class} has no middle block, whose features are asked for")

        def stop(_block: nn.Module, _inputs: Any, output: Tensor) -> None:
            raise _MiddleReached(output)

        handle = block.register_forward_hook(stop)
        try:
            self.forward(sample, timestep, condition)
        except _MiddleReached as reached:
            return reached.features
        finally:
            handle.remove()
        raise ModelError(f"the forward of this {self.library_class} does not run its middle block")


@register
class UNet(_AnyUNet):
    """`diffusers.UNet2DModel`: class labels, or no condition at all."""

    library_class = "UNet2DModel"

    def condition_fields(self) -> dict[str, ConditionField]:
        return self.class_field()

    def forward(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.module(sample, timestep, condition.get("class_labels"), return_dict=False)[0]
        return output


@register
class ConditionalUNet(_AnyUNet):
    """`diffusers.UNet2DConditionModel`: text by cross-attention; SDXL's pooled text and sizes; class labels."""

    library_class = "UNet2DConditionModel"

    def condition_fields(self) -> dict[str, ConditionField]:
        config = self.module.config
        width = config.encoder_hid_dim or config.cross_attention_dim
        if not isinstance(width, int):
            width = width[0]
        fields = {
            "encoder_hidden_states": ConditionField(("tokens", int(width))),
            "encoder_attention_mask": ConditionField(("tokens",), optional=True),
        }
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            height, columns = _pair(config.sample_size)
            # height and width of the original, top and left of the crop, height and width asked for
            sizes = (height, columns, 0, 0, height, columns)
            fields["pooled_projections"] = ConditionField((int(pooled),))
            fields["time_ids"] = ConditionField((6,), constant=tuple(float(LATENT_SCALE * size) for size in sizes))
        elif config.addition_embed_type not in (None, "text"):
            raise ModelError(
                f"a UNet2DConditionModel with additional embeddings of type {config.addition_embed_type!r} cannot be "
                "called here; text and text_time (SDXL) can"
            )
        return fields | self.class_field()

    def forward(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        added = None
        if "time_ids" in condition:
            added = {"text_embeds": condition["pooled_projections"], "time_ids": condition["time_ids"]}
        output: Tensor = self.module(
            sample,
            timestep,
            condition["encoder_hidden_states"],
            class_labels=condition.get("class_labels"),
            encoder_attention_mask=condition.get("encoder_attention_mask"),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output


def _pair(size: Any) -> tuple[int, int]:
    if size is None:
        return 0, 0
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
