"""Noise schedules: noising, targets and estimates fit together, and the sampler's assets start at the noisy end."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.diffusion.schedules import DiscreteSchedule, FlowSchedule, Schedule, schedule_from_config
from compressor.errors import ModelError

BETAS = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
SCHEDULES = {
    "flow": FlowSchedule(),
    "epsilon": DiscreteSchedule(torch.cumprod(1 - BETAS, 0)),
    "v_prediction": DiscreteSchedule(torch.cumprod(1 - BETAS, 0), "v_prediction"),
    "sample": DiscreteSchedule(torch.cumprod(1 - BETAS, 0), "sample"),
}


def draw() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_true_target_gives_the_clean_sample_back(name: str) -> None:
    schedule, (clean, noise) = SCHEDULES[name], draw()
    level = schedule.level(torch.tensor([0.0, 0.3, 0.6, 0.9, 0.999]))
    noised = schedule.add_noise(clean, noise, level)
    estimate = schedule.clean(noised, schedule.target(clean, noise, level), level)
    assert torch.allclose(estimate, clean, atol=2e-3)


def test_flow_levels_are_the_thousandths_up_to_one() -> None:
    level = FlowSchedule().level(torch.tensor([0.0, 0.9999]))
    assert torch.allclose(level, torch.tensor([0.001, 1.0]))
    assert torch.equal(FlowSchedule(timestep_scale=1000).timestep(level), level * 1000)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noising_equals_diffusers(kind: str) -> None:
    theirs = diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    ours = schedule_from_config(dict(theirs.config), architecture="UNet2DConditionModel")
    clean, noise = draw()
    level = torch.tensor([0, 100, 500, 900, 999])
    assert torch.allclose(ours.add_noise(clean, noise, level), theirs.add_noise(clean, noise, level), atol=1e-6)
    wanted = noise if kind == "epsilon" else theirs.get_velocity(clean, noise, level)
    assert torch.allclose(ours.target(clean, noise, level), wanted, atol=1e-5)


def test_cosine_schedule_equals_diffusers() -> None:
    theirs = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    ours = schedule_from_config(dict(theirs.config), architecture="DiTTransformer2DModel")
    assert isinstance(ours, DiscreteSchedule)
    assert torch.allclose(ours.alphas_cumprod.float(), theirs.alphas_cumprod, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("name", SCHEDULES)
def test_sampler_starts_at_the_noisiest_level_and_ends_clean(name: str, steps: int) -> None:
    settings, assets = SCHEDULES[name].sampler(steps)
    assert len(assets["timesteps"]) == steps
    if name == "flow":
        assert settings["rule"] == "euler"
        assert assets["levels"][0] == 1 and assets["levels"][-1] == 0
    else:
        assert assets["timesteps"][0] == 999
        assert assets["signal"][-1] == 1
    assert np.all(np.diff(assets["timesteps"]) < 0)


@pytest.mark.parametrize(
    ("architecture", "kind", "scale"),
    [
        ("QwenImageTransformer2DModel", FlowSchedule, 1.0),
        ("FluxTransformer2DModel", FlowSchedule, 1.0),
        ("SD3Transformer2DModel", FlowSchedule, 1000.0),
        ("DiTTransformer2DModel", DiscreteSchedule, None),
    ],
)
def test_class_without_a_scheduler_gets_the_one_it_was_made_for(
    architecture: str, kind: type[Schedule], scale: float | None
) -> None:
    schedule = schedule_from_config(None, architecture=architecture)
    assert isinstance(schedule, kind)
    if isinstance(schedule, FlowSchedule):
        assert schedule.timestep_scale == scale


def test_shift_of_the_pipelines_scheduler_bends_the_sampling_levels() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"}  # which the file has, and the object leaves out
    config |= dict(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    _, assets = schedule_from_config(config, architecture="SD3Transformer2DModel").sampler(2)
    assert np.allclose(assets["levels"], [1, 0.75, 0])


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ModelError, match="predicts 'score'; supported are flow, epsilon"):
        schedule_from_config({"_class_name": "X", "prediction_type": "score"}, architecture="UNet2DModel")
