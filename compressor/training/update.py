"""What happens at an `Update`: one backward that reaches the owners alone, one reduction, one guarded step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import DivergedError, RequestError, nearest
from compressor.training.distributed import Distributed, is_sharded
from compressor.training.history import LossHistory
from compressor.training.optimizer import Owner
from compressor.training.phase import Update

__all__ = ["Updater", "backward_by_stashing", "backward_to"]

_PATIENCE = 10  # skipped updates in a row before a run counts as diverged


def backward_to(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Back-propagate into the given parameters only; gradients flow *through* anything.

    Parameters that the loss does not reach keep the gradient that they have, None included.
    """
    loss.backward(inputs=list(parameters))


def backward_by_stashing(loss: Tensor, parameters: Sequence[nn.Parameter], others: Iterable[nn.Parameter] = ()) -> None:
    """The same for sharded modules, whose hooks do not see ``backward(inputs=...)``: put the others' gradients back.

    Args:
        loss: Scalar.
        parameters: Who receives the gradient.
        others: Who must not, beyond the leaves found in the graph (sharded parameters are no leaves of it).
    """
    with _kept(parameters, [*_leaves(loss), *others]):
        loss.backward()


@contextmanager
def _kept(parameters: Sequence[nn.Parameter], others: Iterable[Tensor]) -> Iterator[None]:
    owned = {id(parameter) for parameter in parameters}
    kept = {id(leaf): (leaf, leaf.grad) for leaf in others if id(leaf) not in owned}
    for leaf, _ in kept.values():
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in kept.values():
            leaf.grad = gradient


def _leaves(loss: Tensor) -> list[Tensor]:
    """Leaf tensors of a graph that accumulate gradients."""
    waiting: list[Any] = [loss.grad_fn]
    seen, leaves = set(waiting), []
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        for following, _ in node.next_functions if node is not None else ():
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves


class Updater:
    """Carries out the updates of one phase.

    Args:
        phase: Its name, for messages.
        owners: Optimisers by name.
        distributed: The processes, whose gradients are averaged.
        history: Where losses are recorded.
        others: Further parameters that must not receive gradients (needed for sharded modules only).
        on_skip: Called with (step, names of the non-finite losses) at a skipped update.
    """

    def __init__(
        self,
        phase: str,
        owners: Mapping[str, Owner],
        distributed: Distributed,
        history: LossHistory,
        others: Iterable[nn.Parameter] = (),
        on_skip: Callable[[int, str], None] = lambda step, cause: None,
    ) -> None:
        self._phase, self._owners, self._distributed = phase, owners, distributed
        self._history, self._on_skip = history, on_skip
        owned = [parameter for owner in owners.values() for parameter in owner.params]
        self._sharded = any(is_sharded(parameter) for parameter in owned)
        self._everyone = [*owned, *others]
        self._skipped: dict[str, int] = {}
        self._held_bad: dict[str, str] = {}

    def __call__(self, update: Update, step: int) -> bool:
        """Carry out one update; return whether its owners stepped.

        Raises:
            RequestError: The update is malformed.
            DivergedError: Too many updates in a row were not finite.
        """
        names = (update.owner,) if isinstance(update.owner, str) else tuple(update.owner)
        owners = [self._owner(name) for name in names]
        self._backward(update, owners)
        values = self._losses(update)
        bad = next((name for name, value in values.items() if not math.isfinite(value)), "")
        if update.hold:
            for owner in owners:
                owner.held = True
                if bad:
                    self._held_bad.setdefault(owner.name, bad)
            return False
        return self._step(owners, bad, step)

    def settle_held(self) -> None:
        """At a step's end: average gradients that are still held, so that they are one state for all processes."""
        for owner in self._owners.values():
            if owner.held:
                self._distributed.reduce_gradients(owner.params)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped, "held_bad": self._held_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._skipped, self._held_bad = dict(state["skipped"]), dict(state["held_bad"])

    def _owner(self, name: str) -> Owner:
        if name not in self._owners:
            raise RequestError(
                f"phase {self._phase!r} updates {name!r}, which is no optimiser of it: {nearest(name, self._owners)}"
            )
        owner = self._owners[name]
        owner.check()
        return owner

    def _backward(self, update: Update, owners: Sequence[Owner]) -> None:
        if not update.losses:
            raise RequestError(f"an update of {update.owner!r} in phase {self._phase!r} has no losses")
        for name, loss in update.losses.items():
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise RequestError(f"loss {name!r} of phase {self._phase!r} must be a scalar tensor, not {found}")
        # A loss may be constant on one process (no sample of its kind) and not on another.
        live = [loss.reshape(()) for loss in update.losses.values() if loss.requires_grad]
        if not live:
            return
        total = sum((loss.to(live[0].device) for loss in live[1:]), start=live[0])
        parameters = [parameter for owner in owners for parameter in owner.params]
        if self._sharded:
            backward_by_stashing(total, parameters, self._everyone)
        else:
            backward_to(total, parameters)

    def _losses(self, update: Update) -> dict[str, float]:
        """Every loss, averaged over the processes; recorded."""
        scalars = [loss.detach().float().reshape(()) for loss in update.losses.values()]
        local = torch.stack([scalar.to(self._distributed.device) for scalar in scalars])
        values = dict(zip(update.losses, self._distributed.reduce(local).tolist(), strict=True))
        for name, value in values.items():
            self._history.add(name, value)
        return values

    def _step(self, owners: Sequence[Owner], bad: str, step: int) -> bool:
        for owner in owners:
            self._distributed.reduce_gradients(owner.params)
            if not owner.gradients:
                raise RequestError(
                    f"no loss of phase {self._phase!r} reaches a parameter of {owner.name!r}: "
                    "something between them was detached or computed without gradients"
                )
            held_bad = self._held_bad.pop(owner.name, "")
            bad = bad or held_bad
            if owner.optim.clean:
                owner.clean()
        norms = [owner.norm() for owner in owners]
        values = torch.stack([norm.float().to(norms[0].device) for norm in norms]).tolist()
        guarded = [(owner, value) for owner, value in zip(owners, values, strict=True) if not owner.optim.clean]
        broken = next((owner.name for owner, value in guarded if not math.isfinite(value)), "")
        fine = not guarded or not (bad or broken)
        key = "+".join(owner.name for owner in owners)
        if not self._distributed.all(fine):
            self._skip(owners, key, f"loss {bad!r}" if bad else f"the gradient of {broken or key!r}", step)
            return False
        self._skipped.pop(key, None)
        for owner, norm in zip(owners, norms, strict=True):
            owner.clip(norm)
        for owner in owners:
            owner.step()
        return True

    def _skip(self, owners: Sequence[Owner], key: str, cause: str, step: int) -> None:
        for owner in owners:
            owner.zero()
        self._skipped[key] = self._skipped.get(key, 0) + 1
        self._on_skip(step, cause)
        if self._skipped[key] >= _PATIENCE:
            raise DivergedError(
                f"phase {self._phase!r} diverged at step {step}: {cause} was not finite in {_PATIENCE} updates of "
                f"{key!r} in a row; lower its learning rate (now {owners[0].optim.lr:g}) or clip its gradients"
            )
