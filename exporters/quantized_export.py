"""Quantise one graph for a target: calibrate, judge, give operators back to float until the accuracy holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from compressor.exporters.accuracy_restoration import Fit, restore_accuracy
from compressor.exporters.artifact import Source
from compressor.exporters.layers import model_path
from compressor.exporters.parity import TOLERANCES, compare, root_mean_square
from compressor.layer_patterns import lies_in
from compressor.profiles.target import Target
from compressor.runtimes.manifest import FloatOperators, Parity, Quantization
from compressor.runtimes.runtime import Array, Run

__all__ = ["Account", "Case", "Quantized", "Quantizer", "quantize_graph"]

Case = tuple[Mapping[str, Array], Mapping[str, Array]]
"""A recorded input and the model's outputs for it."""

_RANKED_CASES = 2


@dataclass(frozen=True)
class Account:
    """What an 8-bit graph computes in which precision.

    Attributes:
        operators: Operators in eight bits, by kind.
        float_operators: The others, with the reason.
        kernels: 8-bit kernels that the engine chose on this machine; empty where it cannot be asked.
    """

    operators: Mapping[str, int]
    float_operators: tuple[FloatOperators, ...]
    kernels: Mapping[str, int]

    @classmethod
    def of(
        cls,
        operators: Mapping[str, int],
        left: Mapping[tuple[str, str], Sequence[str]],
        kernels: Mapping[str, int],
    ) -> Account:
        """An account in which layers are named only where their accuracy, or the target, kept them in float.

        Args:
            operators: In eight bits, by kind.
            left: The layers of the others, by kind and reason.
            kernels: As the attribute.
        """
        floats = tuple(
            FloatOperators(
                operator=kind,
                count=len(layers),
                reason=reason,  # type: ignore[arg-type]
                layers=tuple(layers) if reason in ("accuracy", "excluded") else (),
            )
            for (kind, reason), layers in left.items()
        )
        return cls(dict(operators), floats, kernels)


class Quantizer(Protocol):
    """Makes 8-bit graphs for one engine, all from one calibration.

    Attributes:
        by: The library, for the manifest.
        judged_by: What runs the graphs here.
    """

    by: str
    judged_by: str

    def operators(self) -> Mapping[str, str]:
        """The products of the graph in its order: name, and why it stays in float, "" where it need not."""
        ...

    def layer(self, operator: str) -> str:
        """Path of the module that a product stems from; its own name where that is unknown."""
        ...

    def open(self, back: Mapping[str, str], folder: Path) -> tuple[Run, Callable[[], None]]:
        """The graph with some products in float, ready to run, and what frees it."""
        ...

    def write(self, back: Mapping[str, str], folder: Path, name: str) -> tuple[Source, Account]:
        """The source for the engine's exporter, and the account of it."""
        ...


@dataclass(frozen=True)
class Quantized:
    """A quantised graph and the account of it; ``back`` are in float, with the reason, by the target or by accuracy."""

    source: Source
    back: Mapping[str, str]
    entry: Quantization
    parity: Parity
    notes: tuple[str, ...]


def quantize_graph(
    name: str,
    quantizer: Quantizer,
    target: Target,
    cases: Sequence[Case],
    judge: Callable[[Run], float] | None,
    samples: int,
    folder: Path,
) -> Quantized:
    """Quantise as much of a graph as its accuracy allows.

    Args:
        name: Of the graph.
        quantizer: For the target's engine, calibrated.
        target: Names the limits.
        cases: Inputs to measure the error on, with the model's outputs.
        judge: What is lost of the task's figures with this graph; None where nothing judges.
        samples: Number of samples that the ranges come from.
        folder: For files on the way.
    """
    bench = _Bench(quantizer, target, cases, judge, folder)
    found = restore_accuracy(bench.chosen, bench.fit, bench.cost, target.calibration.seconds)
    back = bench.in_float(found.back)
    source, account = quantizer.write(back, folder, name)
    settings = target.calibration
    entry = Quantization(
        by=quantizer.by,
        method=settings.method,
        samples=samples,
        per_channel=settings.per_channel and target.precision == "int8",
        operators=dict(account.operators),
        float_operators=account.float_operators,
        kernels=dict(account.kernels),
        drop=found.final.drop,
        blind_drop=found.blind.drop,
        error=found.final.error,
        blind_error=found.blind.error,
        limit=settings.max_drop if judge is not None else settings.max_error,
        judged_by=quantizer.judged_by,
    )
    notes = _notes(name, len(bench.chosen), found.back, entry, found.ranked)
    if bench.excluded:
        notes += (f"{len(bench.excluded)} products of graph {name!r} stay in float: calibration.exclude names them.",)
    return Quantized(source, back, entry, bench.parity(found.back), notes)


class _Bench:
    """Builds and measures 8-bit graphs.

    Attributes:
        chosen: Products that may be in eight bits.
        excluded: Those that the target keeps in float.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        target: Target,
        cases: Sequence[Case],
        judge: Callable[[Run], float] | None,
        folder: Path,
    ) -> None:
        self.quantizer, self.target, self.cases, self.judge, self.folder = quantizer, target, cases, judge, folder
        self._parities: dict[tuple[str, ...], Parity] = {}
        able = [operator for operator, reason in quantizer.operators().items() if not reason]
        patterns = target.calibration.exclude
        self.excluded = [operator for operator in able if lies_in(model_path(quantizer.layer(operator)), patterns)]
        self.chosen = [operator for operator in able if operator not in set(self.excluded)]

    def in_float(self, back: Iterable[str]) -> dict[str, str]:
        """The excluded products and those that went back for their accuracy, each with its reason."""
        return {**dict.fromkeys(self.excluded, "excluded"), **dict.fromkeys(back, "accuracy")}

    def fit(self, back: Collection[str]) -> Fit:
        """How the graph does with some operators in float."""
        run, close = self.quantizer.open(self.in_float(back), self.folder)
        limits = self.target.calibration
        try:
            outputs = [run(inputs) for inputs, _ in self.cases]
            error = max(root_mean_square(case[1], given) for case, given in zip(self.cases, outputs, strict=True))
            parities = [
                compare(case[1], given, TOLERANCES[self.target.precision], self.quantizer.judged_by)
                for case, given in zip(self.cases, outputs, strict=True)
            ]
            parity = max(parities, key=lambda one: one.relative).model_copy(update={"records": len(parities)})
            self._parities[tuple(back)] = parity
            sound = parity.relative <= parity.tolerance
            drop = self.judge(run) if self.judge is not None and sound else None
        finally:
            close()
        holds = sound and (drop <= limits.max_drop if drop is not None else error <= limits.max_error)
        return Fit(drop, error, holds)

    def cost(self, only: Collection[str]) -> float:
        """The error of the graph in which nothing but these operators is quantised."""
        others = [name for name in self.chosen if name not in set(only)]
        run, close = self.quantizer.open(self.in_float(others), self.folder)
        try:
            return max(root_mean_square(expected, run(inputs)) for inputs, expected in self.cases[:_RANKED_CASES])
        finally:
            close()

    def parity(self, back: Collection[str]) -> Parity:
        """The parity of a graph that was measured."""
        return self._parities[tuple(back)]


def _notes(name: str, count: int, back: Sequence[str], entry: Quantization, ranked: int) -> tuple[str, ...]:
    if not count:
        return (f"Graph {name!r} has no operator that the engine computes in eight bits: it is a float graph.",)
    what = f"{count - len(back)} of {count} products of graph {name!r} are computed in eight bits"
    if not back:
        return (f"{what}.",)
    lost = (
        f"lost {entry.blind_drop:.3f} of the task's figures (allowed: {entry.limit:g}), now {entry.drop:.3f}"
        if entry.blind_drop is not None and entry.drop is not None
        else f"was off by {entry.blind_error:.2f} of its outputs' size, now {entry.error:.2f}"
    )
    short = "" if ranked >= count else f" The time was enough to rank {ranked} of them: raise calibration.seconds."
    return (f"{what}; {len(back)} went back to float: with all of them it {lost}.{short}",)
