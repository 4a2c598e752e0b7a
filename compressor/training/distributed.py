"""The processes of a run: who this one is, and the few collectives that training needs. Nothing is wrapped in DDP."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError, RequestError

__all__ = ["Distributed", "device_problem", "is_sharded"]

T = TypeVar("T")
_BUCKET = 16 * 1024 * 1024  # elements of a flat gradient bucket: large enough for bandwidth, small beside a model


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor (FSDP, tensor parallel): its gradient is reduced where it is made."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def device_problem(name: str) -> str:
    """Why there is no computing on a device ("cuda", "cuda:1", "mps", ...) of this machine; empty where there is."""
    device = torch.device(name)
    if device.type == "cpu":
        return ""
    library = getattr(torch, device.type)
    there = torch.backends.mps.is_available() if device.type == "mps" else library.is_available()
    if not there:
        return f"device {name}: PyTorch {torch.__version__} sees none here; --device auto takes the best that there is"
    if device.index is not None and device.index >= library.device_count():
        return f"device {name}: there are {library.device_count()}, counted from 0"
    return ""


class Distributed:
    """This process among those started by ``accelerate launch`` (or alone, when not launched).

    Args:
        device: "cpu", "cuda", ...; None takes the best there is. With several GPUs each process gets its own.

    Raises:
        RequestError: There is no such device here, or the processes were started on another one.

    Attributes:
        rank: Number of this process.
        processes: How many there are.
        device: Where this process computes.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        from accelerate import PartialState

        if device is not None and (problem := device_problem(str(device))):
            raise RequestError(problem)
        wanted = None if device is None else torch.device(device)
        asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")  # accelerate launch --cpu
        if wanted is None and (asked_for_cpu or not torch.accelerator.is_available()):
            wanted = torch.device("cpu")  # told nothing, accelerate would not look for the other processes of a CPU
        # The longest wait is for a process that computes or writes alone.
        state = PartialState(cpu=wanted is not None and wanted.type == "cpu", timeout=timedelta(hours=2))
        self.rank, self.processes = state.process_index, state.num_processes
        self.device: torch.device = state.device if wanted is None or self.processes > 1 else wanted
        if self.device.type == "cpu":
            self.device = torch.device("cpu")
        if self.processes > 1:
            atexit.register(self.close)  # a process that leaves without a word can take the others down
        if wanted is not None and wanted.type != self.device.type:
            raise RequestError(f"the processes were started on {self.device.type}, not {wanted.type}")

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Distributed:
        """One process alone, without asking the environment: for library use and tests."""
        alone = cls.__new__(cls)
        alone.rank, alone.processes, alone.device = 0, 1, torch.device(device)
        return alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, n: int) -> range:
        """The part of range(n) of this process: contiguous, in the order of ranks, sizes differing by one at most."""
        return range(n * self.rank // self.processes, n * (self.rank + 1) // self.processes)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.processes > 1:
            torch.distributed.barrier()

    def reduce(self, x: Tensor, op: Literal["mean", "sum"] = "mean") -> Tensor:
        """Mean or sum over the processes: a new tensor without history, equal on all of them."""
        if op not in ("mean", "sum"):
            raise RequestError(f"processes reduce by 'mean' or 'sum', got {op!r}")
        if op == "mean" and not x.is_floating_point():
            x = x.float()
        if self.processes == 1:
            return x.detach().clone()
        total = x.detach().to(self.device, copy=True).contiguous()
        if total.dtype == torch.bool:
            total = total.long()
        self._all_reduce(total)
        return (total / self.processes if op == "mean" else total).to(x.device)

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate a tensor of every process along the first axis, in the order of ranks; lengths may differ."""
        x = x.detach()
        if x.dim() == 0:
            x = x.reshape(1)
        if self.processes == 1:
            return x.clone()
        local = x.to(self.device).contiguous()
        lengths = self._all_gather(torch.tensor([len(local)], device=self.device)).tolist()
        padded = local.new_zeros((max(lengths), *local.shape[1:]))
        padded[: len(local)] = local
        flat = self._all_gather(padded.to(torch.uint8) if padded.dtype == torch.bool else padded)
        parts = flat.reshape(self.processes, max(lengths), *local.shape[1:])
        rows = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
        return rows.to(x.device, x.dtype)

    def all(self, flag: bool) -> bool:
        """Whether the flag is true on every process."""
        if self.processes == 1:
            return flag
        return int(self.reduce(torch.tensor(int(flag)), "sum")) == self.processes

    def broadcast_object(self, x: T) -> T:
        """The main process's value, on every process."""
        if self.processes == 1:
            return x
        box = [x]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the main process do something while the others wait; all return its result or raise its failure.

        Raises:
            CompressorError: What the main process raised.
        """
        if self.processes == 1:
            return work()
        outcome: tuple[bool, T | Exception | None] = (True, None)
        if self.is_main:
            try:
                outcome = (True, work())
            except (CompressorError, OSError) as error:
                outcome = (False, error)
        succeeded, value = self.broadcast_object(outcome)
        if not succeeded:
            raise cast(Exception, value)
        return cast(T, value)

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients over the processes, in flat buckets of one type and device.

        A gradient that is absent on some processes counts as zeros there; one absent everywhere stays absent. Gradients
        of sharded parameters are reduced already and left alone.
        """
        if self.processes == 1:
            return
        owned = [p for p in parameters if not is_sharded(p)]
        if not owned:
            return
        present = self.reduce(torch.tensor([p.grad is not None for p in owned]), "sum").tolist()
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for parameter, count in zip(owned, present, strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                kinds.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter.grad)
        for gradients in kinds.values():
            for bucket in _buckets(gradients):
                self._reduce_bucket(bucket)

    def reduce_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Average floating tensors over the processes, in place."""
        if self.processes > 1:
            for tensor in tensors:
                tensor.copy_(self.reduce(tensor))

    @torch.no_grad()
    def _reduce_bucket(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._all_reduce(flat)
        flat /= self.processes
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _all_reduce(self, tensor: Tensor) -> None:
        """Sum in place. Halves are summed in float32 where the backend would do it on the CPU."""
        if tensor.dtype in (torch.float16, torch.bfloat16) and tensor.device.type == "cpu":
            wide = tensor.float()
            torch.distributed.all_reduce(wide)
            tensor.copy_(wide)
        else:
            torch.distributed.all_reduce(tensor)

    def _all_gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.processes)]
        torch.distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    def close(self) -> None:
        """Leave the group of processes, at the end of a run."""
        if self.processes > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if buckets[-1] and size + tensor.numel() > _BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets
