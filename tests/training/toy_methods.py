"""A toy method that uses everything the engine offers, and a small world to run it in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.data.dataset import ArrayDataset, DataInfo
from compressor.data.stream import Batch, Stream
from compressor.training.averaging import Best, Ema
from compressor.training.curves import cosine
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.phase import Compute, Optim, Phases, Train, Update
from compressor.training.queues import FeatureQueue, RunningMean
from compressor.training.random import Randomness

WIDTH = 4


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


def network(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, WIDTH))


def samples(count: int = 10) -> ArrayDataset:
    values = np.random.default_rng(0).standard_normal((count, WIDTH)).astype(np.float32)
    return ArrayDataset(DataInfo("toy", f"toy-{count}"), {"x": values})


class Toy:
    """A method: a probe, a GAN, two networks and pixels that learn together, a refinement with validation.

    Args:
        distributed: The processes.
        randomness: All randomness.
        batch: Samples of each process.
        dropout: Makes the global generator matter (and results differ between numbers of processes).
        event: Called at many points of every phase.
    """

    def __init__(
        self,
        distributed: Distributed,
        randomness: Randomness,
        batch: int = 4,
        dropout: float = 0.3,
        event: Callable[[], None] = lambda: None,
    ) -> None:
        self.distributed, self.randomness = distributed, randomness
        self.batch, self.dropout, self.event = batch, dropout, event

    def stream(self) -> Stream:
        shard = (self.distributed.rank, self.distributed.processes)
        return Stream(samples(), self.batch, seed=7, shard=shard)

    def phases(self) -> Phases:
        probe = yield Compute("probe", self.probe)
        assert probe is not None
        self.generator, self.critic = network(self.dropout), network()
        self.generator[0].bias.data += probe["shift"].float()
        self.ema, self.queue, self.center = Ema(self.generator, 0.9), FeatureQueue(WIDTH, 11), RunningMean((1, WIDTH))
        yield Train(
            "adversarial",
            5,
            {
                "generator": Optim(self.generator.parameters(), lr=0.01, clip_norm=1.0, schedule=cosine(5, warmup=2)),
                "critic": Optim([{"params": self.critic.parameters(), "lr": 0.02}], kind="adam"),
            },
            {"real": self.stream()},
            self.adversarial,
            {
                "generator": self.generator,
                "critic": self.critic,
                "ema": self.ema,
                "queue": self.queue,
                "center": self.center,
            },
        )
        # Drawn after a phase: must not depend on whether that phase ran or was loaded.
        self.left, self.right = network(self.dropout), network()
        self.pixels = nn.ParameterDict({"image": nn.Parameter(torch.rand(6, WIDTH))})
        self.free = torch.arange(6 * WIDTH).reshape(6, WIDTH) % 3 == 0
        self.start = self.pixels["image"].detach().clone()
        yield Train(
            "together",
            5,
            {
                "left": Optim(self.left.parameters(), lr=0.01),
                "right": Optim(self.right.parameters(), kind="sgd", lr=0.1, options={"momentum": 0.9}),
                "pixels": Optim(
                    self.pixels.parameters(),
                    lr=0.1,
                    options={"weight_decay": 0.1},
                    update_mask=lambda: {self.pixels["image"]: self.free},
                ),
            },
            {"train": self.stream()},
            self.together,
            {"left": self.left, "right": self.right, "pixels": self.pixels},
        )
        frozen = yield Compute("features", lambda: {"target": self.left(probe["points"]).detach()})
        assert frozen is not None
        self.best = Best(self.left)
        yield Train(
            "refine",
            4,
            {"left": Optim(self.left.parameters(), lr=0.05)},
            {"train": self.stream()},
            lambda batch, i: self.refine(batch, i, frozen["target"], probe["points"]),
            {"left": self.left},
            modes=[(self.left, "train"), (self.right, "eval")],
            validate=self.validate,
            validate_every=2,
            keep=self.best,
            carry=("left",),
        )

    def probe(self) -> dict[str, Any]:
        self.event()
        return {
            "points": self.randomness.normal(0, (3, WIDTH), "points"),
            "shift": np.random.standard_normal(8),  # the global generator serves too
            "flags": np.array([True, False]),
            "codes": torch.arange(4)[::2],
        }

    def adversarial(self, batch: dict[str, Batch], i: int) -> Iterator[Update]:
        self.event()
        real = batch["real"]["x"]
        fake = self.generator(self.randomness.normal(i, (self.batch, WIDTH)))
        if i % 2 == 0:
            loss = -self.critic(fake).mean() + 0.1 * (fake - self.queue_mean()).square().mean()
            stepped = yield Update("generator", {"gan": loss})
            self.event()
            if stepped:
                self.ema.update()
        self.queue.push(self.distributed.gather(fake))
        self.center.update(self.distributed.reduce(fake.mean(0, keepdim=True)))
        fake = fake.detach()
        hinge = torch.relu(1 - self.critic(real)).mean() + torch.relu(1 + self.critic(fake)).mean()
        yield Update("critic", {"hinge": hinge})
        self.event()

    def queue_mean(self) -> Tensor:
        return self.queue.keys.mean(0) if self.queue.filled else torch.zeros(WIDTH)

    def together(self, batch: dict[str, Batch], i: int) -> Iterator[Update]:
        self.event()
        x = batch["train"]["x"]
        left, right = self.left(x), self.right(x)
        yield Update(
            ("left", "right"),
            {"left": (left - right.detach() - x).square().mean(), "right": (right + left.detach()).square().mean()},
        )
        self.event()
        noise = self.randomness.normal(i, (self.batch, WIDTH), "pixels")
        for part in range(2):
            shift = self.pixels["image"][3 * part : 3 * part + 3].mean(0)
            # Gradients are held within a step, and over several steps.
            yield Update("pixels", {f"part{part}": (noise - shift).square().mean()}, hold=part == 0 or i % 3 != 2)
        self.event()

    def refine(self, batch: dict[str, Batch], i: int, target: Tensor, points: Tensor) -> Iterator[Update]:
        self.event()
        noise = self.randomness.uniform(i, self.batch)[:, None]
        yield Update("left", {"fit": (self.left(batch["train"]["x"] + noise) - target.mean(0)).square().mean()})
        self.event()

    def validate(self) -> float:
        self.event()
        self.left.eval()
        with torch.no_grad():
            spread = self.left(torch.from_numpy(samples().fields["x"])).square().mean()
        return -abs(float(spread) - 0.4)  # the first of the two validations is the better: what was kept matters

    def result(self) -> dict[str, Tensor]:
        """Every weight and memory that the method leaves, by name."""
        modules = {
            "generator": self.generator,
            "critic": self.critic,
            "ema": self.ema.module,
            "left": self.left,
            "right": self.right,
            "pixels": self.pixels,
        }
        values = {
            f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()
        }
        values |= {"queue": self.queue.keys, "center": self.center.value}
        return {name: value.detach().clone() for name, value in values.items()}


def run_toy(directory: Path, event: Callable[[], None] = lambda: None, **options: Any) -> tuple[Toy, Engine]:
    """Run the toy (or go on with it) in one process or several."""
    distributed = options.pop("distributed", None) or Distributed.single()
    randomness = Randomness(3, distributed.rank, distributed.processes)
    toy_options = {key: options.pop(key) for key in ("batch", "dropout") if key in options}
    toy = Toy(distributed, randomness, event=event, **toy_options)
    options = {"checkpoint_steps": 2, "fingerprint": "toy"} | options
    engine = Engine(directory, distributed=distributed, randomness=randomness, **options)
    engine.run(toy.phases(), "0-toy/")
    return toy, engine


def kill_at(number: int) -> Callable[[], None]:
    """An event handler that kills at its n-th call (counted from 0)."""
    return Countdown(number, Killed)


class Countdown:
    """Counts events; at the wanted one raises (an exception class) or calls (a function)."""

    def __init__(self, number: int, act: Any) -> None:
        self.seen, self._number, self._act = 0, number, act

    def __call__(self) -> None:
        self.seen += 1
        if self.seen == self._number + 1:
            if isinstance(self._act, type):
                raise self._act()
            self._act()


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two results are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def clone(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)
