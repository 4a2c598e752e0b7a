"""What keeping teacher outputs saves: python benchmarks/teacher_cache.py [--teacher timm:resnet50] [--steps 60]

The same KD training of a small student three times: with the teacher asked in every step, with its outputs written
while it runs (the first epoch of a run), and with outputs that are read back (every later epoch, every later run). The
weights at the end must have the same bits. Prints a table; results go to ``benchmarks/results/teacher_cache.json``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from compressor.atomic import write_json
from compressor.context import RunContext
from compressor.methods.classification.kd import KD
from compressor.models.model import Model
from compressor.models.spec import load_model_spec
from compressor.profiles.machine import describe_machine
from compressor.tasks.classification import Classification
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.random import Randomness

RESULTS = Path(__file__).parent / "results" / "teacher_cache.json"
STUDENT = "timm:resnet18?layers=[1,1,1,1],channels=[16,32,48,64],num_classes=10"


def train(task: Classification, teacher: Model, steps: int, batch: int, cache: bool) -> tuple[dict[str, Any], float]:
    """Weights at the end, and the median seconds of a step after the first five."""
    randomness, alone, marks = Randomness(0), Distributed.single("cpu"), []
    students = {"student": lambda: load_model_spec(STUDENT)}
    ctx = RunContext(task, {"teacher": [teacher]}, randomness, alone, students=students, name="benchmark")
    config = KD.Config.model_validate({"steps": steps, "batch": batch, "cache_teacher": cache})
    method = KD(config)

    def timed() -> Any:
        for phase in method.phases(ctx):
            step = phase.step  # type: ignore[union-attr]

            def marking(batches: Any, i: int, step: Any = step) -> Any:
                marks.append(time.perf_counter())
                return step(batches, i)

            phase.step = marking  # type: ignore[union-attr]
            yield phase

    with tempfile.TemporaryDirectory() as directory:
        Engine(Path(directory), distributed=alone, randomness=randomness, fingerprint="x").run(timed())
    spans = [after - before for before, after in itertools.pairwise(marks[5:])]
    return method.student().module.state_dict(), statistics.median(spans)


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="timm:resnet50?num_classes=10")
    parser.add_argument("--data", default="scenes:32?channels=3")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    asked = parser.parse_args()
    task = Classification({"train": asked.data}, {})
    torch.manual_seed(0)
    teacher = load_model_spec(asked.teacher)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["COMPRESSOR_CACHE"] = directory
        outcomes = {
            name: train(task, teacher, asked.steps, asked.batch, cache)
            for name, cache in (("asked", False), ("written", True), ("read", True))
        }
    weights = [weights for weights, _ in outcomes.values()]
    equal = all(torch.equal(one[key], weights[0][key]) for one in weights for key in one)
    seconds = {name: round(span, 5) for name, (_, span) in outcomes.items()}
    speed_up = round(seconds["asked"] / seconds["read"], 2)
    for name, span in seconds.items():
        print(f"{name:8} {1000 * span:8.1f} ms a step")
    print(f"speed-up {speed_up}, same bits: {equal}")
    write_json(
        RESULTS,
        {
            "date": time.strftime("%Y-%m-%d"),
            "machine": describe_machine(),
            "teacher": asked.teacher,
            "student": STUDENT,
            "data": asked.data,
            "batch": asked.batch,
            "seconds_a_step": seconds,
            "speed_up": speed_up,
            "same_bits": equal,
        },
    )


if __name__ == "__main__":
    main()
