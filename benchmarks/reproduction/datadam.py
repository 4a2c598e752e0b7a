"""DataDAM's claims at small scale: python benchmarks/reproduction/datadam.py [--seeds 0 1 2] [--per-class 1 5]

scikit-learn's digits at 16x16 pixels, 1,200 to learn from and 597 to measure on, both with equal shares of the classes;
or the data given. Every arm makes as many images of every class, on which three ConvNets (width 32, 3 blocks, instance
norm) are trained from scratch, all alike: 200 steps of SGD, the whole set in a batch, moved by up to two pixels. The
pixels' contrast grows while they are matched in networks of batch norm, which do not see it; students of batch norm,
which keep statistics for the test, would.

- random:     random real images
- k-center:   real images that cover their class
- dm:         distribution matching: the embeddings alone
- datadam:    the same with the attention maps, whose power is the official script's, 1 (the paper's 4 with --power 4)
- whole set:  all real images, in batches of 64; the ceiling

The two that are trained take 120 steps of 32 real images a class, from the random images of the first arm, each with
the learning rate of the pixels that was best for it on a sixth of the training set, with another seed. The measure is
top-1, the mean over three networks a set. Whether the claims hold is written beside the numbers, whatever the answer.
Results go to ``benchmarks/results/reproduction.json``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from record import record_result, stored_result

from compressor.context import RunContext
from compressor.data.dataset import ArrayDataset, DataInfo, Dataset, Subset, labels_of
from compressor.log import Log
from compressor.measurement import quality, torch_driver
from compressor.methods.dataset.datadam import DataDAM, DataDAMConfig
from compressor.models.convnet import convnet_model
from compressor.models.model import Model
from compressor.recipe import Evaluation
from compressor.tasks.classification import Classification
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.random import Randomness, hash_seed
from compressor.training.supervised import supervised_phase
from compressor.training.training_config import TrainingConfig

WIDTH, STUDENTS, TUNING_SEED = 32, 3, 100
RATES = (0.3, 1.0, 3.0, 10.0)
STUDENT: dict[str, Any] = {"steps": 200, "batch": 10_000, "lr": 0.01, "schedule": "constant", "weight_decay": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "random": {"init": "real"},
    "k-center": {"init": "k-center"},
    "dm": {"attention_weight": 0.0},
    "datadam": {},
}
TRAINED = ("dm", "datadam")


def sixteen_pixel_digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All digits, enlarged bilinearly: images (1797, 1, 16, 16) in [0, 1], labels."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy((raw.images / 16).astype(np.float32))[:, None]
    large = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    return large.numpy(), raw.target.astype(np.int64)


class Halves(Classification):
    """The task over a training and a test part; while ``tuning``, a sixth of the training part is what is measured."""

    tuning = False

    def dataset(self, role: str = "train", split: str = "train") -> Dataset:
        whole = self.parts["train"]
        if not self.tuning:
            return self.parts[split]
        order = np.random.default_rng(7).permutation(len(whole))
        held = len(whole) // 6
        return Subset(whole, sorted((order[:held] if split == "test" else order[held:]).tolist()))

    @cached_property
    def parts(self) -> dict[str, Dataset]:
        """Train and test."""
        if self.data["train"] != "digits":
            return {split: super(Halves, self).dataset("train", split) for split in ("train", "test")}
        from sklearn.model_selection import train_test_split

        images, labels = sixteen_pixel_digits()
        train, test = train_test_split(np.arange(len(labels)), train_size=1200, stratify=labels, random_state=0)
        info = DataInfo("digits", "stratified", tuple(map(str, range(10))), images.shape[1:])
        fields = {"train": train, "test": test}
        return {
            split: ArrayDataset(info, {"image": images[chosen], "label": labels[chosen]})
            for split, chosen in fields.items()
        }


class Trial:
    """One seed: arms that share their random start, and students that share their weights."""

    def __init__(self, task: Halves, seed: int, per_class: int, steps: int, power: float) -> None:
        self.task, self.seed, self.per_class, self.steps, self.power = task, seed, per_class, steps, power

    def context(self) -> tuple[RunContext, Randomness]:
        randomness = Randomness(self.seed)
        return RunContext(self.task, {}, randomness, Distributed.single(), name="arm"), randomness

    def run(self, phases: Any, randomness: Randomness) -> None:
        with tempfile.TemporaryDirectory() as directory:
            alone = Distributed.single()
            Engine(Path(directory), distributed=alone, randomness=randomness, fingerprint="arm").run(phases)

    def student(self, k: int, mean: Sequence[float], std: Sequence[float]) -> Model:
        torch.manual_seed(hash_seed(self.seed, "student", k))
        shape = self.task.info.shape
        model = convnet_model(shape[0], shape[1:], self.task.classes, width=WIDTH, norm="instance")
        model.info.extra.update(mean=list(mean), std=list(std))
        return model

    def top1(self, model: Model) -> float:
        model.module.eval()
        driver = torch_driver(self.task.deployable(model))
        return quality(self.task, driver, Evaluation(samples=10_000), 100)["top1"]

    def arm(self, name: str, lr: float | None = None) -> list[float]:
        """Top-1 of every student that was trained on the images of an arm."""
        match = {"steps": self.steps if name in TRAINED else 0, "lr": lr, "batch": 32}
        config: dict[str, Any] = {"images_per_class": self.per_class, "match": match, "power": self.power}
        config |= {"width": WIDTH, "augment": ("crop",)}
        student = STUDENT | {"steps": 0}  # further students are trained below
        method = DataDAM(DataDAMConfig.model_validate({**config, "student": student, **ARMS[name]}))
        ctx, randomness = self.context()
        self.run(method.phases(ctx), randomness)
        method.config = method.config.model_copy(
            update={"student": method.config.student.model_copy(update={"steps": STUDENT["steps"]})}
        )
        scores = []
        for k in range(STUDENTS):
            images = method.images
            model = self.student(k, images.mean.flatten().tolist(), images.std.flatten().tolist())
            phase = method.student_phase(ctx, model, f"student {k}")
            self.run((one for one in [phase]), randomness)
            scores.append(self.top1(model))
        return scores

    def whole_set(self) -> list[float]:
        """Top-1 of students of all real images."""
        some = torch.from_numpy(np.stack([self.task.dataset()[k]["image"] for k in range(500)]))
        mean, std = some.mean(dim=(0, 2, 3)).tolist(), some.std(dim=(0, 2, 3)).tolist()
        scores = []
        config = TrainingConfig.model_validate(STUDENT | {"batch": 64, "optimizer": "sgd", "augment": "shift"})
        for k in range(STUDENTS):
            model, (ctx, randomness) = self.student(k, mean, std), self.context()
            phase = supervised_phase(ctx, config, model, tag=f"student {k}")
            self.run((one for one in [phase]), randomness)
            scores.append(self.top1(model))
        return scores


def best_rates(task: Halves, per_class: int, steps: int, power: float, log: Log) -> dict[str, dict[str, Any]]:
    """For every trained arm the top-1 of all rates on the held-out part, and the best of them."""
    task.tuning = True
    found: dict[str, dict[str, Any]] = {}
    for name in TRAINED:
        trial = Trial(task, TUNING_SEED, per_class, steps, power)
        scores = {rate: round(mean(trial.arm(name, rate)), 4) for rate in RATES}
        best = max(scores, key=lambda rate: scores[rate])
        found[name] = {"lr": best, "held out": {str(rate): score for rate, score in scores.items()}}
        log.say(f"{per_class} a class, {name}: {found[name]}")
    task.tuning = False
    return found


def experiment(
    task: Halves, seeds: Sequence[int], per_class: int, steps: int, power: float, log: Log
) -> dict[str, Any]:
    """Rates, then every arm of every seed."""
    rates = best_rates(task, per_class, steps, power, log)
    results: list[dict[str, Any]] = []
    for seed in seeds:
        trial = Trial(task, seed, per_class, steps, power)
        scores = {name: round(mean(trial.arm(name, rates.get(name, {}).get("lr"))), 4) for name in ARMS}
        results.append({"seed": seed, **scores})
        log.say(str(results[-1]))
    return {"rates": rates, **outcome(results)}


def outcome(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and deviations over the seeds."""
    names = [name for name in results[0] if name != "seed"]
    means = {name: round(mean(result[name] for result in results), 4) for name in names}
    spread = {name: round(stdev(result[name] for result in results), 4) if len(results) > 1 else None for name in names}
    return {"top1": means, "deviation": spread, "seeds": list(results)}


def claims(outcomes: Mapping[int, Mapping[str, Any]]) -> dict[str, bool]:
    """What should hold."""
    found = {}
    for per_class, one in outcomes.items():
        top1 = one["top1"]
        if per_class == 1:
            found["1 a class: datadam beats random images by 10 points"] = top1["datadam"] >= top1["random"] + 0.10
        found[f"{per_class} a class: datadam beats random images"] = top1["datadam"] > top1["random"]
        found[f"{per_class} a class: datadam beats real images that cover their class"] = (
            top1["datadam"] > top1["k-center"]
        )
        spread = max(one["deviation"]["datadam"] or 0, one["deviation"]["dm"] or 0)
        found[f"{per_class} a class: datadam beats distribution matching by more than the deviation of the seeds"] = (
            top1["datadam"] > top1["dm"] + spread
        )
    return found


def main() -> None:
    """Run all seeds for every number of images, compare, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per-class", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--power", type=float, default=1.0)
    parser.add_argument("--data", default="digits", help="data spec of another set")
    asked, log, started = parser.parse_args(), Log(), time.process_time()
    task = Halves({"train": asked.data}, {})
    fewest = np.bincount(labels_of(task.dataset())).min()
    log.say(f"{len(task.dataset())} images to learn from, at least {fewest} a class; {len(task.parts['test'])} to test")
    ceiling = [round(mean(Trial(task, seed, 1, 0, asked.power).whole_set()), 4) for seed in asked.seeds]
    log.say(f"whole set: {ceiling}")
    for per_class in asked.per_class:
        one = experiment(task, asked.seeds, per_class, asked.steps, asked.power, log)
        one["cpu_minutes"] = round((time.process_time() - started) / 60, 1)
        settings = {
            "data": asked.data,
            "steps": asked.steps,
            "power": asked.power,
            "whole set": round(mean(ceiling), 4),
        }
        store(settings, per_class, one, log)


def store(settings: Mapping[str, Any], per_class: int, one: Mapping[str, Any], log: Log) -> None:
    """Put one number of images a class beside the others that were measured with the same settings."""
    stored = stored_result("datadam")
    same = all(stored.get(key) == value for key, value in settings.items())
    outcomes = {int(key.split()[0]): value for key, value in stored.items() if same and key.endswith(" a class")}
    outcomes[per_class] = dict(one)
    found = claims(outcomes)
    log.say(str(found))
    named = {f"{k} a class": outcomes[k] for k in sorted(outcomes)}
    record_result("datadam", {**settings, "claims": found, **named})


if __name__ == "__main__":
    main()
