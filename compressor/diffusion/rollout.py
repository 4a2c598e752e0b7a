"""Roll-outs of few-step generators: the inputs that they meet at inference, and noised copies of what they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compressor.diffusion.denoiser import Denoiser
from compressor.diffusion.schedules import Schedule

__all__ = ["backward_simulation", "level_between", "ode_samples", "renoise"]


@torch.no_grad()
def backward_simulation(
    generator: Denoiser,
    levels: Tensor,
    stop: int | Tensor,
    condition: Mapping[str, Tensor],
    noise: Callable[[int], Tensor],
) -> tuple[Tensor, Tensor]:
    """What a few-step generator gets at its call ``stop``: made by itself, as at inference (DMD2, section 4.5).

    Every call estimates the clean sample, which is noised again to the next level with noise of its own. The first
    input is pure noise, whatever signal the schedule leaves at the noisiest level.

    Args:
        generator: Called as often as the largest ``stop`` says, without gradients.
        levels: ``(N,)``, the levels of its calls, the noisiest first.
        stop: From 0 to N - 1; or (B,) int64, a call of its own for every sample.
        condition: Condition fields (B, ...).
        noise: Standard normal noise (B, C, H, W) by number; 0 is the first input.

    Returns:
        ``(noised (B, C, H, W), level (B,))``.
    """
    noised = reached = noise(0)
    size = len(noised)
    stops = torch.as_tensor(stop, device=noised.device).expand(size)
    for call in range(int(stops.max())):
        clean = generator.clean(noised, levels[call].expand(size), condition)
        noised = generator.schedule.add_noise(clean, noise(call + 1), levels[call + 1].expand(size))
        reached = torch.where((stops > call).view(-1, *[1] * (noised.dim() - 1)), noised, reached)
    return reached, levels[stops]


@torch.no_grad()
def ode_samples(
    teacher: Denoiser,
    noise: Tensor,
    condition: Mapping[str, Tensor],
    steps: int,
    empty: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Where the teacher's probability-flow ODE leads from a noise: Euler for flows, DDIM for discrete schedules.

    Args:
        teacher: Called once a step, twice under guidance.
        noise: (B, C, H, W), standard normal; the noisiest level's sample.
        condition: Condition fields (B, ...).
        steps: Steps of equal length from the noisiest level to the clean sample.
        empty: The empty condition of every sample, for guidance.
        scale: Guidance scale; at most 1 means none.

    Returns:
        Clean samples (B, C, H, W).
    """
    schedule, sample, size = teacher.schedule, noise, len(noise)
    levels = schedule.sampler_levels(steps).to(noise.device)
    for step in range(steps):
        level = levels[step].expand(size)
        clean = teacher.clean(sample, level, condition, empty, scale)
        if step + 1 == steps:
            return clean
        signal, sigma = schedule.factors(level, sample)
        sample = schedule.add_noise(clean, (sample - signal * clean) / sigma, levels[step + 1].expand(size))
    return sample


def level_between(schedule: Schedule, uniform: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Training levels drawn uniformly from a part of them, both ends included.

    Args:
        schedule: Has T levels.
        uniform: (B,) numbers in [0, 1).
        low: Share of the levels, from the clean end, below which none is drawn.
        high: The share above which none is drawn: 0.02 and 0.98 give the timesteps 20 to 980 of 1000.

    Returns:
        ``(B,)``.
    """
    count = schedule.levels
    first, last = round(low * count), min(round(high * count), count - 1)
    place = first + torch.floor(uniform * (last - first + 1))
    return schedule.level((place + 0.5) / count)


def renoise(
    schedule: Schedule, clean: Tensor, noise: Tensor, uniform: Tensor, low: float = 0.0, high: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Noise samples at levels drawn by `level_between`: ``(noised, level)``; gradients flow to ``clean``."""
    level = level_between(schedule, uniform, low, high)
    return schedule.add_noise(clean, noise, level), level
