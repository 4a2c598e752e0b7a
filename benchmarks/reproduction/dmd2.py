"""DMD2's claims at small scale: python benchmarks/reproduction/dmd2.py [--seeds 0 1 2] [--updates 200]

The teacher is the demo `digits-unet`, the same for all seeds. One-step students, 200 updates of the generator each, of
batches of 32:

- a: the teacher itself in one step
- b: distribution matching, one update of the fake score for one of the generator
- c: the same, five updates of the fake score for one of the generator (the two time scales)
- d: c with the GAN loss

And students of four steps, trained as c:

- simulated: on the generator's own intermediate samples (backward simulation)
- noised:    on noised real images, which the generator does not see at inference

The measure is the Fréchet distance of 1,000 samples, of the last weights ("raw") and of their average. Whether the
claims hold is written beside the numbers, whatever the answer. Results go to ``benchmarks/results/reproduction.json``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from record import record_result
from torch import Tensor

from compressor.context import RunContext
from compressor.log import Log
from compressor.measurement import quality, torch_driver
from compressor.methods.generation.dmd2 import DMD2, DMD2Config
from compressor.models.demos.catalogue import demo_model
from compressor.models.demos.judges import judge_of
from compressor.models.model import Model
from compressor.recipe import Evaluation
from compressor.tasks.image_generation import ImageGeneration
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.random import Randomness

TRAINING: dict[str, Any] = {"batch": 32, "betas": (0.0, 0.999), "ema": 0.95, "gan_weight": 0.02, "head_weight": 0.1}
RATES: dict[str, Any] = {"lr": 1e-4, "fake_lr": 2e-4, "warmup": 0}
ARMS: dict[str, dict[str, Any]] = {
    "b": {"num_steps": 1, "fake_updates": 1},
    "c": {"num_steps": 1, "fake_updates": 5},
    "d": {"num_steps": 1, "fake_updates": 5, "gan": True},
    "simulated": {"num_steps": 4, "fake_updates": 5},
    "noised": {"num_steps": 4, "fake_updates": 5},
}


class NoisedImages(DMD2):
    """The baseline without backward simulation: the generator's inputs are noised real images."""

    def _generate(self, condition: Mapping[str, Tensor], i: int) -> Tensor:
        batch = self._ctx.stream("train", self.config.batch, view=self._view, tag="noised")[i]
        stop = int(torch.randint(len(self._levels), (), generator=self._ctx.rng(i, "stop", shared=True)))
        level, noise = self._levels[stop].expand(self.config.batch), self._noise(i, "call-0")
        # the first call starts from noise at inference too
        noised = noise if stop == 0 else self._generator.schedule.add_noise(batch["image"], noise, level)
        return self._generator.clean(noised, level, self._table(batch["label"]))

    def _rows(self, batches: Mapping[str, Any], i: int) -> Tensor:
        rows: Tensor = self._ctx.stream("train", self.config.batch, view=self._view, tag="noised")[i]["label"]
        return rows


class Bench:
    """What all arms share."""

    def __init__(self, updates: int, samples: int, log: Log) -> None:
        self.updates, self.samples, self.log = updates, samples, log
        self.judge = judge_of(ImageGeneration({"train": "digits"}, {}), log=log)
        self.teacher = demo_model("digits-unet", log=log)

    def task(self, steps: int = 20) -> ImageGeneration:
        task = ImageGeneration({"train": "digits"}, {"num_inference_steps": steps})
        task.judge = self.judge
        return task

    def figures(self, model: Model, steps: int = 20) -> dict[str, float]:
        task = self.task(steps)
        driver = torch_driver(task.deployable(model))
        return quality(task, driver, Evaluation(samples=self.samples), 100)

    def train(self, name: str, seed: int) -> dict[str, Any]:
        """One arm: the figures of its average and of its last weights, and how long it took."""
        arm = dict(ARMS[name])
        stages = {"match": {"steps": 0, **RATES}, "adversarial": {"steps": 0, **RATES}}
        stages["adversarial" if arm.pop("gan", False) else "match"]["steps"] = self.updates * arm["fake_updates"]
        kind = NoisedImages if name == "noised" else DMD2
        method = kind(DMD2Config.model_validate({**TRAINING, **arm, **stages}))
        alone, randomness = Distributed.single(), Randomness(seed)
        ctx = RunContext(self.task(), {"teacher": [self.teacher]}, randomness, alone, name="reproduction")
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            Engine(Path(directory), distributed=alone, randomness=randomness, fingerprint=name).run(method.phases(ctx))
        seconds = time.monotonic() - started
        student = method.student()
        raw = self.figures(replace(student, module=method._generator.module))
        return {"average": self.figures(student), "raw": raw, "seconds": round(seconds)}


def judge_claims(teacher: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of the averages' Fréchet distance, and whether the claims hold."""
    distance = {name: mean(result[name]["average"]["frechet_distance"] for result in results) for name in ARMS}
    distance["a"] = teacher["1 steps"]["frechet_distance"]
    diversity = {name: mean(result[name]["average"]["diversity"] for result in results) for name in "bcd"}
    whole = teacher["30 steps"]["diversity"]
    claims = {
        "five fake updates are at least 20% below one": distance["c"] <= 0.8 * distance["b"],
        "five fake updates with the GAN are at least 15% below one without": distance["d"] <= 0.85 * distance["b"],
        "the GAN costs at most 25%": distance["d"] <= 1.25 * distance["c"],
        "every student is below a fifth of the teacher in one step": max(distance[n] for n in "bcd")
        < 0.2 * distance["a"],
        "diversity is at least 90% of the teacher's in 30 steps": min(diversity.values()) >= 0.9 * whole,
        "backward simulation is at least 10% below noised images": distance["simulated"] <= 0.9 * distance["noised"],
    }
    return {"mean frechet distance": {n: round(d, 3) for n, d in sorted(distance.items())}, "claims": claims}


def main() -> None:
    """Run all seeds, judge the claims, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=200, help="of the generator, in every arm")
    parser.add_argument("--samples", type=int, default=1000)
    asked, log = parser.parse_args(), Log()
    bench = Bench(asked.updates, asked.samples, log)
    teacher = {f"{steps} steps": bench.figures(bench.teacher, steps) for steps in (30, 4, 1)}
    log.say(f"teacher: {teacher}")
    settings = {"updates": asked.updates, "samples": asked.samples, **TRAINING, **RATES}
    results: list[dict[str, Any]] = []
    for seed in asked.seeds:
        result: dict[str, Any] = {"seed": seed}
        for name in ARMS:
            result[name] = bench.train(name, seed)
            log.say(f"seed {seed}: {name}: {result[name]}")
        results.append(result)
        # after every seed, so that an interrupted run leaves those that it has done
        outcome = judge_claims(teacher, results)
        record_result("dmd2", {"settings": settings, **outcome, "teacher": teacher, "seeds": results})
    for claim, holds in outcome["claims"].items():
        log.say(f"{claim}: {'holds' if holds else 'does NOT hold'}")


if __name__ == "__main__":
    main()
