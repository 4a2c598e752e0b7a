"""Averages of weights over training: exponential, Gaussian over epochs, dense over a loss valley, and the best seen."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import RequestError

__all__ = ["Best", "Ema", "GaussianAverage", "Swad", "half_life_decay", "warming_decay"]

Weights = list[Tensor]
"""Every parameter and buffer of a module, in its own order."""


def warming_decay(limit: float) -> Callable[[int], float]:
    """Decay of an `Ema` that starts low: ``min(limit, (1 + n) / (10 + n))`` at its n-th update."""
    return lambda updates: min(limit, (1 + updates) / (10 + updates))


def half_life_decay(half_life: float, batch: int, rampup: float | None = 0.05) -> Callable[[int], float]:
    """Decay of an `Ema` given by a half-life in samples (EDM, SiD).

    Args:
        half_life: Samples after which a weight's share has halved.
        batch: Samples of one step, over all processes.
        rampup: The half-life is at most this share of the samples seen so far; None for a constant decay.
    """

    def decay(updates: int) -> float:
        length = half_life if rampup is None else min(half_life, rampup * updates * batch)
        return 0.5 ** (batch / max(length, 1e-8))

    return decay


class Ema:
    """The exponential moving average of a module's weights.

    Args:
        module: What is averaged. It must keep its structure.
        decay: Share of the old average that an update keeps: a number, or a function of the number of updates so far.
        buffers: Average floating buffers like parameters; False copies them as they are. Other buffers are copied.

    Attributes:
        module: The averaged copy, in eval mode, without gradients.
        updates: How many updates it has seen.
    """

    def __init__(self, module: nn.Module, decay: float | Callable[[int], float], buffers: bool = True) -> None:
        if not callable(decay) and not 0 <= decay <= 1:
            raise RequestError(f"the decay of an average is in [0, 1], got {decay}")
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        for parameter in self.module.parameters():
            parameter.grad = None
        self._source, self._decay, self._buffers = module, decay, buffers
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's present weights."""
        decay = self._decay(self.updates) if callable(self._decay) else self._decay
        averages: list[Tensor] = list(self.module.parameters())
        currents: list[Tensor] = list(self._source.parameters())
        for average, current in zip(self.module.buffers(), self._source.buffers(), strict=True):
            if self._buffers and average.is_floating_point():
                averages.append(average)
                currents.append(current)
            else:
                average.copy_(current)
        torch._foreach_lerp_(averages, currents, 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.updates = int(state["updates"])


class Best:
    """Keeps the weights with the highest score; `finish` puts them back into the module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.score, self.step = -math.inf, -1
        self._weights: Weights = []

    def offer(self, score: float, step: int) -> None:
        """Keep the present weights if the score beats all before (a tie keeps the earlier)."""
        if score > self.score:
            self.score, self.step, self._weights = score, step, _copy(self._module)

    def finish(self) -> None:
        """Load the best weights, if any were offered."""
        if self._weights:
            _assign(self._module, self._weights)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "step": self.step, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score, self.step = float(state["score"]), int(state["step"])
        self._weights = _like(self._module, state["weights"])


class GaussianAverage:
    """The Gaussian-weighted mean of the weights after each epoch: epoch e counts ``exp(-(e - mean)^2 / (2 std^2))``.

    Args:
        module: What is averaged.
        mean: Epoch of the largest weight, counted from 1.
        std: Width in epochs.
    """

    def __init__(self, module: nn.Module, mean: float, std: float) -> None:
        if std <= 0:
            raise RequestError(f"the width of a Gaussian average must be positive, got {std}")
        self._module, self.mean, self.std = module, mean, std
        self.epoch, self.total = 0, 0.0
        self._average: Weights = []

    @torch.no_grad()
    def offer(self, score: float, step: int) -> None:
        """Count the present weights as those of the next epoch; the score does not matter."""
        self.epoch += 1
        weight = math.exp(-((self.epoch - self.mean) ** 2) / (2 * self.std**2))
        self._average, self.total = _merge(self._average, self.total, _tensors(self._module), weight)

    def finish(self) -> None:
        """Load the average, if any epoch was offered."""
        if self.total > 0:
            _assign(self._module, self._average)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "total": self.total, "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.total = int(state["epoch"]), float(state["total"])
        self._average = _like(self._module, state["average"])


@dataclass
class _Segment:
    """The mean of the weights between two checks, with the validation loss at its end."""

    weights: Weights
    count: int
    loss: float
    step: int


class Swad:
    """Stochastic weight averaging, densely, over a valley of the validation loss (Cha et al., NeurIPS 2021).

    Call `update` after every optimiser step. The valley starts once the oldest of the last ``converge`` checks has the
    lowest loss of them, and ends when the lowest loss of the last ``tolerance`` checks exceeds ``ratio`` times their
    mean. `finish` loads the mean over the valley, or leaves the last weights if none was found.

    Args:
        module: What is averaged.
        converge: Checks without improvement that start the valley (N_s).
        tolerance: Checks above the threshold that end it (N_e).
        ratio: Threshold over the mean loss at the start (1.3 = 30 % worse).
    """

    def __init__(self, module: nn.Module, converge: int = 3, tolerance: int = 6, ratio: float = 1.3) -> None:
        if converge < 1 or tolerance < 1:
            raise RequestError(f"converge and tolerance count checks from 1, got {converge} and {tolerance}")
        self._module = module
        self.converge, self.tolerance, self.ratio = converge, tolerance, ratio
        self.threshold: float | None = None
        self.start, self.ended, self._taken_until = -1, False, -1
        self._running: tuple[Weights, int] = ([], 0)
        self._recent: deque[_Segment] = deque(maxlen=max(converge, tolerance))
        self._average: tuple[Weights, int] = ([], 0)

    def update(self) -> None:
        """Count the present weights into the running segment."""
        if not self.ended:
            weights, count = self._running
            self._running = _add(weights, count, _tensors(self._module), 1)

    def offer(self, score: float, step: int) -> None:
        """End a segment. ``score`` is the *negative* validation loss."""
        if self.ended:
            return
        weights, count = self._running if self._running[1] else (_copy(self._module), 1)
        self._running = ([], 0)
        self._recent.append(_Segment(weights, count, -score, step))
        if self.threshold is None:
            self._try_to_start()
        elif len(self._recent) >= self.tolerance:
            window = list(self._recent)[-self.tolerance :]
            if window[0].step < self.start:
                return
            if min(segment.loss for segment in window) > self.threshold:
                self.ended = True
            else:
                self._take(window[0])

    def finish(self) -> None:
        """Load the mean over the valley."""
        if self.threshold is None:
            return
        if not self.ended:
            # The segments still waiting in the window count while their future stays below the threshold.
            waiting = [segment for segment in self._recent if segment.step > self._taken_until]
            while waiting and min(segment.loss for segment in waiting) <= self.threshold:
                self._take(waiting.pop(0))
        _assign(self._module, self._average[0])

    def _try_to_start(self) -> None:
        window = list(self._recent)[-self.converge :]
        if len(window) < self.converge or min(window, key=lambda segment: segment.loss) is not window[0]:
            return
        self.start = window[0].step
        self.threshold = self.ratio * sum(segment.loss for segment in window) / len(window)
        self._average, self._taken_until = ([], 0), -1
        self._take(window[0])
        # A tolerance shorter than the window would otherwise skip the segments between.
        for segment in window[1 : 1 + max(self.converge - self.tolerance, 0)]:
            self._take(segment)

    def _take(self, segment: _Segment) -> None:
        if segment.step > self._taken_until:
            self._average = _add(*self._average, segment.weights, segment.count)
            self._taken_until = segment.step

    def state_dict(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "start": self.start,
            "ended": self.ended,
            "taken_until": self._taken_until,
            "running": list(self._running),
            "average": list(self._average),
            "recent": [asdict(segment) for segment in self._recent],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold, self.start, self.ended = state["threshold"], int(state["start"]), bool(state["ended"])
        self._taken_until = int(state["taken_until"])
        self._running = (_like(self._module, state["running"][0]), int(state["running"][1]))
        self._average = (_like(self._module, state["average"][0]), int(state["average"][1]))
        self._recent.clear()
        for segment in state["recent"]:
            self._recent.append(_Segment(**segment | {"weights": _like(self._module, segment["weights"])}))


def _tensors(module: nn.Module) -> Weights:
    return [*module.parameters(), *module.buffers()]


def _copy(module: nn.Module) -> Weights:
    return [tensor.detach().clone() for tensor in _tensors(module)]


@torch.no_grad()
def _assign(module: nn.Module, weights: Weights) -> None:
    for tensor, value in zip(_tensors(module), weights, strict=True):
        tensor.copy_(value)


def _like(module: nn.Module, weights: Sequence[Tensor]) -> Weights:
    """Stored weights, on the devices of the module's own."""
    if not weights:
        return []
    return [value.to(tensor.device).clone() for tensor, value in zip(_tensors(module), weights, strict=True)]


def _add(average: Weights, count: int, weights: Weights, more: int) -> tuple[Weights, int]:
    """The mean of ``count`` and ``more`` sets of weights, with their number."""
    merged, _ = _merge(average, float(count), weights, float(more))
    return merged, count + more


@torch.no_grad()
def _merge(average: Weights, total: float, weights: Weights, weight: float) -> tuple[Weights, float]:
    """The weighted mean of two sets, in place in the first, with their total; counters are taken from the second."""
    if not average or total + weight == 0:
        return [tensor.detach().clone() for tensor in weights], total + weight
    share = weight / (total + weight)
    for old, new in zip(average, weights, strict=True):
        if old.is_floating_point():
            old.lerp_(new, share)
        else:
            old.copy_(new)
    return average, total + weight
