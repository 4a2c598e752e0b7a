"""Record what each graph of a deployable really gets while its driver runs: for calibration and for parity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from compressor.deployable import Deployable, DriverSpec
from compressor.evaluate import TorchRun
from compressor.runtimes.load import driver_class
from compressor.runtimes.runtime import Array, Run

__all__ = ["Records", "record_calls", "record_inputs"]

Records = dict[str, list[dict[str, Array]]]
"""Recorded inputs by graph."""


def record_inputs(
    deployable: Deployable, calls: Iterable[Mapping[str, Array]], *, limit: int = 16, seed: int = 0
) -> Records:
    """Run the driver with the torch modules and keep inputs of each graph, spread evenly over all its calls.

    Args:
        deployable: What is going to be exported.
        calls: Inputs of the driver, one mapping a call; call k runs with ``seed + k``.
        limit: Largest number of recorded inputs a graph (each a whole batch).
        seed: Seed of the first call.

    Returns:
        By graph, its recorded inputs in the order of the calls. Every sampler step is a call of the denoiser, so all
        noise levels are among them.
    """
    graphs, modes = {}, {}
    for name, graph in deployable.graphs.items():
        modes.update({part: part.training for part in graph.module.modules()})
        graphs[name] = TorchRun(graph.module, graph.outputs)
    try:
        return record_calls(graphs, deployable.driver, deployable.assets, calls, limit=limit, seed=seed)
    finally:
        for part, mode in modes.items():
            part.training = mode


def record_calls(
    graphs: Mapping[str, Run],
    driver: DriverSpec,
    assets: Mapping[str, Array | str],
    calls: Iterable[Mapping[str, Array]],
    *,
    limit: int = 16,
    seed: int = 0,
) -> Records:
    """The same for graphs of any engine: by graph, what the driver around them gives it; see `record_inputs`."""
    recorders = {name: _Recorder(run, limit) for name, run in graphs.items()}
    around = driver_class(driver.name)(dict(recorders), driver.settings, assets)
    for number, inputs in enumerate(calls):
        around(inputs, seed=seed + number)
    return {name: recorder.chosen() for name, recorder in recorders.items()}


class _Recorder:
    """A `Run` that keeps every k-th input, with k tripled whenever it holds too many.

    Guidance calls a graph twice a step, so an even k would see one kind of call alone.
    """

    def __init__(self, run: Run, limit: int) -> None:
        self.run, self.limit = run, limit
        self.stride, self.count = 1, 0
        self.kept: list[dict[str, Array]] = []

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self.count % self.stride == 0:
            self.kept.append({name: np.array(value) for name, value in inputs.items()})
            if len(self.kept) > 4 * self.limit:
                self.kept, self.stride = self.kept[::3], 3 * self.stride
        self.count += 1
        return self.run(inputs)

    def chosen(self) -> list[dict[str, Array]]:
        """At most ``limit`` of the kept inputs, one of every stretch of them, first and last among them."""
        if len(self.kept) <= self.limit:
            return self.kept
        edges = np.linspace(0, len(self.kept), self.limit + 1).round().astype(int)
        places = np.random.default_rng(0).integers(edges[:-1], edges[1:])  # by chance: even steps can meet a pattern
        places[0], places[-1] = 0, len(self.kept) - 1
        return [self.kept[place] for place in places]
