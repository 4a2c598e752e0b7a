"""Noise schedules: what a noised sample is, what the network predicts, and how predictions turn into one another.

Two families, one interface. `FlowSchedule` (rectified flow: FLUX, SD3, Qwen-Image) has a continuous level in (0, 1];
`DiscreteSchedule` (DDPM: DiT, PixArt, Stable Diffusion) an integer one. The level is what noising takes;
`timestep` turns it into what the network takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.runtimes.runtime import Array

__all__ = ["DiscreteSchedule", "FlowSchedule", "PredictionType", "Schedule", "schedule_from_config"]

PredictionType = Literal["flow", "epsilon", "v_prediction", "sample"]


class Schedule(Protocol):
    """One noise schedule. All tensors are float32 or wider; ``level`` is ``(B,)``, samples are ``(B, ...)``."""

    @property
    def prediction_type(self) -> PredictionType:
        """What the network predicts."""
        ...

    @property
    def levels(self) -> int:
        """Number of training levels."""
        ...

    def level(self, uniform: Tensor) -> Tensor:
        """Map uniform numbers in [0, 1) to training levels."""
        ...

    def sampling_level(self, place: Tensor) -> Tensor:
        """The level that a sampler uses for the training levels numbered 0 (nearly clean) to ``levels - 1``."""
        ...

    def factors(self, level: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitudes of the clean sample and of the noise, shaped so that they broadcast over the sample."""
        ...

    def timestep(self, level: Tensor) -> Tensor:
        """The network's time input for a level."""
        ...

    def add_noise(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The noised sample x_t."""
        ...

    def target(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What the network should predict."""
        ...

    def clean(self, noised: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        """The estimate of the clean sample that a prediction implies."""
        ...

    def sampler_levels(self, steps: int) -> Tensor:
        """The levels (N,) that a sampler of so many steps calls the network at, the noisiest first."""
        ...

    def sampler(self, steps: int) -> tuple[dict[str, Any], dict[str, Array]]:
        """Settings and assets of the numpy sampler for a number of steps."""
        ...

    def few_step_sampler(self, places: Sequence[int]) -> tuple[dict[str, Any], dict[str, Array]]:
        """The same for a few-step student that is called at these training levels, the noisiest first."""
        ...


def _like(level: Tensor, sample: Tensor) -> Tensor:
    """Give a per-sample value trailing axes so that it broadcasts over the sample."""
    return level.view(-1, *[1] * (sample.dim() - 1))


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow: ``x_t = (1 - s) x_0 + s e``, velocity target ``e - x_0``.

    Args:
        shift: Time shift m of the sampler's levels, ``s -> m s / (1 + (m - 1) s)``; 1 leaves them alone.
        timestep_scale: The network takes ``timestep_scale * s`` (1 for Qwen-Image and FLUX, 1000 for SD3).
        levels: Training levels are uniform on {1/levels, ..., 1}.
    """

    shift: float = 1.0
    timestep_scale: float = 1.0
    levels: int = 1000
    prediction_type: PredictionType = "flow"

    def level(self, uniform: Tensor) -> Tensor:
        return (torch.floor(uniform * self.levels) + 1) / self.levels

    def sampling_level(self, place: Tensor) -> Tensor:
        return self._shifted((place.double() + 1) / self.levels).float()

    def _shifted(self, level: Any) -> Any:
        return self.shift * level / (1 + (self.shift - 1) * level)

    def timestep(self, level: Tensor) -> Tensor:
        return level * self.timestep_scale

    def factors(self, level: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        s = _like(level, sample)
        return 1 - s, s

    def add_noise(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        signal, sigma = self.factors(level, clean)
        return signal * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return noise - clean

    def clean(self, noised: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        return noised - _like(level, noised) * prediction

    def sampler_levels(self, steps: int) -> Tensor:
        return torch.from_numpy(self._shifted(np.linspace(1.0, 0.0, steps + 1))[:-1]).float()

    def sampler(self, steps: int) -> tuple[dict[str, Any], dict[str, Array]]:
        levels = self._shifted(np.linspace(1.0, 0.0, steps + 1))
        assets = {"levels": levels, "timesteps": levels[:-1] * self.timestep_scale}
        return {"rule": "euler"}, assets

    def few_step_sampler(self, places: Sequence[int]) -> tuple[dict[str, Any], dict[str, Array]]:
        levels = self._shifted((np.asarray(places, np.float64) + 1) / self.levels)
        assets = {"levels": np.append(levels, 0.0), "timesteps": levels * self.timestep_scale}
        return {"rule": "renoise", "prediction_type": self.prediction_type}, assets


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """DDPM: ``x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) e`` for integer t; 0 is nearly clean, the last is nearly noise.

    Args:
        alphas_cumprod: ``(T,)`` float64, falling.
        prediction_type: What the network predicts.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType = "epsilon"

    @property
    def levels(self) -> int:
        return len(self.alphas_cumprod)

    def level(self, uniform: Tensor) -> Tensor:
        return torch.floor(uniform * self.levels).long()

    def sampling_level(self, place: Tensor) -> Tensor:
        return place.long()

    def timestep(self, level: Tensor) -> Tensor:
        return level

    def factors(self, level: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod.to(level.device)[level]
        return _like(kept.sqrt(), sample).to(sample.dtype), _like((1 - kept).sqrt(), sample).to(sample.dtype)

    def add_noise(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        signal, sigma = self.factors(level, clean)
        return signal * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        signal, sigma = self.factors(level, clean)
        if self.prediction_type == "epsilon":
            return noise
        return clean if self.prediction_type == "sample" else signal * noise - sigma * clean

    def clean(self, noised: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        # float64: sqrt(ab) is small at the noisy end, and the division magnifies what float32 lost
        wide, guess = noised.double(), prediction.double()
        signal, sigma = self.factors(level, wide)
        if self.prediction_type == "epsilon":
            clean = (wide - sigma * guess) / signal
        else:
            clean = guess if self.prediction_type == "sample" else signal * wide - sigma * guess
        return clean.to(noised.dtype)

    def sampler_levels(self, steps: int) -> Tensor:
        # "trailing" spacing: the first step is the noisiest level, so that one step already starts from noise
        return torch.from_numpy(np.round(np.linspace(self.levels - 1, 0, steps, endpoint=False)).astype(np.int64))

    def sampler(self, steps: int) -> tuple[dict[str, Any], dict[str, Array]]:
        rule = {"rule": "ddim", "prediction_type": self.prediction_type}
        return rule, self._assets(self.sampler_levels(steps).numpy())

    def few_step_sampler(self, places: Sequence[int]) -> tuple[dict[str, Any], dict[str, Array]]:
        assets = self._assets(np.asarray(places, np.int64))
        return {"rule": "renoise", "prediction_type": self.prediction_type}, assets

    def _assets(self, timesteps: Array) -> dict[str, Array]:
        kept = self.alphas_cumprod.cpu().numpy()
        return {"timesteps": timesteps, "signal": np.append(kept[timesteps], 1.0)}


def schedule_from_config(config: dict[str, Any] | None, *, architecture: str) -> Schedule:
    """Build the schedule of a diffusers scheduler configuration, or the default of a model class.

    Args:
        config: ``scheduler_config.json`` of the pipeline, if there is one.
        architecture: The model's class name; decides the default and the unit of the time input.

    Raises:
        ModelError: The scheduler is of a family that has no counterpart here.
    """
    scale = 1.0 if architecture in ("QwenImageTransformer2DModel", "FluxTransformer2DModel") else 1000.0
    flow_classes = ("QwenImageTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel")
    if config is None:
        config = {"_class_name": "FlowMatchEulerDiscreteScheduler" if architecture in flow_classes else "DDPMScheduler"}
    name = str(config.get("_class_name", ""))
    if name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
        return FlowSchedule(float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0), scale)
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(
            f"the scheduler {name} predicts {kind!r}; supported are flow, epsilon, v_prediction and sample"
        )
    return DiscreteSchedule(_alphas_cumprod(config, name), kind)


def _alphas_cumprod(config: dict[str, Any], name: str) -> Tensor:
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        return torch.cumprod(1 - betas, 0)
    count = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":
        edges = torch.cos((torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008 * torch.pi / 2) ** 2
        betas = (1 - edges[1:] / edges[:-1]).clamp(max=0.999)
    else:
        raise ModelError(f"the scheduler {name} has the noise schedule {kind!r}, which is not supported")
    return torch.cumprod(1 - betas, 0)
