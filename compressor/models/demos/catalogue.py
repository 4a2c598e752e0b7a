"""Demo models: small configurations of library classes, trained here once and cached under the hash of their recipe.

`demo:NAME` or `demo:NAME?key=value&key=value`. A demo is trained by the same engine as a method, on the main process
alone, so it is the same model however many processes a run has.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

import torch
from filelock import FileLock, Timeout
from torch import nn

from compressor.cache import cache_directory
from compressor.context import RunContext
from compressor.errors import RequestError, nearest
from compressor.log import Log
from compressor.method import Context
from compressor.models.model import Model, load_model, save_model
from compressor.tasks.task import Task
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.phase import Phases
from compressor.training.random import Randomness

__all__ = ["Demo", "demo", "demo_model", "demo_names", "trained"]

DEMOS = {
    "digits-mmdit": "compressor.models.demos.diffusion:DigitsMMDiT",
    "digits-unet": "compressor.models.demos.diffusion:DigitsUNet",
    "scenes-cnn": "compressor.models.demos.classifiers:ScenesCNN",
    "scenes-cnn-small": "compressor.models.demos.classifiers:ScenesCNNSmall",
    "scenes-segformer": "compressor.models.demos.segmenters:ScenesSegformer",
    "scenes-segmenter": "compressor.models.demos.segmenters:ScenesSegmenter",
    "scenes-vit": "compressor.models.demos.classifiers:ScenesViT",
}
"""Demo classes by name; other packages add theirs through the entry-point group ``compressor.demos``."""

SEED = 20251123
"""All demos are trained from it; a demo that has a ``seed`` of its own adds it (and names it in its fingerprint)."""


class Demo(Protocol):
    """A model and how it is trained."""

    name: str
    task: str
    data: str
    steps: int

    def build(self) -> Any:
        """The untrained `Model`; random weights come from torch's global generator."""
        ...

    def fingerprint(self) -> list[Any]:
        """JSON; everything that decides the weights, but the number of steps."""
        ...

    def phases(self, model: Any, ctx: Context, steps: int) -> Phases: ...


def demo_names() -> list[str]:
    """All demos."""
    return sorted({*DEMOS, *(point.name for point in entry_points(group="compressor.demos"))})


def demo(argument: str) -> Demo:
    """The demo of ``NAME?key=value``, not trained yet.

    Raises:
        RequestError: Unknown name or key.
    """
    name, _, query = argument.partition("?")
    points = {point.name: point.value for point in entry_points(group="compressor.demos")}
    where = (DEMOS | points).get(name)
    if where is None:
        raise RequestError(f"unknown demo model {name!r}: {nearest(name, demo_names())}")
    module, _, attribute = where.partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    options = {key: _number(value) for key, value in parse_qsl(query)}
    known = inspect.signature(factory).parameters
    for key in options:
        if key not in known:
            raise RequestError(f"demo:{argument}: unknown key {key!r}: {nearest(key, known)}")
    made: Demo = factory(**options)
    return made


def demo_model(argument: str, *, budget: float = 1.0, log: Log | None = None, device: str = "cpu") -> Model:
    """A trained demo, from the cache or trained now (and cached)."""
    from compressor.registry import load_task

    chosen = demo(argument)
    task = load_task(chosen.task)({"train": chosen.data}, {})
    directory = trained(chosen, task, save_model, budget=budget, log=log, device=device)
    return load_model(directory)


def trained(
    chosen: Any, task: Task, save: Any, *, budget: float = 1.0, log: Log | None = None, device: str = "cpu"
) -> Path:
    """Train something once: the directory of its saved model in the cache.

    Args:
        chosen: A `Demo`, or a judge of the same shape.
        task: The task over the data that it is trained on.
        save: ``(model, directory)``; the directory must appear whole.
        budget: Factor on its steps.
        log: Where to say so.
        device: Where to train.
    """
    steps = max(1, round(chosen.steps * budget))
    key = [chosen.fingerprint(), steps, SEED, _versions()]
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    directory = cache_directory() / "demos" / f"{chosen.name}-{mark}"
    if (directory / "model").is_dir():
        return directory / "model"
    with _locked(directory, chosen.name, log):
        if not (directory / "model").is_dir():
            if log is not None:
                log.event("demo", f"training {chosen.name} ({steps} steps, once; kept in {directory})")
            _train(chosen, task, save, directory, steps, mark, log, device)
    return directory / "model"


def _train(
    chosen: Any, task: Task, save: Any, directory: Path, steps: int, mark: str, log: Log | None, device: str
) -> None:
    seed = SEED + int(getattr(chosen, "seed", 0))
    distributed, randomness = Distributed.single(device), Randomness(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = chosen.build()
    module: nn.Module = model.module if isinstance(model, Model) else model
    module.to(distributed.device).train()
    ctx = RunContext(task, {}, randomness, distributed, name=chosen.name)
    engine = Engine(
        directory / "checkpoints",
        distributed=distributed,
        randomness=randomness,
        fingerprint=mark,
        log=_events(log, chosen.name),
        progress=log is not None and not log.quiet and sys.stderr.isatty(),
    )
    engine.run(chosen.phases(model, ctx, steps), prefix=f"{chosen.name}/")
    module.eval().cpu()
    save(model, directory / "model")


def _events(log: Log | None, name: str) -> Any:
    if log is None:
        return None

    def forward(event: Mapping[str, Any]) -> None:
        log.event("train", "", model=name, **{key: value for key, value in event.items() if key != "kind"})

    return forward


@contextlib.contextmanager
def _locked(directory: Path, name: str, log: Log | None) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if log is not None:
            log.say(f"waiting for another process that trains {name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _versions() -> dict[str, str]:
    found = {}
    for library in ("torch", "diffusers", "timm", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
