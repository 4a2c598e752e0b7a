"""Random numbers depend on seed, phase, step, tag and place alone."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from compressor.training.random import Randomness


def at(phase: str = "p", seed: int = 1, rank: int = 0, processes: int = 1) -> Randomness:
    randomness = Randomness(seed, rank, processes)
    randomness.phase = phase
    return randomness


def test_rows_of_two_processes_are_those_of_one_with_the_whole_batch() -> None:
    whole = at().normal(5, (6, 2, 3), "noise")
    parts = [at(rank=rank, processes=2).normal(5, (3, 2, 3), "noise") for rank in range(2)]
    assert torch.equal(whole, torch.cat(parts))
    numbers = [at(rank=rank, processes=3).uniform(5, 7, "t") for rank in range(3)]
    assert torch.equal(at().uniform(5, 21, "t"), torch.cat(numbers))


def test_draws_differ_when_anything_they_depend_on_differs() -> None:
    reference = at().normal(0, (2, 50))
    others = [
        at(seed=2).normal(0, (2, 50)),
        at(phase="q").normal(0, (2, 50)),
        at().normal(1, (2, 50)),
        at().normal(0, (2, 50), "tag"),
    ]
    rows = torch.cat([reference, *others])
    assert len(rows.unique(dim=0)) == 10
    assert torch.equal(reference, at().normal(0, (2, 50)))


def test_draws_are_distributed_as_they_should_be() -> None:
    normal, uniform = at().normal(0, (2000, 20)), at().uniform(0, 20000)
    assert normal.dtype == uniform.dtype == torch.float32
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(normal[:-1, 0], normal[1:, 0])[0, 1]) < 0.1


def test_generators_are_equal_on_all_processes_only_when_shared() -> None:
    one, other = at(rank=0, processes=2), at(rank=1, processes=2)
    assert one.seed_of(3, "a") == other.seed_of(3, "a")
    assert one.generator(3, "a", shared=True).initial_seed() == other.generator(3, "a", shared=True).initial_seed()
    assert one.generator(3, "a").initial_seed() != other.generator(3, "a").initial_seed()


def test_seeds_are_the_same_in_every_python_process() -> None:
    code = (
        "from compressor.training.random import Randomness\n"
        "r = Randomness(1); r.phase = 'p'; print(r.seed_of(3, 'a'), r.normal(2, (1, 1)).item())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [str(at().seed_of(3, "a")), str(at().normal(2, (1, 1)).item())]


def test_global_generators_are_seeded_together() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    at().seed_global(4, "step", shared=False, device=torch.device("cpu"))
    first = draw()
    at().seed_global(4, "step", shared=False, device=torch.device("cpu"))
    assert draw() == first
    at().seed_global(5, "step", shared=False, device=torch.device("cpu"))
    assert not set(draw()) & set(first)


@pytest.mark.parametrize("shape", [(0, 3), (2,), (1, 1, 1)])
def test_noise_has_any_shape(shape: tuple[int, ...]) -> None:
    assert at().normal(0, shape).shape == shape


def test_noise_of_a_usual_batch_takes_less_than_two_milliseconds() -> None:
    randomness = at()
    times = []
    for i in range(20):
        started = time.perf_counter()
        randomness.normal(i, (64, 64))
        times.append(time.perf_counter() - started)
    assert min(times) < 2e-3
