"""Measure models and engines: quality through the driver, latency side by side, sizes; the entries of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.deployable import Deployable, DriverSpec
from compressor.errors import TargetError
from compressor.evaluate import evaluate
from compressor.models.model import Model
from compressor.profiles.latency import Latency, measure_interleaved, ratio
from compressor.profiles.machine import usable_threads
from compressor.profiles.report import Comparison
from compressor.recipe import Benchmark, Evaluation
from compressor.runtimes.load import driver_class, load_graphs
from compressor.runtimes.manifest import read_assets, read_manifest
from compressor.runtimes.runtime import Array, Driver, Run
from compressor.tasks.task import Task
from compressor.torch_targets import torch_run

__all__ = [
    "Candidate", "LoadedEngine", "TorchEngine", "block_parameters", "calls_per_request", "compare_latency",
    "load_engine", "macs_per_sample", "measure_latency", "quality", "torch_driver",
]  # fmt: skip


def torch_driver(deployable: Deployable) -> Driver:
    """The deployable's driver around its torch modules: the model before its export."""
    return TorchEngine(deployable, {}).driver


def quality(task: Task, driver: Driver, settings: Evaluation, batch: int = 16) -> dict[str, float]:
    """The task's figures of a driver, run in batches of at most ``batch``: use one size for all that is compared."""
    feeds = task.feeds(settings.samples)
    feeds = {name: replace(feed, batch=min(feed.batch, batch)) if feed.run else feed for name, feed in feeds.items()}
    return evaluate(driver, feeds, task.metrics(), seed=settings.seed)


def macs_per_sample(deployable: Deployable) -> int:
    """Multiply-accumulate operations of one call of every graph, per sample."""
    from compressor.profiles.size import macs

    total = 0
    for graph in deployable.graphs.values():
        batch = next(iter(graph.inputs.values())).shape[0]
        parameter = next(graph.module.parameters(), None)  # the module may have moved since it was packed
        place = None if parameter is None else parameter.device
        total += macs(graph.module, {name: value.to(place) for name, value in graph.inputs.items()}) // batch
    return total


def calls_per_request(deployable: Deployable, task: Task) -> int:
    """How often the driver calls its graphs for one request: a sampler does once a step, twice under guidance."""
    from compressor.exporters.record import record_inputs

    return sum(map(len, record_inputs(deployable, [task.request(1)], limit=10_000).values()))


def block_parameters(model: Model) -> int | None:
    """Parameters of the repeated blocks, for models whose blocks can be walked."""
    from compressor.models.anatomy.blocks import block_stack, walkable_classes

    if type(model.module).__name__ not in walkable_classes():
        return None
    return sum(p.numel() for block in block_stack(model.module).blocks for p in block.parameters())


class Candidate:
    """What can be timed: graphs one by one, and the driver around them.

    Attributes:
        target: What it was built for, resolved.
        graphs: By name.
        driver: The loop around them.
    """

    def __init__(
        self,
        target: Mapping[str, Any],
        graphs: Mapping[str, Run],
        driver: DriverSpec,
        assets: Mapping[str, Array | str],
    ) -> None:
        self.target, self.graphs, self._spec, self._assets = target, graphs, driver, assets
        self.driver: Driver = driver_class(driver.name)(graphs, driver.settings, assets)

    def graph_inputs(self, request: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
        """By graph, what one of its calls gets while the driver answers a request."""
        from compressor.exporters.record import record_calls

        records = record_calls(self.graphs, self._spec, self._assets, [request], limit=1)
        return {name: calls[0] for name, calls in records.items() if calls}

    def close(self) -> None:
        """Free what it holds."""


class LoadedEngine(Candidate):
    """An artifact, loaded.

    Args:
        directory: The artifact.

    Raises:
        TargetError: Its engine does not run here.
    """

    def __init__(self, directory: Path) -> None:
        manifest = read_manifest(directory)
        self._loaded = load_graphs(directory, manifest, _threads(manifest.target))
        driver = DriverSpec(manifest.driver.name, manifest.driver.settings)
        super().__init__(manifest.target, self._loaded, driver, read_assets(directory, manifest))

    def close(self) -> None:
        """Free the graphs."""
        for graph in self._loaded.values():
            graph.close()


def _threads(target: Mapping[str, Any]) -> dict[str, int]:
    """The threads of an engine on the CPU whose target leaves them open: as many as every other one's."""
    own = (target.get("options") or {}).get("threads")
    return {} if own or target.get("device", "cpu") != "cpu" else {"threads": usable_threads()}


class TorchEngine(Candidate):
    """A model as PyTorch itself runs it: what targets without an artifact measure.

    Args:
        deployable: Its graphs and driver.
        target: The target, resolved.

    Raises:
        TargetError: Its device or library is not here.
    """

    def __init__(self, deployable: Deployable, target: Mapping[str, Any]) -> None:
        graphs = {name: torch_run(graph, target) for name, graph in deployable.graphs.items()}
        super().__init__(target, graphs, deployable.driver, deployable.assets)


def measure_latency(engines: Mapping[str, Candidate], task: Task, settings: Benchmark) -> dict[str, Any]:
    """Time all engines side by side, graph by graph and request by request.

    A graph is called with what its own driver gives it for one request, repeated to the batch size: a teacher's graph
    may take other inputs than the student's of the same name.

    Args:
        engines: By name.
        task: Gives the driver's inputs.
        settings: Batch sizes, time and rounds.

    Returns:
        ``{engine: {"latency": {graph: {batch: Latency}}, "end_to_end": {batch: Latency}}}``
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(usable_threads())
    try:
        return _measure(engines, task, settings)
    finally:
        torch.set_num_threads(before)


def _measure(engines: Mapping[str, Candidate], task: Task, settings: Benchmark) -> dict[str, Any]:
    results: dict[str, Any] = {name: {"latency": {}, "end_to_end": {}} for name in engines}
    single = task.request(1)
    inputs = {name: engine.graph_inputs(single) for name, engine in engines.items()}
    wanted = {name: _batches(engine.target, settings) for name, engine in engines.items()}
    for batch in sorted({batch for sizes in wanted.values() for batch in sizes}):
        able = {name: engine for name, engine in engines.items() if batch in wanted[name]}
        for graph in sorted({graph for name in able for graph in inputs[name]}):
            calls = {
                name: _graph_call(engine.graphs[graph], inputs[name][graph], batch)
                for name, engine in able.items()
                if graph in inputs[name]
            }
            measured = measure_interleaved(calls, rounds=settings.rounds, budget_seconds=settings.seconds)
            for name, latency in measured.items():
                results[name]["latency"].setdefault(graph, {})[str(batch)] = latency
        request = task.request(batch)
        requests = {name: _request_call(engine.driver, request) for name, engine in able.items()}
        measured = measure_interleaved(requests, rounds=settings.rounds, budget_seconds=settings.seconds)
        for name, latency in measured.items():
            results[name]["end_to_end"][str(batch)] = latency
    return results


def _batches(target: Mapping[str, Any], settings: Benchmark) -> list[int]:
    """The batch sizes to time: the recipe's as far as the target takes them, else the target's own."""
    limits = target["batch"]
    if settings.batches is None:
        return [int(batch) for batch in limits["benchmark"]]
    return [batch for batch in settings.batches if limits["min"] <= batch <= limits["max"]]


def _graph_call(run: Run, inputs: Mapping[str, Array], batch: int) -> Callable[[], object]:
    batched = {name: value.repeat(batch, axis=0) for name, value in inputs.items()}
    return lambda: run(batched)


def _request_call(driver: Driver, request: Mapping[str, Array]) -> Callable[[], object]:
    return lambda: driver(request, seed=0)


def compare_latency(
    results: Mapping[str, Any], reference: str, student: str, target: str, names: tuple[str, str]
) -> list[Comparison]:
    """Ratios of the reference's latency to the student's, per call and per request; above 1 the student is faster.

    Args:
        results: Of `measure_latency`.
        reference: An engine of them.
        student: Another.
        target: What both were built for.
        names: What the two models are called in the report.
    """
    found = []
    pairs = [(f"latency of one call of {graph}", graph) for graph in results[student]["latency"]]
    for what, graph in [("latency", None), *pairs]:
        ours = results[student]["latency"][graph] if graph else results[student]["end_to_end"]
        theirs = results[reference]["latency"].get(graph, {}) if graph else results[reference]["end_to_end"]
        for batch, latency in ours.items():
            if batch in theirs:
                between = ratio(_latency(theirs[batch]), _latency(latency))
                found.append(
                    Comparison(
                        what=what,
                        a=names[0],
                        b=names[1],
                        ratio=between.value,
                        low=between.low,
                        high=between.high,
                        target=target,
                        batch=int(batch),
                    )
                )
    return found


def _latency(value: Latency | Mapping[str, Any]) -> Latency:
    return value if isinstance(value, Latency) else Latency.model_validate(value)


def load_engine(directory: Path) -> LoadedEngine | str:
    """The loaded engine, or the reason why it does not run here."""
    try:
        return LoadedEngine(directory)
    except TargetError as error:
        return str(error)
