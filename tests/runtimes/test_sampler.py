"""The sampler loop, with graphs whose answers are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from compressor.diffusion.schedules import DiscreteSchedule, FlowSchedule
from compressor.errors import RequestError
from compressor.runtimes.drivers.sampler import Sampler
from compressor.runtimes.runtime import Array

SHAPE = [1, 4, 4]
MEANS = np.array([[-1.0], [2.0], [0.5]], np.float32)
ALPHAS = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0)


class PointData:
    """The exact denoiser of data that sit at one point a class."""

    def __init__(self, kind: str) -> None:
        self.kind, self.calls = kind, 0

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.calls += 1
        sample, time = inputs["sample"].astype(np.float64), inputs["timestep"].astype(np.float64)
        clean = inputs["mean"].reshape(-1, 1, 1, 1)
        if self.kind == "flow":
            level = np.maximum(time, 1e-3).reshape(-1, 1, 1, 1)
            return {"prediction": (sample - clean) / level}
        kept = ALPHAS.numpy()[time.astype(int)].reshape(-1, 1, 1, 1)
        noise = (sample - kept**0.5 * clean) / (1 - kept) ** 0.5
        return {"prediction": noise if self.kind == "epsilon" else kept**0.5 * noise - (1 - kept) ** 0.5 * clean}


def sampler(kind: str = "flow", steps: int = 4, **settings: Any) -> tuple[Sampler, PointData]:
    schedule = FlowSchedule() if kind == "flow" else DiscreteSchedule(ALPHAS, kind)  # type: ignore[arg-type]
    rule, assets = schedule.sampler(steps)
    graph = PointData(kind)
    chosen = {**rule, "prediction_type": kind, "shape": SHAPE, "null_row": 2, **settings}
    return Sampler({"denoiser": graph}, chosen, {**assets, "condition.mean": MEANS}), graph


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("rule", [None, "renoise"])
def test_exact_denoiser_is_sampled_exactly(kind: str, steps: int, rule: str | None) -> None:
    driver, graph = sampler(kind, steps, **({} if rule is None else {"rule": rule}))
    image = driver({"label": np.array([0, 1, 1])}, seed=3)["image"]
    assert image.dtype == np.float32 and image.shape == (3, *SHAPE)
    assert np.allclose(image.mean((1, 2, 3)), [-1, 2, 2], atol=1e-3)
    assert graph.calls == steps


def test_seed_decides_the_noise_and_given_noise_replaces_it() -> None:
    driver, _ = sampler(steps=1, rule="euler")
    seen: list[Array] = []
    driver.denoiser = lambda inputs: (seen.append(inputs["sample"]), {"prediction": np.zeros_like(inputs["sample"])})[1]
    label = np.array([0])
    driver({"label": label}, seed=1)
    driver({"label": label}, seed=1)
    driver({"label": label}, seed=2)
    assert np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[0], seen[2])
    noise = np.ones((1, *SHAPE), np.float32)
    assert np.array_equal(driver({"label": label, "noise": noise})["image"], noise)


def test_guidance_moves_away_from_the_empty_condition() -> None:
    driver, graph = sampler(guidance_scale=2.0)
    image = driver({"label": np.array([0, 1])})["image"]
    assert np.allclose(image.mean((1, 2, 3)), [0.5 + 2 * -1.5, 0.5 + 2 * 1.5], atol=1e-3)
    assert graph.calls == 8


def test_condition_fields_may_be_given_instead_of_rows() -> None:
    driver, _ = sampler()
    image = driver({"mean": np.array([[7.0]], np.float32)})["image"]
    assert np.allclose(image, 7, atol=1e-2)


def test_clip_limits_the_final_sample_only() -> None:
    driver, _ = sampler(clip=1.0)
    assert driver({"label": np.array([1])})["image"].max() == 1


def test_ddim_equals_diffusers_when_spaced_alike() -> None:
    torch.manual_seed(0)
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(5)
    net = torch.nn.Conv2d(1, 1, 3, padding=1)
    noise = torch.randn(2, *SHAPE)
    sample = noise
    with torch.no_grad():
        for step in theirs.timesteps:
            sample = theirs.step(net(sample), step, sample).prev_sample
    driver, _ = sampler("epsilon", 5)
    driver.timesteps = theirs.timesteps.numpy()
    kept = np.append(ALPHAS.numpy()[driver.timesteps], 1.0)
    driver.signal, driver.sigma = kept**0.5, (1 - kept) ** 0.5
    with torch.no_grad():
        driver.denoiser = lambda inputs: {"prediction": net(torch.from_numpy(inputs["sample"])).numpy()}
        ours = driver({"label": np.array([0, 1]), "noise": noise.numpy()})["image"]
    assert np.allclose(ours, sample.numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        ({"label": np.array([3])}, {}, r"condition rows must lie in \[0, 3\), got 3 to 3"),
        ({}, {}, "give `label` rows or the condition fields mean"),
        ({"label": np.array([0])}, {"guidance_scale": 2.0, "null_row": None}, "without one"),
    ],
)
def test_wrong_request_is_refused(inputs: dict[str, Array], settings: dict[str, Any], message: str) -> None:
    driver, _ = sampler(**settings)
    with pytest.raises(RequestError, match=message):
        driver(inputs)
