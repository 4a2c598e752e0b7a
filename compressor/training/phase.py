"""What a method yields to the training engine: phases of gradient steps (`Train`) or of other work (`Compute`)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from compressor.data.stream import Batch, Stream

__all__ = ["Compute", "Optim", "ParamGroup", "Phases", "Stateful", "Step", "Train", "Update"]

ParamGroup = dict[str, Any]
"""A torch parameter group: ``{"params": [...], "lr": ..., "weight_decay": ...}``."""


@runtime_checkable
class Stateful(Protocol):
    """Anything that must survive a kill: modules, averages, queues, adaptive scalars.

    ``state_dict`` may hold tensors and JSON values, nested in dicts and lists.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def constant(step: int) -> float:
    """The schedule that leaves the learning rate alone."""
    return 1.0


@dataclass
class Optim:
    """One optimiser: whom it owns and how it steps.

    Attributes:
        params: Parameters or torch parameter groups.
        kind: "adamw", "adam" or "sgd".
        lr: Base learning rate; multiplied by ``schedule(step)`` (and a group's own ``lr`` likewise).
        options: Further keyword arguments of the torch optimiser (betas, weight_decay, momentum, ...).
        schedule: Factor of the learning rate; a pure function of the phase's step, so there is no scheduler state.
        clip_norm: Total gradient norm limit, taken after the gradients are averaged over processes.
        clip_value: Entrywise gradient limit.
        clean: Replace NaN gradient entries by 0 and infinities by ±1e5 instead of skipping the step.
        update_mask: Multiplies the optimiser's *step* (not the gradient) entry by entry: entries under 0 keep
            their bits.
        after_step: Called after every step of this optimiser (clamp pixels, update an average, re-tie weights).
    """

    params: Iterable[nn.Parameter] | Sequence[ParamGroup]
    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)
    schedule: Callable[[int], float] = constant
    clip_norm: float | None = None
    clip_value: float | None = None
    clean: bool = False
    update_mask: Callable[[], Mapping[nn.Parameter, Tensor]] | None = None
    after_step: Sequence[Callable[[], None]] = ()


@dataclass
class Update:
    """Yielded by a step: one backward, then the owners step, then the step goes on.

    ``stepped = yield Update(...)`` is False when the update was held or skipped as non-finite.

    Attributes:
        owner: The optimiser, or several, whose parameters receive the gradient. Nobody else receives any.
        losses: Weighted scalars by name: their sum is back-propagated, each is logged.
        hold: Accumulate the gradient only; the owners step at their next update without hold.
    """

    owner: str | tuple[str, ...]
    losses: dict[str, Tensor]
    hold: bool = False


Step = Callable[[dict[str, Batch], int], Iterator[Update] | Generator[Update, bool, None]]


@dataclass
class Train:
    """A phase of gradient steps.

    Its ``state`` is all that it leaves behind: run it or load it, the process is the same afterwards.

    Attributes:
        name: Unique within the method.
        steps: Number of steps.
        optimizers: By name; made afresh at the phase's start unless named in ``carry``.
        streams: Sources of batches by name; step ``i`` gets batch ``i`` of each.
        step: A generator function ``(batches, i)`` that yields `Update`s.
        state: What is trained or remembered, by name.
        modes: Train or eval mode by module, applied in order at the start, and again after every validation.
        validate: A score, higher is better, called every ``validate_every`` steps and at the end (mean over processes).
        validate_every: In steps; 0 means only at the end.
        keep: A `Stateful` that also has ``offer(score: float, step: int)`` and ``finish()``: keeps the best weights or
            an average chosen by validation.
        carry: Optimisers whose state goes on from the phase before (same name there).
        key: JSON; what else decides the phase's result. A stored phase with another key is done again.
    """

    name: str
    steps: int
    optimizers: dict[str, Optim]
    streams: dict[str, Stream]
    step: Step
    state: Mapping[str, Stateful]
    modes: Sequence[tuple[nn.Module, Literal["train", "eval"]]] = ()
    validate: Callable[[], float] | None = None
    validate_every: int = 0
    keep: Any = None
    carry: tuple[str, ...] = ()
    key: Any = None


@dataclass
class Compute:
    """A phase without gradient steps (probe, mine, filter, generate).

    Attributes:
        name: Unique within the method.
        run: Returns named arrays or tensors; they are stored, and handed back by ``yield``, as tensors on the CPU. With
            several processes it runs on all, and the main one's result counts.
        key: JSON; what else decides the result. A stored result with another key is computed again.
    """

    name: str
    run: Callable[[], Mapping[str, Tensor | np.ndarray[Any, Any]]]
    key: Any = None


Phases = Generator[Train | Compute, dict[str, Tensor] | None, None]
"""What ``Method.phases`` returns: a `Compute` is answered with its result, a `Train` with None."""
