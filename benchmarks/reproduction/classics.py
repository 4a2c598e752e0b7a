"""The classic distillation methods against training alone: python benchmarks/reproduction/classics.py [--seeds 0 1 2]

A seed has one teacher (``demo:scenes-cnn``, trained once and kept) and one random start of the student. All arms of a
seed start from it and see the same batches of digit scenes, with the same optimiser and number of updates (the default
recipes': AdamW, one-cycle, 600 of batch 64, no augmentation). FitNet's hint stage takes a third of its updates. Every
arm, training alone too, gets the same tuning: of two learning rates (the recipes' and twice that) the one with the best
mean top-1 on other digits (split "val"). The measure is top-1 on a third set of digits (split "test"), 10 scenes of
each.

- alone:       cross-entropy with the labels
- METHOD:      the method with the weights of its default recipe
- METHOD paper: with those of its paper, where the recipe departs from them

Students see the scenes of 100 digits, the teacher was trained on those of all 1,258. That pool was chosen by the gap
between the teacher and the student alone (``--gap-only``), before any method ran; ``gap`` holds it for larger pools,
too. Results go to ``benchmarks/results/reproduction.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from meal_v2 import Arms, FewDigits
from record import record_result

from compressor.data.dataset import ArrayDataset, Dataset
from compressor.data.scenes import scenes
from compressor.log import Log
from compressor.methods.classification.at import AT
from compressor.methods.classification.crd import CRD
from compressor.methods.classification.dist import DIST
from compressor.methods.classification.dkd import DKD
from compressor.methods.classification.fitnet import FitNet
from compressor.methods.classification.kd import KD
from compressor.methods.classification.rkd import RKD
from compressor.models.classifier_loading import load_classifier
from compressor.models.demos.catalogue import demo_model
from compressor.models.model import Model
from compressor.training.distillation import StudentMethod
from compressor.training.supervised import supervised_phase
from compressor.training.training_config import TrainingConfig

STUDENT = "resnet18?layers=[1,1,1,1],channels=[8,12,16,24],num_classes=10,in_chans=1"
LEARNING_RATES = (5e-3, 1e-2)
RECIPE_RATE = LEARNING_RATES[0]
RENDERS = 10
CLASSICS: tuple[type[StudentMethod], ...] = (KD, FitNet, AT, RKD, CRD, DKD, DIST)


@dataclass(frozen=True)
class Arm:
    """One way to train the student: a method and what its keys are, or labels alone."""

    method: type[StudentMethod] | None
    keys: Mapping[str, Any]


def arms_by_name() -> dict[str, Arm]:
    """All arms; the papers' weights are the defaults of the methods' keys."""
    arms = {"alone": Arm(None, {})}
    for method in CLASSICS:
        recipe = dict(method.default_recipe.get("data_config", {}))
        arms[method.name] = Arm(method, recipe)
        if recipe:
            # CRD's 16,384 negatives are a third of its paper's 50,000 images; the recipe's 512 a quarter of 2,000.
            arms[f"{method.name} paper"] = Arm(method, {k: v for k, v in recipe.items() if k == "negatives"})
    return arms


ARMS = arms_by_name()


class KeptScenes(FewDigits):
    """The same with all scenes drawn once, and more of every digit where a student is measured."""

    def __init__(self, digits: int, split: str) -> None:
        super().__init__({"train": "scenes"}, {"split": split})
        self.digits = digits
        self._kept: dict[str, ArrayDataset] = {}

    def dataset(self, role: str = "train", split: str = "train") -> Dataset:
        if split not in self._kept:
            train = split == "train"
            source = super().dataset(role, split) if train else replace(scenes(split), renders=RENDERS)
            samples = [source[index] for index in range(len(source))]
            fields = {name: np.stack([sample[name] for sample in samples]) for name in ("image", "label")}
            self._kept[split] = ArrayDataset(source.info, fields)
        return self._kept[split]


class Students(Arms):
    """What all arms of one seed share; ``task`` measures on the test split."""

    def __init__(self, seed: int, steps: int, digits: int, log: Log) -> None:
        self.seed, self.steps, self.log = seed, steps, log
        self.task, self.val = KeptScenes(digits, "test"), KeptScenes(digits, "val")
        self.teachers = [demo_model(f"scenes-cnn?seed={seed}", log=log)]

    def start(self) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return load_classifier("timm", STUDENT)

    def figures(self, model: Model) -> dict[str, float]:
        return {"val": self.top1(model, self.val), "test": self.top1(model)}

    def train(self, arm: Arm, lr: float) -> dict[str, float]:
        ctx = self.context(self.teachers)
        if arm.method is None:
            model = ctx.student()
            config = TrainingConfig(steps=self.steps, lr=lr)
            self.run(phase for phase in [supervised_phase(ctx, config, model)])
            return self.figures(model)
        keys = {"steps": self.steps, "lr": lr, **arm.keys}
        if arm.method is FitNet:
            hint = self.steps // 3
            keys |= {"steps": self.steps - hint, "hint": {"steps": hint, "lr": lr}}
        method = arm.method(arm.method.Config.model_validate(keys))
        self.run(method.phases(ctx))
        return self.figures(method.student())


class Kept:
    """The figures of finished trainings, kept in a file of JSON lines if one is named."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.figures: dict[str, dict[str, float]] = {}

    def train(self, students: Students, name: str, lr: float) -> dict[str, float]:
        key = f"{name}, seed {students.seed}, lr {lr}, {students.steps} steps, {students.task.digits} digits"
        if self.path is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                self.figures |= json.loads(line)
        if key not in self.figures:
            self.figures[key] = students.train(ARMS[name], lr)
            students.log.say(f"{key}: {self.figures[key]}")
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({key: self.figures[key]}) + "\n")
        return self.figures[key]


def outcome(runs: Mapping[str, Mapping[float, list[dict[str, float]]]]) -> dict[str, Any]:
    """Of every arm the rate with the best mean on val, and with it test's mean, seeds and gains over alone by seed.

    Args:
        runs: By arm and learning rate the figures of every seed.
    """
    result: dict[str, Any] = {}
    for name, rates in runs.items():
        lr = max(rates, key=lambda rate: mean(run["val"] for run in rates[rate]))
        top1 = [run["test"] for run in rates[lr]]
        alone = result["alone"]["seeds"] if result else top1
        gains = [round(mine - theirs, 4) for mine, theirs in zip(top1, alone, strict=True)]
        result[name] = {"lr": lr, "top1": round(mean(top1), 4), "seeds": top1, "gains": gains}
        result[name]["all rates"] = {
            str(rate): {split: [run[split] for run in seeds] for split in ("val", "test")}
            for rate, seeds in rates.items()
        }
    return result


def main() -> None:
    """Measure the gap, run all arms on all seeds, compare, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--digits", type=int, default=100)
    parser.add_argument("--pools", type=int, nargs="+", default=[100, 300, 1258], help="pools whose gap is measured")
    parser.add_argument("--gap-only", action="store_true", help="measure the gap and stop")
    parser.add_argument("--rates", type=float, nargs="+", default=LEARNING_RATES)
    parser.add_argument("--keep", type=Path, help="file of finished trainings, of which a later call makes use")
    asked, log = parser.parse_args(), Log()
    kept = Kept(asked.keep)
    pools = sorted({asked.digits, *asked.pools})
    everyone = {(seed, digits): Students(seed, asked.steps, digits, log) for seed in asked.seeds for digits in pools}
    teachers = [everyone[seed, asked.digits].top1(everyone[seed, asked.digits].teachers[0]) for seed in asked.seeds]
    alone = {
        f"{digits} digits": [kept.train(everyone[seed, digits], "alone", RECIPE_RATE)["test"] for seed in asked.seeds]
        for digits in pools
    }
    measured = {"teacher": teachers, "alone": alone}
    log.say(str(measured))
    if asked.gap_only:
        return
    runs = {
        name: {lr: [kept.train(everyone[seed, asked.digits], name, lr) for seed in asked.seeds] for lr in asked.rates}
        for name in ARMS
    }
    record_result("classics", {"steps": asked.steps, "digits": asked.digits, "gap": measured, "arms": outcome(runs)})


if __name__ == "__main__":
    main()
