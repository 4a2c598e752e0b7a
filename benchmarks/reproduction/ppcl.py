"""PPCL's central claims at small scale: python benchmarks/reproduction/ppcl.py [--seeds 0 1 2]

Teachers are the demo `digits-mmdit`, one a seed. At equal budgets (150 depth steps; 210 steps where all weights train):

- none:        runs cut, their middle blocks kept as they are
- sequential:  the student's own chain, gradients through it
- ppcl:        non-sequential plugs
- finetuned:   ppcl, then 60 steps of fine-tuning
- output:      210 steps of plain output distillation of the cut network
- scratch:     210 steps of flow matching of the same small network from random weights

The measure is the relative velocity error ``sum |v_S - v_T|^2 / sum |v_T|^2`` on held-out noisy digits, for every
subset of active runs, averaged by the subset's size. Whether the claims hold is written beside the numbers, whatever
the answer. Results go to ``benchmarks/results/reproduction.json``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from record import record_result
from torch import Tensor, nn

from compressor.context import RunContext
from compressor.diffusion.denoiser import Denoiser
from compressor.diffusion.noised_data import NoisedData
from compressor.log import Log
from compressor.measurement import measure_latency, quality, torch_driver
from compressor.methods.generation.ppcl import PPCL, PPCLConfig, Stage, align
from compressor.models.anatomy.blocks import block_stack
from compressor.models.demos.catalogue import demo_model
from compressor.models.demos.judges import judge_of
from compressor.models.model import Model
from compressor.models.spec import build_module
from compressor.recipe import Benchmark, Evaluation
from compressor.tasks.image_generation import ImageGeneration
from compressor.training.curves import cosine
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.phase import Optim, Train, Update
from compressor.training.random import Randomness

DEPTH_STEPS, TUNING_STEPS, BATCH, LEARNING_RATE = 150, 60, 64, 5e-4
HELD_OUT = 512


class Bench:
    """One seed: a teacher, its runs, and what is trained of them."""

    def __init__(self, seed: int, task: ImageGeneration, log: Log) -> None:
        self.seed, self.task = seed, task
        self.teacher = Denoiser(demo_model(f"digits-mmdit?seed={seed}", log=log))
        alone = Distributed.single()
        self.randomness = Randomness(seed)
        self.ctx = RunContext(task, {"teacher": [self.teacher.model]}, self.randomness, alone, name="reproduction")
        self.data = NoisedData(self.ctx, self.teacher)
        self.held_out = list(self._held_out())

    def _held_out(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor], Tensor]]:
        """(noised, level, condition, the teacher's velocity) of test digits, the same for all."""
        test = self.task.dataset(split="test")
        generator = torch.Generator().manual_seed(1234 + self.seed)
        for start in range(0, HELD_OUT, BATCH):
            batch = self.task.view([test[k % len(test)] for k in range(start, start + BATCH)])
            uniform = torch.rand(BATCH, generator=generator)
            level = self.teacher.schedule.level(uniform)
            noise = torch.randn(batch["image"].shape, generator=generator)
            noised, condition = (
                self.teacher.schedule.add_noise(batch["image"], noise, level),
                self.data.table(batch["label"]),
            )
            with torch.no_grad():
                yield noised, level, condition, self.teacher(noised, level, condition)

    def engine(self, name: str) -> Engine:
        directory = Path(tempfile.mkdtemp(prefix=f"ppcl-{self.seed}-{name}-"))
        return Engine(directory, distributed=Distributed.single(), randomness=self.randomness, fingerprint=name)

    def train(self, name: str, parameters: Sequence[nn.Parameter], loss: Callable[[Any, int], dict[str, Tensor]],
              state: nn.Module, steps: int) -> None:  # fmt: skip
        """Some steps of AdamW, the same settings for every arm."""

        def step(batches: dict[str, Any], i: int) -> Iterator[Update]:
            yield Update("arm", loss(batches["train"], i))

        def phases() -> Iterator[Train]:
            schedule = cosine(steps, warmup=16)
            options = {"betas": (0.9, 0.95), "weight_decay": 0.02}
            optim = Optim(list(parameters), lr=LEARNING_RATE, schedule=schedule, options=options)
            yield Train("arm", steps, {"arm": optim}, {"train": self.data.stream(BATCH)}, step, {"arm": state})

        self.engine(name).run(phases())  # type: ignore[arg-type]

    # -- arms --

    def ppcl(self) -> PPCL:
        """Probes, runs and plugs as the method makes them, no width and no fine-tuning."""
        stages = {"depth": Stage(steps=DEPTH_STEPS, lr=LEARNING_RATE, batch=BATCH), "finetune": Stage(steps=0, lr=1.0)}
        method = PPCL(PPCLConfig(keep=0.01, **stages))
        self.engine("ppcl").run(method.phases(self.ctx))
        return method

    def fresh_plugs(self, keys: Sequence[str]) -> nn.ModuleDict:
        blocks = self.teacher.stack.blocks
        borders = [tuple(map(int, key.split("-"))) for key in keys]
        chosen = {f"{u}-{v}": copy.deepcopy(blocks[(u + v) // 2]).requires_grad_(True) for u, v in borders}
        return nn.ModuleDict(chosen)

    def sequential(self, keys: Sequence[str]) -> nn.ModuleDict:
        """The baseline: every replacement reads the student's own state, gradients flow through the chain."""
        plugs, stack = self.fresh_plugs(keys), self.teacher.stack
        starts = {int(key.split("-")[0]): key for key in plugs}
        ends = {int(key.split("-")[1]): key for key in plugs}

        def loss(batch: Any, i: int) -> dict[str, Tensor]:
            teacher = student = self.data.begin(batch, i)
            losses, inside = {}, False
            for k, block in enumerate(stack.blocks[: max(ends) + 1]):
                with torch.no_grad():
                    teacher = stack.run(block, teacher)
                if k in starts:
                    student, inside = stack.run(plugs[starts[k]], student), True
                elif not inside:
                    student = stack.run(block, student)
                if k in ends:
                    losses[ends[k]], inside = align(student, teacher), False
            return losses

        self.train("sequential", list(plugs.parameters()), loss, plugs, DEPTH_STEPS)
        return plugs

    def cut(self, plugs: nn.ModuleDict) -> Model:
        """The network with every run replaced."""
        from compressor.models.edits.layout import Slot, slots_of

        borders = [tuple(map(int, key.split("-"))) for key in plugs]
        slots = slots_of(len(self.teacher.stack.blocks), [Slot(u, v, (u + v) // 2, plug=True) for u, v in borders])
        base = self.teacher.model.copy()
        for slot in slots:
            if slot.plug:
                block_stack(base.module).blocks[slot.source].load_state_dict(plugs[slot.key].state_dict())
        return base.edit("blocks.assemble", plan=[slot.plan for slot in slots])

    def tune(self, name: str, model: Model, steps: int, *, teacher: bool, data: bool) -> Model:
        """Train all weights on the teacher's output, on the data, or on both."""
        student = Denoiser(model)

        def loss(batch: Any, i: int) -> dict[str, Tensor]:
            noised, level, target, condition = self.data.sample(batch, i)
            guess, losses = student(noised, level, condition), {}
            if teacher:
                with torch.no_grad():
                    wanted = self.teacher(noised, level, condition)
                losses["teacher"] = (guess - wanted).square().mean()
            if data:
                losses["data"] = (guess - target).square().mean()
            return losses

        self.train(name, list(student.parameters()), loss, model.module, steps)
        return model

    def scratch(self, model: Model) -> Model:
        """The same small network with random weights."""
        torch.manual_seed(self.seed)
        fresh = Model(build_module(model.info), model.info)
        for change in model.info.edits:
            fresh.module = change.apply(fresh.module)
        return fresh

    # -- measures --

    @torch.no_grad()
    def error(self, predict: Callable[..., Tensor]) -> float:
        miss = size = 0.0
        for noised, level, condition, wanted in self.held_out:
            guess = predict(noised, level, condition)
            miss += float((guess - wanted).square().sum())
            size += float(wanted.square().sum())
        return miss / size

    def by_subset_size(self, plugs: nn.ModuleDict) -> list[float]:
        """Mean error over all subsets of active runs, by their size 1..n."""
        return [
            mean(self.error(self.with_active(plugs, active)) for active in itertools.combinations(plugs, size))
            for size in range(1, len(plugs) + 1)
        ]

    def with_active(self, plugs: nn.ModuleDict, active: Sequence[str]) -> Callable[..., Tensor]:
        stack, starts = self.teacher.stack, {int(key.split("-")[0]): key for key in active}

        def predict(noised: Tensor, level: Tensor, condition: dict[str, Tensor]) -> Tensor:
            state, k = stack.begin(noised, self.teacher.schedule.timestep(level), condition), 0
            while k < len(stack.blocks):
                if k in starts:
                    state, k = stack.run(plugs[starts[k]], state), int(starts[k].split("-")[1]) + 1
                else:
                    state, k = stack.run(stack.blocks[k], state), k + 1
            return stack.end(state)

        return predict


def experiment(seed: int, task: ImageGeneration, log: Log) -> dict[str, Any]:
    """All arms of one seed."""
    bench = Bench(seed, task, log)
    method = bench.ppcl()
    keys = list(method._plugs)
    log.say(f"seed {seed}: runs {', '.join(keys)}")
    sequential = bench.sequential(keys)
    cut_blocks = sum(v - u for u, v in (map(int, key.split("-")) for key in keys))
    result: dict[str, Any] = {"seed": seed, "runs": keys, "blocks removed": cut_blocks, "error by active runs": {}}
    arms = {"none": bench.fresh_plugs(keys), "sequential": sequential, "ppcl": method._plugs}
    for name, plugs in arms.items():
        result["error by active runs"][name] = bench.by_subset_size(plugs)
        log.say(f"seed {seed}: {name} {[round(e, 3) for e in result['error by active runs'][name]]}")
    total = DEPTH_STEPS + TUNING_STEPS
    final = {
        "none": bench.cut(arms["none"]),
        "sequential": bench.cut(sequential),
        "ppcl": bench.cut(method._plugs),
        "finetuned": bench.tune("finetune", bench.cut(method._plugs), TUNING_STEPS, teacher=True, data=True),
        "output": bench.tune("output", bench.cut(bench.fresh_plugs(keys)), total, teacher=True, data=False),
        "scratch": bench.tune("scratch", bench.scratch(bench.cut(arms["none"])), total, teacher=False, data=True),
    }
    result["all runs active"] = {}
    for name, model in {"teacher": bench.teacher.model, **final}.items():
        model.module.eval()
        figures = quality(task, torch_driver(task.deployable(model)), Evaluation(samples=500))
        error = bench.error(Denoiser(model))
        result["all runs active"][name] = {"velocity error": error, **figures}
        log.say(f"seed {seed}: {name}: velocity error {error:.3f}, accuracy {figures['accuracy']:.3f}, "
                f"Fréchet distance {figures['frechet_distance']:.2f}")  # fmt: skip
    result["latency ms"] = latency(bench, final["ppcl"], task)
    return result


def latency(bench: Bench, student: Model, task: ImageGeneration) -> dict[str, float]:
    """p50 of one denoiser call of the exported teacher and student, side by side on ONNX Runtime, batch 1."""
    from compressor.exporters.export import export
    from compressor.measurement import LoadedEngine
    from compressor.profiles.target import load_target

    with tempfile.TemporaryDirectory() as folder:
        engines = {}
        for name, model in {"teacher": bench.teacher.model, "student": student}.items():
            export(task.deployable(model), load_target("ort-fp32"), Path(folder) / name)
            engines[name] = LoadedEngine(Path(folder) / name)
        measured = measure_latency(engines, task, Benchmark(batches=[1], seconds=4))
        return {name: measured[name]["latency"]["denoiser"]["1"].p50 for name in engines}


def judge_claims(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether the card's claims hold, over all seeds."""
    claims: dict[str, list[bool]] = {
        name: [] for name in ("1 halves the error", "2 pluggable", "3 monotone", "4 faster")
    }
    for result in results:
        errors = result["error by active runs"]
        claims["1 halves the error"].append(
            all(p <= 0.5 * n for p, n in zip(errors["ppcl"], errors["none"], strict=True))
        )
        claims["2 pluggable"].append(mean(errors["ppcl"][:2]) <= 0.8 * mean(errors["sequential"][:2]))
        claims["3 monotone"].append(all(a < b for a, b in itertools.pairwise(errors["ppcl"])))
        claims["4 faster"].append(result["latency ms"]["student"] < result["latency ms"]["teacher"])
    return {name: {"holds": all(seeds), "seeds": seeds} for name, seeds in claims.items()}


def main() -> None:
    """Run all seeds, judge the claims, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    log, task = Log(), ImageGeneration({"train": "digits"}, {})
    task.judge = judge_of(task, log=log)
    results = [experiment(seed, task, log) for seed in seeds]
    claims = judge_claims(results)
    for name, verdict in claims.items():
        log.say(f"claim {name}: {'holds' if verdict['holds'] else 'does NOT hold'} ({verdict['seeds']})")
    settings = {"depth steps": DEPTH_STEPS, "tuning steps": TUNING_STEPS, "batch": BATCH, "lr": LEARNING_RATE}
    record_result("ppcl", {"settings": settings, "seeds": results, "claims": claims})


if __name__ == "__main__":
    main()
