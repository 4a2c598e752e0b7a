"""Averages of weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import RequestError
from compressor.training.averaging import Best, Ema, GaussianAverage, Swad, half_life_decay, warming_decay
from compressor.training.checkpoint import pack, unpack


class Point(nn.Module):
    """One weight, one floating buffer and a counter, all of the same value."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))
        self.register_buffer("mean", torch.tensor(value))
        self.register_buffer("count", torch.tensor(int(value)))

    def move(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
        self.mean.fill_(value)
        self.count.fill_(int(value))

    def values(self) -> list[float]:
        return [self.weight.item(), self.mean.item(), self.count.item()]


def reload(state: Any) -> Any:
    """A state after a visit to the disk."""
    return unpack(*pack(state))


@pytest.mark.parametrize("buffers", [True, False])
def test_ema_averages_weights_and_buffers_as_asked(buffers: bool) -> None:
    point = Point(0.0)
    ema = Ema(point, 0.75, buffers=buffers)
    point.move(4.0)
    ema.update()
    assert ema.module.values() == [1.0, 1.0 if buffers else 4.0, 4]
    ema.update()
    assert ema.module.values() == [1.75, 1.75 if buffers else 4.0, 4]
    assert not ema.module.training and not ema.module.weight.requires_grad
    assert point.values() == [4, 4, 4] and point.weight.requires_grad


def test_ema_goes_on_from_its_state_with_the_decay_of_its_updates() -> None:
    point = Point(0.0)
    ema = Ema(point, lambda updates: [0.0, 0.5, 1.0][updates])
    twin = Ema(point, lambda updates: [0.0, 0.5, 1.0][updates])
    point.move(2.0)
    ema.update()
    twin.load_state_dict(reload(ema.state_dict()))
    point.move(4.0)
    for average in (ema, twin):
        average.update()
        assert average.module.values()[:2] == [3.0, 3.0]
        average.update()
        assert average.module.values()[:2] == [3.0, 3.0]


def test_decays_warm_up() -> None:
    assert warming_decay(0.999)(0) == 0.1 and warming_decay(0.999)(10**6) == 0.999
    assert half_life_decay(1000, batch=100, rampup=None)(0) == pytest.approx(0.5**0.1)
    assert half_life_decay(1000, batch=100)(0) == 0
    with pytest.raises(RequestError):
        Ema(Point(), 1.5)


def test_best_puts_back_the_weights_of_the_highest_score() -> None:
    point = Point()
    best = Best(point)
    for step, score in enumerate([0.1, 0.7, 0.3, 0.7]):
        point.move(step)
        best.offer(score, step)
    twin = Best(point)
    twin.load_state_dict(reload(best.state_dict()))
    twin.finish()
    assert point.values() == [1, 1, 1] and (twin.score, twin.step) == (0.7, 1)


def test_best_leaves_the_weights_when_nothing_was_offered() -> None:
    point = Point(3.0)
    best = Best(point)
    best.load_state_dict(reload(best.state_dict()))
    best.finish()
    assert point.values() == [3, 3, 3] and best.score == -math.inf


def test_gaussian_average_weighs_epochs_around_its_mean() -> None:
    point = Point()
    average = GaussianAverage(point, mean=2, std=1.0)
    for epoch in (1, 2, 3):
        point.move(10.0 * epoch**2)
        average.offer(0.0, epoch)
        twin = GaussianAverage(point, mean=2, std=1.0)
        twin.load_state_dict(reload(average.state_dict()))
        average = twin
    average.finish()
    side = math.exp(-0.5)
    expected = (10 * side + 40 + 90 * side) / (1 + 2 * side)
    assert point.weight.item() == pytest.approx(expected, rel=1e-6)


def swad(losses: list[float], interrupted: bool = False, **options: Any) -> tuple[Point, Swad]:
    """Two steps between checks; the weights at step k are k."""
    point = Point()
    average = Swad(point, **options)
    for check, loss in enumerate(losses):
        for step in (2 * check, 2 * check + 1):
            point.move(step)
            average.update()
        average.offer(-loss, 2 * check + 1)
        if interrupted:
            twin = Swad(point, **options)
            twin.load_state_dict(reload(average.state_dict()))
            average = twin
    average.finish()
    return point, average


@pytest.mark.parametrize("interrupted", [False, True])
def test_swad_averages_every_step_of_the_valley(interrupted: bool) -> None:
    # The loss is lowest at check 2, stays, then exceeds 1.3 times the mean (1.1) from check 6 on.
    losses = [3.0, 2.0, 1.0, 1.1, 1.2, 1.2, 2.0, 2.0, 2.0]
    point, average = swad(losses, interrupted, converge=3, tolerance=2)
    assert average.threshold == pytest.approx(1.3 * 1.1) and average.ended
    assert point.weight.item() == pytest.approx(sum(range(4, 12)) / 8)  # checks 2 to 5, two steps each


def test_swad_counts_the_waiting_checks_when_training_ends_in_the_valley() -> None:
    point, average = swad([3.0, 2.0, 1.0, 1.1, 1.2, 1.2], converge=3, tolerance=3)
    assert not average.ended
    assert point.weight.item() == pytest.approx(sum(range(4, 12)) / 8)


def test_swad_leaves_the_last_weights_when_the_loss_only_falls() -> None:
    point, average = swad([5.0, 4.0, 3.0, 2.0, 1.0])
    assert average.threshold is None and point.weight.item() == 9
