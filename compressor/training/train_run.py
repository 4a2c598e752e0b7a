"""One `Train` phase at work: its optimisers, its steps, its validation, and all that a checkpoint must hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.errors import CheckpointError, RequestError
from compressor.training.batches import Batches
from compressor.training.checkpoint import place_like
from compressor.training.distributed import Distributed, is_sharded
from compressor.training.history import LossHistory
from compressor.training.optimizer import make_owners
from compressor.training.phase import Stateful, Train, Update
from compressor.training.random import Randomness
from compressor.training.update import Updater

__all__ = ["TrainRun", "apply_modes", "load_state", "state_of"]


class TrainRun:
    """A phase between its start and its end.

    Args:
        phase: What to do.
        name: Full name, for messages.
        distributed: The processes.
        randomness: Its ``phase`` is set already.
        precision: "bf16" runs the steps under autocast.
        restored: A checkpoint that `snapshot` made, or None to start afresh.
        carried: Optimiser states of the phase before, by name.
        on_skip: Called with (step, cause) at a skipped update.

    Attributes:
        done: Steps done.
        history: Its losses.
    """

    def __init__(
        self,
        phase: Train,
        name: str,
        distributed: Distributed,
        randomness: Randomness,
        precision: Literal["fp32", "bf16"],
        restored: Any,
        carried: dict[str, Any],
        on_skip: Callable[[int, str], None],
    ) -> None:
        self.phase, self.name, self.done = phase, name, 0
        self.history = LossHistory(phase.steps)
        self._distributed, self._randomness, self._precision = distributed, randomness, precision
        # States first: loading one may resize its parameters, and an optimiser is built for those it finds.
        if restored is not None:
            load_state(self._remembered(), restored["state"], name)
        apply_modes(phase)
        self._owners = make_owners(phase.optimizers)
        self._modules = _modules(phase)
        others = [p for module in self._modules for p in module.parameters() if p.requires_grad]
        self._updater = Updater(name, self._owners, distributed, self.history, others, on_skip)
        for optimizer, state in carried.items():
            self._owners[optimizer].load_state_dict(state)
        if restored is not None:
            self._restore(restored)
        self._check_equal_start()

    def step(self, batches: Batches) -> None:
        """Do the next step."""
        i = self.done
        for owner in self._owners.values():
            owner.set_rate(i)
        # Seeding every step makes the global generators a function of the step: there is no state of theirs to save.
        self._randomness.seed_global(i, "step", shared=False, device=self._distributed.device)
        batch = batches[i]
        with self._autocast():
            steps = self.phase.step(batch, i)
        if not isinstance(steps, Iterator):
            raise RequestError(
                f"the step of phase {self.name!r} must yield Update objects, but returned {type(steps).__name__}"
            )
        answer: bool | None = None
        while (update := self._next(steps, answer)) is not None:
            if not isinstance(update, Update):
                raise RequestError(f"the step of phase {self.name!r} must yield Update objects, not {update!r:.60}")
            answer = self._updater(update, i)
        self._updater.settle_held()
        self._average_batch_norms()
        self.done += 1
        self.history.close(self.done)

    def validation_due(self) -> bool:
        """Whether the phase validates after the steps done so far."""
        every, done = self.phase.validate_every, self.done
        return self.phase.validate is not None and (done == self.phase.steps or (every > 0 and done % every == 0))

    def validate(self) -> float:
        """Score the present weights, the same for all processes, and offer them to ``keep``."""
        assert self.phase.validate is not None
        self._randomness.seed_global(self.done, "validate", shared=True, device=self._distributed.device)
        local = torch.tensor(float(self.phase.validate()), dtype=torch.float64)
        score = float(self._distributed.reduce(local.to(self._distributed.device)))
        self.history.mark("validation", self.done, score)
        if self.phase.keep is not None:
            self.phase.keep.offer(score, self.done)
        apply_modes(self.phase)
        return score

    def finish(self) -> None:
        """End the phase: the kept weights go into the module, the optimisers forget their gradients."""
        if self.phase.keep is not None:
            self.phase.keep.finish()
        for owner in self._owners.values():
            owner.zero()
        apply_modes(self.phase)

    def snapshot(self) -> dict[str, Any]:
        """All that going on from here needs."""
        return {
            "done": self.done,
            "state": state_of(self._remembered()),
            "optimizers": self.optimizer_state(),
            "held": {name: owner.held_gradients() for name, owner in self._owners.items()},
            "updater": self._updater.state_dict(),
            "history": self.history.state_dict(),
        }

    def optimizer_state(self) -> dict[str, Any]:
        """The state of every optimiser, by name."""
        return {name: owner.state_dict() for name, owner in self._owners.items()}

    def _restore(self, restored: dict[str, Any]) -> None:
        self.done = restored["done"]
        for name, owner in self._owners.items():
            owner.load_state_dict(restored["optimizers"][name])
            owner.load_held_gradients(restored["held"][name])
        self._updater.load_state_dict(restored["updater"])
        self.history.load_state_dict(restored["history"])

    def _remembered(self) -> dict[str, Stateful]:
        keep = {} if self.phase.keep is None else {"keep:": self.phase.keep}
        return {**self.phase.state, **keep}

    def _next(self, steps: Any, answer: bool | None) -> Update | None:
        try:
            with self._autocast():
                result: Update = next(steps) if answer is None or not hasattr(steps, "send") else steps.send(answer)
            return result
        except StopIteration:
            return None

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._distributed.device.type, dtype=torch.bfloat16)

    def _average_batch_norms(self) -> None:
        """Running statistics are of each process's own samples: average them, so that all processes stay equal."""
        if self._distributed.processes > 1:
            self._distributed.reduce_tensors(
                [
                    buffer
                    for module in self._modules
                    for norm in module.modules()
                    if isinstance(norm, _BatchNorm) and norm.training and norm.track_running_stats
                    for buffer in (norm.running_mean, norm.running_var)
                    if buffer is not None
                ]
            )

    def _check_equal_start(self) -> None:
        if self._distributed.processes == 1:
            return
        for name, owner in self._owners.items():
            sums = torch.stack([p.detach().double().sum().cpu() for p in owner.params if not is_sharded(p)])
            if not self._distributed.all(torch.equal(sums, self._distributed.broadcast_object(sums))):
                raise RequestError(
                    f"the processes start phase {self.name!r} with different weights of {name!r}: "
                    "whatever initialises them must not depend on the process"
                )


def apply_modes(phase: Train) -> None:
    """Set modules to train or eval mode as the phase asks."""
    for module, mode in phase.modes:
        if mode not in ("train", "eval"):
            raise RequestError(f"a module's mode is 'train' or 'eval', got {mode!r} in phase {phase.name!r}")
        module.train(mode == "train")


def state_of(remembered: dict[str, Stateful]) -> dict[str, Any]:
    """The states by name."""
    for name, item in remembered.items():
        if not isinstance(item, Stateful):
            raise RequestError(f"the state {name!r} ({type(item).__name__}) lacks state_dict or load_state_dict")
    return {name: item.state_dict() for name, item in remembered.items()}


def load_state(remembered: dict[str, Stateful], stored: dict[str, Any], phase: str) -> None:
    """Load every state.

    Raises:
        CheckpointError: One does not fit the object that the method built.
    """
    for name, item in remembered.items():
        try:
            item.load_state_dict(place_like(stored[name], item.state_dict()))
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"the stored state {name!r} of phase {phase!r} does not fit what the method builds now ({reason}): "
                "remove the phase's directory to do it again"
            ) from error


def _modules(phase: Train) -> list[nn.Module]:
    """The modules that a phase works on, as far as they show: each once."""
    candidates: list[Any] = [*phase.state.values(), *(module for module, _ in phase.modes)]
    found = [item if isinstance(item, nn.Module) else getattr(item, "module", None) for item in candidates]
    return list({id(module): module for module in found if isinstance(module, nn.Module)}.values())
