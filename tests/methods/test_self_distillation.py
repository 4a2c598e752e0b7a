"""What `sparsity` and `qat` have in common: they train a changed model against the model as it came."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.errors import RequestError
from compressor.models.spec import load_model_spec
from compressor.training.self_distillation import relative_error
from tests.method_runs import Killed

from .changed_models import SMALL, denoiser, images, run, state_of
from .conftest import TEACHER

METHODS = ("sparsity", "qat")


def test_relative_error_is_one_for_zeros_and_gives_the_wanted_no_gradient() -> None:
    wanted = torch.tensor([3.0, 4.0], requires_grad=True)
    guess = torch.zeros(2, requires_grad=True)
    error = relative_error([guess, wanted * 1], [wanted, wanted])
    assert error.item() == 0.5
    assert torch.autograd.grad(error, [wanted], allow_unused=True)[0].abs().max() == 0


@pytest.mark.parametrize("name", METHODS)
def test_labels_count_when_they_are_given_a_weight(distil: Callable[..., Any], name: str) -> None:
    assert set(distil(name, SMALL[name] | {"data_weight": 0.5}).history["distil"]) == {"match", "cross_entropy"}
    assert set(distil(name, SMALL[name], directory="other").history["distil"]) == {"match"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("extra", "config", "message"),
    [
        ({"student_timesteps": [999]}, {"data_weight": 1.0}, "a few-step generator has no target in the data"),
        ({}, {"augment": "shift"}, "augment, views and data_seed mean nothing for diffusion"),
    ],
)
def test_keys_that_mean_nothing_for_a_generator_are_refused(
    tmp_path: Path, name: str, extra: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=f"{name}: {message}"):
        run(tmp_path, name, SMALL[name] | config, teacher=denoiser(**extra))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["classification", "multi-step", "few-step"])
def test_training_goes_on_to_the_same_bits_after_a_kill(tmp_path: Path, kind: str, name: str) -> None:
    def make(directory: str, kill: tuple[str, int] | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        own = {"student_timesteps": [999, 499]} if kind == "few-step" else {}
        teacher = load_model_spec(TEACHER) if kind == "classification" else denoiser(**own)
        task = images() if kind == "classification" else None
        config = SMALL[name] | {"steps": 4}
        return state_of(run(tmp_path / directory, name, config, task=task, teacher=teacher, kill=kill).student())

    whole = make("whole")
    with pytest.raises(Killed):
        make("killed", kill=("distil", 2))
    resumed, loaded = make("killed"), make("killed")
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]) and torch.equal(value, loaded[key]), key
