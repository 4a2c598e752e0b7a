"""CNN-ViT collaboration at small scale: python benchmarks/reproduction/cnn_vit_collab.py [--seeds 0 1 2] [--steps 1200]

A DeepLabV3+ on a small ResNet and a small SegFormer (the default recipe's) learn to segment digit scenes of which there
are few (400 by default). Both arms of a seed start from the same weights, see the same batches and take the same steps
with the same optimisers:

- alone:    labels only, each student by itself
- collab:   the whole method: early features, regions and pixels

A run that is stopped goes on where it was, and seeds that are stored for the same steps and scenes are not run again.

The measure is the mIoU on 800 scenes of other digits. The paper claims more for both students; whether that holds here
is written beside the numbers, whatever the answer. Results go to ``benchmarks/results/reproduction.json``.
"""

from __future__ import annotations

import argparse
import json
from statistics import mean
from typing import Any

import torch
from record import RESULTS, record_result

from compressor.cache import cache_directory
from compressor.context import RunContext
from compressor.data.dataset import Dataset, Subset
from compressor.log import Log
from compressor.measurement import quality, torch_driver
from compressor.methods.segmentation.cnn_vit_collab import CnnVitCollab
from compressor.models.model import Model
from compressor.models.spec import load_model_spec
from compressor.recipe import Evaluation
from compressor.tasks.segmentation import Segmentation
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.random import Randomness

RECIPE: Any = CnnVitCollab.default_recipe
ARMS: dict[str, dict[str, float]] = {
    "alone": {"hfd_weight": 0.0, "region_weight": 0.0, "pixel_weight": 0.0},
    "collab": {},
}


class FewScenes(Segmentation):
    """The first ``count`` scenes alone, in training."""

    count = 400

    def dataset(self, role: str = "train", split: str = "train") -> Dataset:
        whole = super().dataset(role, split)
        return Subset(whole, range(self.count)) if split == "train" else whole


def train(arm: str, seed: int, steps: int, task: Segmentation) -> dict[str, float]:
    """mIoU of both students of one arm."""
    torch.manual_seed(seed)
    defaults = task.student_defaults()
    specs = RECIPE["students"].items()
    start = {role: load_model_spec(spec, defaults=defaults, task="segmentation") for role, spec in specs}
    makers: Any = {role: model.copy for role, model in start.items()}
    alone, randomness = Distributed.single(), Randomness(seed)
    ctx = RunContext(task, {}, randomness, alone, students=makers, name="arm")
    config = {**RECIPE["data_config"], "steps": steps, **ARMS[arm]}
    method = CnnVitCollab(CnnVitCollab.Config.model_validate(config))
    mark = f"{arm}-{seed}-{steps}-{len(task.dataset())}"
    directory = cache_directory() / "reproduction" / "cnn-vit-collab" / mark
    Engine(directory, distributed=alone, randomness=randomness, fingerprint=mark).run(method.phases(ctx))
    return {name: miou(model, task) for name, model in method.students().items()}


def miou(model: Model, task: Segmentation) -> float:
    """On the whole test split."""
    model.module.eval()
    return round(quality(task, torch_driver(task.deployable(model)), Evaluation(samples=800), 50)["miou"], 4)


def outcome(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and whether the claims hold."""
    means = {arm: {name: round(mean(r[arm][name] for r in results), 4) for name in ("cnn", "vit")} for arm in ARMS}
    claims = {}
    for name in ("cnn", "vit"):
        gains = [result["collab"][name] - result["alone"][name] for result in results]
        claims[f"the {name} gains at least 1 point of mIoU in the mean"] = mean(gains) >= 0.01
        claims[f"the {name} is better on every seed"] = min(gains) > 0
    return {"miou": means, "claims": claims, "seeds": results}


def stored(steps: int, scenes: int) -> dict[int, dict[str, Any]]:
    """What earlier runs of the same settings found, by seed."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")).get("cnn-vit-collab", {}) if RESULTS.exists() else {}
    same = known.get("steps") == steps and known.get("scenes") == scenes
    return {int(result["seed"]): result for result in known["seeds"]} if same else {}


def main() -> None:
    """Run all seeds, compare, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--scenes", type=int, default=400)
    asked, log = parser.parse_args(), Log()
    task = FewScenes({"train": RECIPE["data"]["train"]}, {})
    task.count = asked.scenes
    for seed in asked.seeds:
        if seed not in stored(asked.steps, asked.scenes):
            result = {"seed": seed, **{arm: train(arm, seed, asked.steps, task) for arm in ARMS}}
            log.say(str(result))
            results = stored(asked.steps, asked.scenes) | {seed: result}
            found = outcome([results[known] for known in sorted(results)])
            record_result("cnn-vit-collab", {"steps": asked.steps, "scenes": asked.scenes, **found})
            log.say(str(found))


if __name__ == "__main__":
    main()
