"""One optimiser at work: whom it owns, its gradients, and its step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError, RequestError, nearest
from compressor.training.checkpoint import place_like
from compressor.training.distributed import is_sharded
from compressor.training.phase import Optim

__all__ = ["Owner", "make_owners"]

_KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
_CLEAN_LIMIT = 1e5  # what an infinite gradient entry becomes: large, and its square still finite in float32


def make_owners(optimizers: Mapping[str, Optim]) -> dict[str, Owner]:
    """Build the optimisers of a phase.

    Raises:
        RequestError: An optimiser owns nothing, or a parameter has two owners.
    """
    owners = {name: Owner(name, optim) for name, optim in optimizers.items()}
    owner_of: dict[nn.Parameter, str] = {}
    for name, owner in owners.items():
        for parameter in owner.params:
            other = owner_of.setdefault(parameter, name)
            if other != name:
                raise RequestError(
                    f"the optimisers {other!r} and {name!r} own the same parameter of shape "
                    f"{tuple(parameter.shape)}: give it to one of them"
                )
    return owners


class Owner:
    """One optimiser at work.

    Attributes:
        name: For messages.
        optim: What it was asked to be.
        params: Whom it owns, in the order of its groups.
        held: Whether gradients wait for a later update.
    """

    def __init__(self, name: str, optim: Optim) -> None:
        self.name, self.optim, self.held = name, optim, False
        groups = _groups(optim.params)
        self.params: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        if not self.params:
            raise RequestError(f"the optimiser {name!r} owns no parameter")
        if optim.kind not in _KINDS:
            raise RequestError(f"unknown optimiser {optim.kind!r}: {nearest(optim.kind, _KINDS)}")
        self._base = [float(group.get("lr", optim.lr)) for group in groups]
        try:
            self.optimizer = _KINDS[optim.kind](groups, lr=optim.lr, **optim.options)
        except (TypeError, ValueError) as error:
            raise RequestError(f"the optimiser {name!r} ({optim.kind}) cannot be made: {error}") from error
        self.zero()

    def check(self) -> None:
        """Refuse parameters that cannot receive a gradient."""
        for parameter in self.params:
            if not parameter.requires_grad:
                raise RequestError(
                    f"the optimiser {self.name!r} owns a parameter of shape {tuple(parameter.shape)} that is frozen: "
                    "somebody called requires_grad_(False) on it; freeze a copy instead, or do not own it"
                )

    def set_rate(self, step: int) -> None:
        """Set the learning rate of every group for a step of the phase."""
        factor = self.optim.schedule(step)
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * factor

    def zero(self) -> None:
        """Forget all gradients."""
        self.held = False
        for parameter in self.params:
            parameter.grad = None

    @property
    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.params if parameter.grad is not None]

    @torch.no_grad()
    def clean(self) -> None:
        """Replace NaN entries by 0 and infinities by a large number."""
        for gradient in self.gradients:
            limit = min(_CLEAN_LIMIT, torch.finfo(gradient.dtype).max)
            torch.nan_to_num_(gradient, nan=0.0, posinf=limit, neginf=-limit)

    def norm(self) -> Tensor:
        """The 2-norm of all gradients together, a scalar."""
        gradients = self.gradients
        if not gradients:
            return torch.zeros(())
        total = torch.nn.utils.get_total_norm(gradients)
        return total.full_tensor() if is_sharded(total) else total  # type: ignore[attr-defined]

    @torch.no_grad()
    def clip(self, norm: Tensor) -> None:
        """Limit the gradients, whose norm is known."""
        if self.optim.clip_value is not None:
            torch._foreach_clamp_min_(self.gradients, -self.optim.clip_value)
            torch._foreach_clamp_max_(self.gradients, self.optim.clip_value)
            norm = self.norm()
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.optim.clip_norm, norm)

    def step(self) -> None:
        """Step, keep masked entries as they were, forget the gradients, call what comes after."""
        masks = self.optim.update_mask() if self.optim.update_mask else {}
        before = [(param, self._mask(param, mask), param.detach().clone()) for param, mask in masks.items()]
        self.optimizer.step()
        with torch.no_grad():
            for parameter, mask, old in before:
                parameter.copy_(_masked(old, parameter, mask))
            self.zero()
            for call in self.optim.after_step:
                call()

    def _mask(self, parameter: nn.Parameter, mask: Tensor) -> Tensor:
        if all(parameter is not owned for owned in self.params):
            raise RequestError(f"the update mask of {self.name!r} names a parameter that this optimiser does not own")
        try:
            return mask.to(parameter.device).expand(parameter.shape)
        except RuntimeError as error:
            raise RequestError(
                f"an update mask of {self.name!r} has shape {tuple(mask.shape)}, its parameter {tuple(parameter.shape)}"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """The state of every parameter, by its place among the owned; rates and groups follow from `optim`."""
        return {"state": self.optimizer.state_dict()["state"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        stored = state["state"]
        for place, entries in stored.items():
            if place >= len(self.params):
                raise CheckpointError(f"the stored state of the optimiser {self.name!r} is of other parameters")
            for value in entries.values():
                if isinstance(value, Tensor) and value.dim() and value.shape != self.params[place].shape:
                    raise CheckpointError(f"the stored state of the optimiser {self.name!r} is of other parameters")
        placed = {
            place: {key: _like_parameter(value, self.params[place]) for key, value in entries.items()}
            for place, entries in stored.items()
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": placed, "param_groups": groups})

    def held_gradients(self) -> list[Tensor | None]:
        """Gradients that wait, in the order of the parameters; none if nothing is held."""
        return [parameter.grad for parameter in self.params] if self.held else []

    def load_held_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        if gradients:
            self.held = True
            for parameter, gradient in zip(self.params, gradients, strict=True):
                placed = place_like(gradient, parameter)
                parameter.grad = None if placed is None else placed.to(parameter.device, copy=True)


def _groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameter groups with lists, each parameter once."""
    items = list(params)
    raw = items if items and isinstance(items[0], Mapping) else [{"params": items}]
    seen: set[nn.Parameter] = set()
    groups = []
    for group in raw:
        members = []
        for parameter in group["params"]:
            if parameter not in seen:
                seen.add(parameter)
                members.append(parameter)
        if members:
            groups.append({**group, "params": members})
    return groups


def _masked(old: Tensor, new: Tensor, mask: Tensor) -> Tensor:
    """The step times the mask: exactly the old bits where it is 0, exactly the new where it is 1."""
    if mask.dtype == torch.bool:
        return torch.where(mask, new, old)
    partly = old + (new - old) * mask.to(old.dtype)
    return torch.where(mask == 0, old, torch.where(mask == 1, new, partly))


def _like_parameter(value: Any, parameter: nn.Parameter) -> Any:
    same = isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape
    return place_like(value, parameter) if same else value
