"""Curves at the steps that matter."""

from __future__ import annotations

from itertools import pairwise

import pytest

from compressor.errors import RequestError
from compressor.training.curves import (
    between,
    constant,
    cosine,
    linear_decay,
    linear_warmup,
    one_cycle,
    step_decay,
)


def test_warmup_rises_to_one_then_follows_the_next_curve() -> None:
    curve = linear_warmup(4, step_decay([2], 0.5))
    assert [curve(i) for i in range(8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.5, 0.5]
    assert linear_warmup(0)(0) == constant(0) == 1.0


def test_cosine_falls_from_one_to_its_floor_after_the_warmup() -> None:
    curve = cosine(12, warmup=2, floor=0.1)
    assert [curve(0), curve(1), curve(2)] == [0.5, 1.0, 1.0]
    assert curve(7) == pytest.approx(0.55)
    assert curve(12) == curve(100) == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(curve(i) for i in range(2, 14)))


def test_linear_decay_starts_with_the_last_share_of_the_steps() -> None:
    curve = linear_decay(100, share=0.2, floor=0.5)
    assert curve(0) == curve(80) == 1.0
    assert curve(90) == pytest.approx(0.75)
    assert curve(100) == curve(200) == 0.5


def test_one_cycle_rises_and_falls() -> None:
    curve = one_cycle(100, rise=0.25, start=0.1, end=0.01)
    assert [curve(0), curve(25), curve(100)] == pytest.approx([0.1, 1.0, 0.01])
    assert max(range(101), key=curve) == 25


def test_step_decay_multiplies_at_each_milestone() -> None:
    curve = step_decay([3, 5], 0.1)
    assert [curve(i) for i in (2, 3, 4, 5)] == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_between_reaches_its_end_and_stays() -> None:
    assert [between(0.996, 1.0, 10)(i) for i in (0, 5, 10, 20)] == pytest.approx([0.996, 0.998, 1.0, 1.0])
    assert [between(2, 4, 4, shape="linear")(i) for i in (0, 1, 4)] == [2, 2.5, 4]


def test_curves_are_refused_when_they_make_no_sense() -> None:
    for make in (lambda: cosine(-1), lambda: linear_decay(5, share=0), lambda: between(0, 1, 5, shape="log")):
        with pytest.raises(RequestError):
            make()
