"""What the training engine costs beside a bare PyTorch loop: python benchmarks/training_throughput.py [--rounds 5]

The same models, loss, optimiser, schedule and data twice: a method's phase in the engine (seeded streams, owners and
their checks, loss history, checkpoints), and the shortest loop that a user would write with `DataLoader`. Both run as
processes of their own, in turn, so that neither sees the other's caches or memory; the ratio is that of the medians of
a step, by the clock and by processor time (which another program on the machine disturbs less). Peak memory is the
largest resident size of the process while it trains. The aim: at most 5 % slower, memory within 10 %.

Workloads: ``kd`` (ResNet-50 teacher, small ResNet student, 32x32 scenes) and ``flow`` (the 12-block demo transformer).

Prints a table; results go to ``benchmarks/results/training_throughput.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from compressor.atomic import write_json
from compressor.context import RunContext
from compressor.data.dataset import Dataset
from compressor.diffusion.denoiser import Denoiser
from compressor.methods.classification.kd import KD
from compressor.models.classifier import Classifier
from compressor.models.demos.diffusion import DigitsMMDiT
from compressor.models.spec import load_model_spec
from compressor.profiles.machine import describe_machine
from compressor.tasks.classification import Classification
from compressor.tasks.image_generation import ImageGeneration
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.phase import Phases, Train
from compressor.training.random import Randomness

RESULTS = Path(__file__).parent / "results" / "training_throughput.json"
TEACHER = "timm:resnet50?num_classes=10,in_chans=3"
STUDENT = "timm:resnet18?layers=[1,1,1,1],channels=[16,32,48,64],num_classes=10"
SCENES = "scenes:32?channels=3"
WARM_UP, BATCH = 5, 64
Marks = list[tuple[float, float]]
"""When steps began: the clock, and the processor time that the process had used (both in seconds)."""


def in_engine(phases: Phases, randomness: Randomness) -> Marks:
    """When the engine begins each step of the phases' only training."""
    marks: Marks = []

    def timed() -> Any:
        for phase in phases:
            assert isinstance(phase, Train)
            step = phase.step

            def marking(batches: Any, i: int, step: Any = step) -> Any:
                marks.append((time.perf_counter(), time.process_time()))
                return step(batches, i)

            phase.step = marking
            yield phase

    with tempfile.TemporaryDirectory() as directory:
        alone = Distributed.single("cpu")
        Engine(Path(directory), distributed=alone, randomness=randomness, fingerprint="throughput").run(timed())
    return marks


class Pairs(TorchDataset[tuple[Tensor, int]]):
    """The samples of a set as PyTorch's loader takes them."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        sample = self.dataset[k]
        return torch.from_numpy(sample["image"]), int(sample["label"])


def in_bare_loop(
    steps: int,
    dataset: Dataset,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    parameters: list[torch.nn.Parameter],
    lr: float,
    weight_decay: float,
    clip_norm: float | None,
) -> Marks:
    """When a plain loop begins each step."""
    loader = DataLoader(Pairs(dataset), BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    marks: Marks = []
    for image, label in itertools.islice(_forever(loader), steps):
        marks.append((time.perf_counter(), time.process_time()))
        loss = loss_of(image, label)
        optimizer.zero_grad()
        loss.backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        schedule.step()
    return marks


def _forever(loader: DataLoader[Any]) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


def kd(arm: str, steps: int) -> Marks:
    """Knowledge distillation at temperature 4, without augmentation."""
    task, randomness = Classification({"train": SCENES}, {}), Randomness(0)
    torch.manual_seed(0)
    teacher, student = load_model_spec(TEACHER), load_model_spec(STUDENT)
    teacher.module.eval().requires_grad_(False)
    if arm == "engine":
        students = {"student": lambda: student}
        ctx = RunContext(
            task, {"teacher": [teacher]}, randomness, Distributed.single("cpu"), students=students, name="bench"
        )
        method = KD(KD.Config.model_validate({"steps": steps, "batch": BATCH, "augment": "none"}))
        return in_engine(method.phases(ctx), randomness)
    knows, learns = Classifier(teacher), Classifier(student)
    student.module.train()

    def loss(image: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(knows(image) / 4, 1)
        logits = learns(image)
        soft = F.kl_div(F.log_softmax(logits / 4, 1), target, log_target=True, reduction="batchmean")
        return 0.9 * 16 * soft + 0.1 * F.cross_entropy(logits, label)

    return in_bare_loop(steps, task.dataset(), loss, list(student.module.parameters()), 5e-3, 1e-4, None)


def flow(arm: str, steps: int) -> Marks:
    """Flow matching on the digits."""
    task, randomness, demo = ImageGeneration({"train": "digits"}, {}), Randomness(0), DigitsMMDiT()
    torch.manual_seed(0)
    model = demo.build()
    model.module.train()
    if arm == "engine":
        ctx = RunContext(task, {}, randomness, Distributed.single("cpu"), name="bench")
        return in_engine(demo.phases(model, ctx, steps), randomness)
    denoiser, table = Denoiser(model), task.conditions(model)

    def loss(image: Tensor, label: Tensor) -> Tensor:
        clean, noise = image * 2 - 1, torch.randn(image.shape)
        rows = torch.where(torch.rand(len(label)) < demo.drop, torch.tensor(table.null_row), label)
        level = denoiser.schedule.level(torch.rand(len(label)))
        noised = denoiser.schedule.add_noise(clean, noise, level)
        return (denoiser.predict(noised, level, table(rows)) - (noise - clean)).square().mean()

    return in_bare_loop(steps, task.dataset(), loss, list(model.module.parameters()), 1e-3, 0.01, 1.0)


WORKLOADS: dict[str, Callable[[str, int], Marks]] = {"kd": kd, "flow": flow}


def one_process(workload: str, arm: str, steps: int) -> None:
    """Train, and print the median seconds of a step and the peak memory as JSON."""
    marks = WORKLOADS[workload](arm, steps)
    steps_taken = list(itertools.pairwise(marks[WARM_UP:]))
    wall, processor = (statistics.median(after[k] - before[k] for before, after in steps_taken) for k in (0, 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"wall": wall, "processor": processor, "peak_bytes": peak}))


def compare(workload: str, rounds: int, steps: int) -> dict[str, Any]:
    """Both arms in turn: seconds a step and peak memory of every round, and their ratios."""
    runs: dict[str, list[dict[str, float]]] = {"engine": [], "bare": []}
    for number in range(rounds):
        for arm in ("engine", "bare") if number % 2 else ("bare", "engine"):
            command = [sys.executable, __file__, "--workload", workload, "--arm", arm, "--steps", str(steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[arm].append(json.loads(done.stdout.splitlines()[-1]))
    result: dict[str, Any] = {}
    for clock in ("wall", "processor"):
        spans = {arm: [run[clock] for run in found] for arm, found in runs.items()}
        by_round = [engine / bare for engine, bare in zip(spans["engine"], spans["bare"], strict=True)]
        result[clock] = {
            "milliseconds_a_step": {arm: [round(1000 * x, 3) for x in found] for arm, found in spans.items()},
            "ratio": round(statistics.median(spans["engine"]) / statistics.median(spans["bare"]), 4),
            "ratio_by_round": [round(ratio, 4) for ratio in by_round],
        }
    peaks = {arm: [run["peak_bytes"] for run in found] for arm, found in runs.items()}
    return {
        **result,
        "peak_mebibytes": {arm: [round(x / 2**20, 1) for x in found] for arm, found in peaks.items()},
        "memory_ratio": round(statistics.median(peaks["engine"]) / statistics.median(peaks["bare"]), 4),
    }


def main() -> None:
    """Compare all workloads, print and store; with ``--arm``, be one of the compared processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workload", choices=sorted(WORKLOADS))
    parser.add_argument("--arm", choices=("engine", "bare"))
    asked = parser.parse_args()
    if asked.arm:
        one_process(asked.workload or "kd", asked.arm, asked.steps)
        return
    found = {}
    for name in [asked.workload] if asked.workload else sorted(WORKLOADS):
        found[name] = result = compare(name, asked.rounds, asked.steps)
        for clock in ("wall", "processor"):
            spans, ratios = result[clock]["milliseconds_a_step"], result[clock]["ratio_by_round"]
            engine, bare = (statistics.median(spans[arm]) for arm in ("engine", "bare"))
            print(
                f"{name:5} {clock:9} engine {engine:8.2f} ms a step, bare {bare:8.2f}: ratio "
                f"{result[clock]['ratio']:.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f})"
            )
        print(f"{name:5} memory ratio {result['memory_ratio']:.3f}")
    stored = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine(), "steps": asked.steps, "batch": BATCH}
    write_json(RESULTS, {**stored, "workloads": found})


if __name__ == "__main__":
    main()
