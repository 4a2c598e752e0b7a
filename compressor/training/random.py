"""Random numbers as functions of (seed, phase, step, tag, place): nothing to save, alike on any number of processes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Randomness", "hash_seed"]


def hash_seed(*parts: int | str) -> int:
    """Return an integer in [0, 2^63) that depends on the parts alone, the same in every Python process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Randomness:
    """All randomness of a run.

    Args:
        seed: The run's seed.
        rank: This process.
        processes: Number of processes.

    Attributes:
        phase: Name of the phase at work, e.g. "0-ppcl/depth"; set by the engine.
    """

    def __init__(self, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.seed, self.rank, self.processes = seed, rank, processes
        self.phase = ""

    def seed_of(self, i: int, tag: str = "", shared: bool = True) -> int:
        """An integer in [0, 2^63) from (seed, phase, i, tag), and from the rank too unless ``shared``."""
        return hash_seed(self.seed, self.phase, i, tag, "all" if shared else self.rank)

    def generator(self, i: int, tag: str = "", shared: bool = False) -> torch.Generator:
        """A fresh CPU generator seeded with `seed_of`."""
        return torch.Generator().manual_seed(self.seed_of(i, tag, shared))

    def normal(self, i: int, shape: Sequence[int], tag: str = "") -> Tensor:
        """Standard normal noise, float32, on the CPU.

        Args:
            i: Step.
            shape: (B, ...) of this process. Row b depends on (seed, phase, i, tag, rank * B + b) alone: two processes
                with batch B see exactly the noise of one process with batch 2B.
            tag: Draws of different tags are independent.
        """
        rows = np.empty(tuple(shape), np.float32)
        bits = self._philox(i, tag, "normal")
        state, generator = bits.state, np.random.Generator(bits)
        for row in range(rows.shape[0]):
            # Setting the counter is three times as fast as making a generator for every row.
            state["state"]["counter"][:] = (0, 0, 0, self.rank * rows.shape[0] + row)
            bits.state = state
            rows[row] = generator.standard_normal(rows.shape[1:], dtype=np.float32)
        return torch.from_numpy(rows)

    def uniform(self, i: int, size: int, tag: str = "") -> Tensor:
        """``size`` uniform numbers in [0, 1), float32, on the CPU; number b depends on its place as in `normal`."""
        start = self.rank * size
        numbers = np.random.Generator(self._philox(i, tag, "uniform")).random(start + size, dtype=np.float32)
        return torch.from_numpy(numbers[start:].copy())

    def seed_global(self, i: int, tag: str, *, shared: bool, device: torch.device) -> None:
        """Seed the global generators of torch, numpy and Python, which serve dropout, initialisation and libraries."""
        seed = self.seed_of(i, tag, shared)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        if device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every backend: 100 us a step
        else:
            torch.manual_seed(seed)

    def _philox(self, i: int, tag: str, kind: str) -> Any:
        text = repr((self.seed, self.phase, i, tag, kind)).encode()
        key = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.uint64)
        return np.random.Philox(key=key)
