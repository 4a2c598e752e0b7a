"""A diffusion model whatever it predicts: noising, prediction, conversion to the clean sample."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from compressor.diffusion.schedules import Schedule, schedule_from_config
from compressor.models.anatomy.blocks import BlockStack, block_stack
from compressor.models.anatomy.diffusion_nets import DiffusionNet, diffusion_net
from compressor.models.model import Model

__all__ = ["Denoiser", "DenoiserGraph", "noised_batch"]


class Denoiser(nn.Module):
    """A model together with its noise schedule.

    Args:
        model: A diffusion transformer or UNet (`compressor.models.anatomy`).
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.module = model.module
        self.schedule: Schedule = schedule_from_config(
            model.info.extra.get("scheduler"), architecture=model.info.architecture
        )

    @property
    def net(self) -> DiffusionNet:
        """The model as its class is called."""
        return diffusion_net(self.module)

    @property
    def stack(self) -> BlockStack:
        """The model as a stack of blocks.

        Raises:
            ModelError: It is none.
        """
        return block_stack(self.module)

    @property
    def channels(self) -> int:
        """Channels of the sample."""
        return self.net.channels

    def forward(self, noised: Tensor, level: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The raw prediction (B, C_out, H, W); C_out exceeds C where the model also predicts a variance."""
        return self.net.forward(noised, self.schedule.timestep(level), condition)

    def predict(self, noised: Tensor, level: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The prediction (B, C, H, W) without a variance."""
        return self(noised, level, condition)[:, : self.channels]

    def guided(
        self,
        noised: Tensor,
        level: Tensor,
        condition: Mapping[str, Tensor],
        empty: Mapping[str, Tensor] | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """The prediction under classifier-free guidance: ``u + scale (c - u)``, ``u`` that of the empty condition.

        Without an empty condition, or with a scale of at most 1, it is the conditional prediction.
        """
        prediction = self.predict(noised, level, condition)
        if empty is None or scale <= 1:
            return prediction
        base = self.predict(noised, level, empty)
        return base + scale * (prediction - base)

    def clean(
        self,
        noised: Tensor,
        level: Tensor,
        condition: Mapping[str, Tensor],
        empty: Mapping[str, Tensor] | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """The estimate of the clean sample (B, C, H, W) that the guided prediction implies."""
        return self.schedule.clean(noised, self.guided(noised, level, condition, empty, scale), level)

    def bottleneck(self, noised: Tensor, level: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Features half way through the model (B, d, h, w): a UNet's middle block, a transformer's middle tokens."""
        return self.net.middle(noised, self.schedule.timestep(level), condition)

    def target(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What `predict` should give."""
        return self.schedule.target(clean, noise, level)


class DenoiserGraph(nn.Module):
    """The export form: latents, the model's own time input and condition fields in, the prediction out.

    Args:
        module: The diffusion model.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._net = [diffusion_net(module)]  # in a list: it is no submodule

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        class_labels: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "pooled_projections": pooled_projections,
            "class_labels": class_labels,
            "time_ids": time_ids,
        }
        condition = {name: value for name, value in given.items() if value is not None}
        net = self._net[0]
        return net.forward(sample, timestep, condition)[:, : net.channels]


def noised_batch(denoiser: Denoiser, clean: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noise a batch at training levels: ``(noised, level, target)``."""
    level = denoiser.schedule.level(uniform)
    return denoiser.schedule.add_noise(clean, noise, level), level, denoiser.target(clean, noise, level)
