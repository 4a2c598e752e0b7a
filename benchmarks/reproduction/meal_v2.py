"""MEAL V2's claims at small scale: python benchmarks/reproduction/meal_v2.py [--seeds 0 1 2] [--digits 100 300]

Two demo teachers and one briefly trained student a seed. All arms start from the same student and see the same batches
of scenes of few digits (100, then 300), which hard labels over-fit; same optimiser (AdamW 3e-3, one-cycle), same steps:

- labels:       cross-entropy with the labels, weight decay 1e-4
- soft labels:  the mean softmax of both teachers, no weight decay
- meal-v2:      the same with the joint discriminator
- adversarial:  the same with the discriminator as an adversary
- one teacher:  meal-v2 with the first teacher alone

The measure is top-1 on scenes of other digits. Whether the claims hold is written beside the numbers, whatever the
answer. Results go to ``benchmarks/results/reproduction.json``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from record import record_result

from compressor.context import RunContext
from compressor.data.dataset import Dataset, Subset
from compressor.data.scenes import scenes
from compressor.log import Log
from compressor.measurement import quality, torch_driver
from compressor.methods.classification.meal_v2 import MealV2
from compressor.models.demos.catalogue import demo_model
from compressor.models.model import Model
from compressor.recipe import Evaluation
from compressor.tasks.classification import Classification
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.random import Randomness
from compressor.training.supervised import supervised_phase
from compressor.training.training_config import TrainingConfig

TRAINING: dict[str, Any] = {"optimizer": "adamw", "lr": 3e-3, "schedule": "one-cycle", "batch": 64}
ARMS: dict[str, dict[str, Any]] = {
    "soft labels": {"discriminator": "off"},
    "meal-v2": {"discriminator": "joint"},
    "adversarial": {"discriminator": "adversarial"},
    "one teacher": {"discriminator": "joint"},
}


class FewDigits(Classification):
    """The scenes of the first ``digits`` digits alone, in training."""

    digits = 100

    def dataset(self, role: str = "train", split: str = "train") -> Dataset:
        if split != "train":
            return super().dataset(role, split)
        whole = scenes("train")
        count = len(whole.masks)
        return Subset(whole, [digit + count * k for k in range(whole.renders) for digit in range(self.digits)])


class Arms:
    """What all arms of one seed share."""

    def __init__(self, seed: int, steps: int, task: Classification, log: Log) -> None:
        self.seed, self.steps, self.task, self.log = seed, steps, task, log
        self.teachers = [demo_model(f"scenes-cnn?seed={2 * seed + k}", log=log) for k in range(2)]

    def start(self) -> Model:
        return demo_model(f"scenes-cnn-small?seed={self.seed}", log=self.log)

    def top1(self, model: Model, task: Classification | None = None) -> float:
        task = task or self.task
        model.module.eval()
        driver = torch_driver(task.deployable(model))
        return round(quality(task, driver, Evaluation(samples=10_000), 100)["top1"], 4)

    def context(self, teachers: list[Model]) -> RunContext:
        students = {"student": self.start}
        self.randomness = Randomness(self.seed)
        alone = Distributed.single()
        return RunContext(self.task, {"teacher": teachers}, self.randomness, alone, students=students, name="arm")

    def run(self, phases: Any) -> None:
        with tempfile.TemporaryDirectory() as directory:
            alone = Distributed.single()
            Engine(Path(directory), distributed=alone, randomness=self.randomness, fingerprint="arm").run(phases)

    def labels(self) -> float:
        ctx = self.context(self.teachers)
        model = ctx.student()
        config = TrainingConfig(steps=self.steps, weight_decay=1e-4, **TRAINING)
        self.run(phase for phase in [supervised_phase(ctx, config, model)])
        return self.top1(model)

    def meal(self, name: str) -> float:
        ctx = self.context(self.teachers[:1] if name == "one teacher" else self.teachers)
        method = MealV2(MealV2.Config.model_validate({"steps": self.steps, **TRAINING, **ARMS[name]}))
        self.run(method.phases(ctx))
        return self.top1(method.student())


def experiment(seed: int, steps: int, task: Classification, log: Log) -> dict[str, Any]:
    """Top-1 of all arms of one seed."""
    arms = Arms(seed, steps, task, log)
    result: dict[str, Any] = {"seed": seed, "teachers": [arms.top1(teacher) for teacher in arms.teachers]}
    result |= {"start": arms.top1(arms.start()), "labels": arms.labels()}
    result |= {name: arms.meal(name) for name in ARMS}
    log.say(str(result))
    return result


def outcome(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and whether the claims hold."""
    means = {name: round(mean(result[name] for result in results), 4) for name in ("start", "labels", *ARMS)}
    claims = {
        "an ensemble's soft labels with the discriminator beat hard labels by 0.3 points": means["meal-v2"]
        >= means["labels"] + 0.003,
        "the discriminator changes the soft labels' result by less than 1 point": abs(
            means["meal-v2"] - means["soft labels"]
        )
        < 0.01,
        "an ensemble beats one teacher": means["meal-v2"] > means["one teacher"],
    }
    return {"top1": means, "claims": claims, "seeds": results}


def main() -> None:
    """Run all seeds on pools of both sizes, compare, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--digits", type=int, nargs="+", default=[100, 300])
    asked, log = parser.parse_args(), Log()
    outcomes = {}
    for digits in asked.digits:
        task = FewDigits({"train": "scenes"}, {})
        task.digits = digits
        outcomes[f"{digits} digits"] = outcome([experiment(seed, asked.steps, task, log) for seed in asked.seeds])
        log.say(f"{digits} digits: {outcomes[f'{digits} digits']}")
    record_result("meal-v2", {"steps": asked.steps, **outcomes})


if __name__ == "__main__":
    main()
