"""Backward simulation, noise levels of a range, the few-step sampler's schedule, guidance, the discriminator's head."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.diffusion.denoiser import Denoiser
from compressor.diffusion.discriminators import BottleneckHead, MapHead, make_head
from compressor.diffusion.rollout import backward_simulation, level_between, renoise
from compressor.diffusion.schedules import DiscreteSchedule, FlowSchedule, Schedule
from compressor.errors import RequestError
from compressor.models.model import Model, ModelInfo
from tests.tiny_transformers import NAMES, SIZE, tiny

DDPM = DiscreteSchedule(torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0))
SCHEDULES: list[Schedule] = [FlowSchedule(), DDPM]


def denoiser(name: str) -> tuple[Denoiser, dict[str, Tensor]]:
    made = tiny(name)
    return Denoiser(Model(made.module, ModelInfo("diffusers", name, dict(made.module.config)))), made.condition


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "DiTTransformer2DModel"])
def test_simulated_input_is_the_generators_own_sample_noised_to_the_next_level(name: str) -> None:
    generator, condition = denoiser(name)
    levels = generator.schedule.sampling_level(torch.tensor([999, 749, 499, 249]))
    noises = torch.randn(4, 3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    first, level = backward_simulation(generator, levels, 0, condition, lambda k: noises[k])
    assert torch.equal(first, noises[0])
    assert level.tolist() == [levels[0].item()] * 3

    with torch.no_grad():
        expected = noises[0]
        for k in range(2):
            clean = generator.clean(expected, levels[k].expand(3), condition)
            expected = generator.schedule.add_noise(clean, noises[k + 1], levels[k + 1].expand(3))
    third, level = backward_simulation(generator, levels, 2, condition, lambda k: noises[k])
    assert torch.equal(third, expected)
    assert not third.requires_grad
    assert level.tolist() == [levels[2].item()] * 3


def test_every_sample_may_stop_at_a_call_of_its_own() -> None:
    generator, condition = denoiser("QwenImageTransformer2DModel")
    levels = generator.schedule.sampling_level(torch.tensor([999, 749, 499]))
    noises = torch.randn(3, 3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    mixed, level = backward_simulation(generator, levels, torch.tensor([2, 0, 1]), condition, lambda k: noises[k])
    assert level.tolist() == [levels[2].item(), levels[0].item(), levels[1].item()]
    for row, stop in enumerate((2, 0, 1)):
        alone, _ = backward_simulation(generator, levels, stop, condition, lambda k: noises[k])
        assert torch.equal(mixed[row], alone[row])


def test_levels_of_a_range_include_both_ends() -> None:
    uniform = torch.linspace(0, 1, 100_001)[:-1]
    middle = level_between(DDPM, uniform, 0.02, 0.98)
    assert (middle.min(), middle.max(), len(middle.unique())) == (20, 980, 961)
    assert sorted(level_between(DDPM, uniform).unique().tolist()) == list(range(1000))
    flow = level_between(FlowSchedule(), uniform)
    assert flow.min() == pytest.approx(0.001) and flow.max() == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_renoised_sample_passes_gradients_scaled_by_the_signal(schedule: Schedule) -> None:
    clean = torch.randn(4, 1, 2, 2, requires_grad=True)
    noised, level = renoise(schedule, clean, torch.randn(4, 1, 2, 2), torch.rand(4))
    noised.sum().backward()
    signal, _ = schedule.factors(level, clean.detach())
    assert torch.allclose(clean.grad, signal.expand_as(clean))


def test_few_step_sampler_uses_the_levels_of_the_training_and_the_teachers_shift() -> None:
    places = [999, 749, 499, 249]
    schedule = FlowSchedule(shift=3.0, timestep_scale=1000.0)
    settings, assets = schedule.few_step_sampler(places)
    assert settings["rule"] == "renoise"
    np.testing.assert_allclose(assets["levels"], [1, 0.9, 0.75, 0.5, 0])
    np.testing.assert_allclose(assets["timesteps"], [1000, 900, 750, 500])
    np.testing.assert_allclose(schedule.sampling_level(torch.tensor(places)), assets["levels"][:-1], rtol=1e-6)

    _, assets = DDPM.few_step_sampler(places)
    assert assets["timesteps"].tolist() == DDPM.sampling_level(torch.tensor(places)).tolist() == places
    np.testing.assert_allclose(assets["signal"], [*DDPM.alphas_cumprod[places], 1])


def test_guidance_moves_the_prediction_from_the_empty_condition_and_is_off_at_one() -> None:
    model, condition = denoiser("QwenImageTransformer2DModel")
    empty = {name: torch.zeros_like(value) for name, value in condition.items()}
    noised, level = torch.randn(3, 1, SIZE, SIZE), torch.full((3,), 0.5)
    with torch.no_grad():
        c, u = model.predict(noised, level, condition), model.predict(noised, level, empty)
        assert torch.allclose(model.guided(noised, level, condition, empty, 3.0), u + 3 * (c - u))
        assert torch.equal(model.guided(noised, level, condition, empty, 1.0), c)
        assert torch.equal(model.guided(noised, level, condition, None, 3.0), c)


@pytest.mark.parametrize("name", NAMES)
def test_bottleneck_is_the_map_behind_the_first_half_of_the_blocks(name: str) -> None:
    model, condition = denoiser(name)
    noised, level = torch.randn(3, 1, SIZE, SIZE), model.schedule.level(torch.tensor([0.1, 0.5, 0.9]))
    late = list(model.stack.blocks[2].parameters())
    features = model.bottleneck(noised, level, condition)
    assert features.shape == (3, 32, 4, 4)
    assert all(g is None for g in torch.autograd.grad(features.sum(), late, allow_unused=True))
    head = make_head(features, tokens=True)
    assert isinstance(head, BottleneckHead) and head(features).shape == (3, 1)


def test_tokens_lie_in_the_map_where_their_patches_lie() -> None:
    model, condition = denoiser("DiTTransformer2DModel")
    noised, level = torch.zeros(3, 1, SIZE, SIZE), torch.zeros(3, dtype=torch.long)
    marked = noised.clone()
    marked[:, :, 2:4, 6:8] = 1
    stack = model.stack
    states = [stack.begin(x, level, condition) for x in (noised, marked)]
    changed = (stack.token_map(states[1]) - stack.token_map(states[0])).abs().sum(1)[0]
    assert changed.nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("width", [1, 6, 18, 32, 64, 1536])
def test_head_takes_any_width(width: int) -> None:
    head = BottleneckHead(width)
    assert head(torch.randn(2, width, 4, 6)).shape == (2, 1)
    norm = head.layers[1]
    assert norm.num_channels % norm.num_groups == 0 and math.gcd(norm.num_groups, 32) == norm.num_groups


def test_head_refuses_a_map_of_one_token() -> None:
    with pytest.raises(RequestError, match="at least 2x2, the model makes 1x1"):
        make_head(torch.zeros(1, 8, 1, 1), tokens=True)


@pytest.mark.parametrize(
    ("size", "strided"), [((4, 4), 1), ((8, 8), 1), ((16, 8), 2), ((32, 32), 3), ((2, 2), 1), ((9, 7), 1), ((16, 2), 1)]
)
def test_head_of_a_unet_strides_down_to_four_and_closes_the_map(size: tuple[int, int], strided: int) -> None:
    features = torch.randn(2, 32, *size)
    head = make_head(features, tokens=False)
    assert isinstance(head, MapHead) and head(features).shape == (2, 1)
    convolutions = [layer for layer in head.layers if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.stride for layer in convolutions].count((2, 2)) == strided
    assert convolutions[-1].kernel_size == (1, 1)
