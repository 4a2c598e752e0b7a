"""Memories that a method carries from step to step: feature queues and running means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.errors import RequestError

__all__ = ["FeatureQueue", "RunningMean"]


class FeatureQueue:
    """The last ``size`` feature rows, oldest overwritten first.

    Args:
        dimension: Length of a row; 0 for a queue of plain numbers such as identifiers.
        size: Number of rows.
        initial: Rows ``(size, dimension)`` that fill the queue at the start; without it `keys` grows from nothing.
        dtype: Type of the rows.
        device: Where they live.
    """

    def __init__(
        self,
        dimension: int,
        size: int,
        *,
        initial: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1:
            raise RequestError(f"a queue holds at least one row, got {size}")
        self.size = size
        shape = (size, dimension) if dimension else (size,)
        self._rows = torch.zeros(shape, dtype=dtype, device=device)
        self.position, self.filled = 0, 0
        if initial is not None:
            if initial.shape != self._rows.shape:
                raise RequestError(f"the queue starts with rows {tuple(shape)}, got {tuple(initial.shape)}")
            self._rows.copy_(initial)
            self.filled = size

    @property
    def keys(self) -> Tensor:
        """A copy of the filled rows ``(n, dimension)``, in storage order: later pushes do not touch it."""
        return self._rows[: self.filled].clone()

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Append rows ``(n, dimension)``; with several processes, push what was gathered from all."""
        if rows.shape[1:] != self._rows.shape[1:]:
            raise RequestError(f"the queue holds rows {tuple(self._rows.shape[1:])}, got {tuple(rows.shape[1:])}")
        rows = rows.detach()[-self.size :].to(self._rows)
        places = (torch.arange(len(rows), device=self._rows.device) + self.position) % self.size
        self._rows[places] = rows
        self.position = (self.position + len(rows)) % self.size
        self.filled = min(self.filled + len(rows), self.size)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows, "position": self.position, "filled": self.filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rows"].shape != self._rows.shape:
            raise RequestError(
                f"the stored queue is {tuple(state['rows'].shape)}, this one is {tuple(self._rows.shape)}"
            )
        self._rows.copy_(state["rows"])
        self.position, self.filled = int(state["position"]), int(state["filled"])


class RunningMean:
    """An exponential mean, e.g. the center of teacher logits: ``value <- momentum * value + (1 - momentum) * mean``.

    Args:
        shape: Shape of the mean, e.g. (1, K).
        momentum: In [0, 1).
        device: Where it lives.
    """

    def __init__(self, shape: Sequence[int], momentum: float = 0.9, device: torch.device | str = "cpu") -> None:
        if not 0 <= momentum < 1:
            raise RequestError(f"the momentum of a running mean is in [0, 1), got {momentum}")
        self.momentum = momentum
        self.value = torch.zeros(tuple(shape), device=device)

    @torch.no_grad()
    def update(self, mean: Tensor) -> None:
        """Take in the mean of this step (of all processes: reduce it first)."""
        new = mean.detach().to(self.value).reshape(self.value.shape)
        self.value = torch.lerp(self.value, new, 1 - self.momentum)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"].to(self.value).clone()
