"""A few-step student called with a library's default spacing starts at the clean end and draws noise."""

from __future__ import annotations

import diffusers
import pytest

from compressor.diffusion.schedules import schedule_from_config


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_schedule_that_is_saved_with_a_student_starts_where_the_noise_is(name, steps):
    theirs = getattr(diffusers, name)()
    schedule = schedule_from_config(dict(theirs.config), architecture="UNet2DModel")
    _, assets = schedule.sampler(steps)
    assert len(assets["timesteps"]) == steps and assets["timesteps"][0] == 999
    _, assets = schedule.few_step_sampler([999, 499][:steps])
    assert assets["timesteps"].tolist() == [999, 499][:steps]


def test_default_spacing_of_the_library_starts_at_the_clean_end():
    theirs = diffusers.DDIMScheduler()
    theirs.set_timesteps(1)
    assert theirs.timesteps.tolist() == [0], "the fault is gone there: this file can go too"
