"""Teacher outputs kept on disk: computed once for a batch, read by every later epoch and every later run.

A batch is a pure function of the data, the augmentation's seed and its number, so its outputs are kept under the
number: what is read back is, bit by bit, what the teacher would say of the same batch again. The key names the
teacher's weights and all that makes the batch; within a run a batch comes back when the training repeats its ``views``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.atomic import write_json
from compressor.cache import cache_directory
from compressor.data.stream import Stream
from compressor.errors import CompressorError
from compressor.models.image_network import ImageNetwork
from compressor.models.model import Model

__all__ = ["OutputCache", "TeacherLogits", "keep_top", "model_hash", "restore_top"]

log = logging.getLogger("compressor")


class OutputCache:
    """Arrays of one size by number, in one file that is read through a memory map.

    Every record carries a checksum: one that a kill cut short, or that is damaged, counts as absent.

    Args:
        directory: Made if needed; the file grows with the largest number written.
        shape: Of a record, float32.
        about: JSON for people, written beside it.
    """

    def __init__(self, directory: Path, shape: Sequence[int], about: Mapping[str, Any] | None = None) -> None:
        self.shape = tuple(shape)
        self._size = 4 * int(np.prod(self.shape))
        self.path = Path(directory) / "outputs"
        self._map: mmap.mmap | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._file = open(self.path, "r+b")  # noqa: SIM115 - lives as long as the cache
        except OSError as error:
            raise CompressorError(f"cannot keep teacher outputs in {self.path}: {error.strerror or error}") from error
        if about is not None:
            write_json(self.path.with_name("about.json"), dict(about))

    def read(self, number: int) -> np.ndarray[Any, Any] | None:
        """A copy of a record, or None where there is none."""
        start, stop = self._place(number)
        if self._map is None or len(self._map) < stop:
            self._map = self._mapped()
        if self._map is None or len(self._map) < stop:
            return None
        record = self._map[start:stop]
        content, checksum = record[:-4], int.from_bytes(record[-4:], "little")
        if checksum != _checksum(content):
            return None
        return np.frombuffer(content, np.float32).reshape(self.shape).copy()

    def write(self, number: int, value: np.ndarray[Any, Any]) -> None:
        """Keep a record.

        Raises:
            OSError: The disk is full.
        """
        content = np.ascontiguousarray(value, np.float32).tobytes()
        self._file.seek(self._place(number)[0])
        # Written, not mapped: on a full disk a map kills the process.
        self._file.write(content + _checksum(content).to_bytes(4, "little"))
        self._file.flush()

    def _place(self, number: int) -> tuple[int, int]:
        return number * (self._size + 4), (number + 1) * (self._size + 4)

    def _mapped(self) -> mmap.mmap | None:
        if self.path.stat().st_size == 0:
            return None
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)


class TeacherLogits:
    """The logits that teachers give to the batches of a stream, without gradients.

    Args:
        teachers: One or more, in eval mode.
        classes: Number of their classes.
        stream: Whose batches they see.
        key: JSON; what makes the batches (see `compressor.training.training_config.stream_key`).
        cache: Keep the logits on disk, and read those that are kept.
        top_k: Keep only so many logits of an image; the mass of the others is spread evenly over them. With and without
            the cache the result is the same.
        positions: (H, W) where the logits are maps (B, classes, H, W).
    """

    def __init__(
        self,
        teachers: Sequence[ImageNetwork],
        classes: int,
        stream: Stream,
        key: Mapping[str, Any],
        *,
        cache: bool = False,
        top_k: int | None = None,
        positions: tuple[int, ...] = (),
    ) -> None:
        self.teachers, self.classes, self.positions = list(teachers), classes, positions
        self.top_k = top_k if top_k is not None and top_k < classes else None
        self._period, self._size, self._key = stream.period, stream.size, dict(key)
        self._caches: dict[int, OutputCache] | None = {} if cache else None

    def __call__(self, pixels: Tensor, i: int) -> Tensor:
        """Logits (teachers, B, classes, ...), float32, of batch i, whose pixels are given."""
        return torch.stack([self.one(place, pixels, i) for place in range(len(self.teachers))])

    def one(self, place: int, pixels: Tensor, i: int) -> Tensor:
        """Logits (B, classes, ...), float32, of one of the teachers."""
        number = i if self._period is None else i % self._period
        cache = self._cache(place, pixels) if self._caches is not None else None
        known = cache.read(number) if cache is not None else None
        packed = self._ask(place, pixels) if known is None else torch.from_numpy(known).to(pixels.device)
        if cache is not None and known is None:
            self._keep(cache, number, packed)
        return packed if self.top_k is None else restore_top(packed, self.classes)

    @torch.no_grad()
    def _ask(self, place: int, pixels: Tensor) -> Tensor:
        logits = self.teachers[place](pixels).float()
        return logits if self.top_k is None else keep_top(logits, self.top_k)

    def _cache(self, place: int, pixels: Tensor) -> OutputCache:
        assert self._caches is not None
        if place not in self._caches:
            autocast = str(torch.get_autocast_dtype(pixels.device.type)) if torch.is_autocast_enabled() else None
            about = {
                **self._key,
                "teacher": model_hash(self.teachers[place].model),
                "top_k": self.top_k,
                "computed": [pixels.device.type, autocast, torch.__version__],
            }
            mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
            width = self.classes if self.top_k is None else 2 * self.top_k + 1
            directory = cache_directory() / "teacher-outputs" / mark
            self._caches[place] = OutputCache(directory, (self._size, width, *self.positions), about)
        return self._caches[place]

    def _keep(self, cache: OutputCache, number: int, packed: Tensor) -> None:
        try:
            cache.write(number, packed.cpu().numpy())
        except OSError as error:
            log.warning("teacher outputs are no longer kept in %s: %s", cache.path, error.strerror or error)
            self._caches = None


def keep_top(logits: Tensor, top_k: int) -> Tensor:
    """The largest logits of every row, where they stand, and the level of the others.

    Args:
        logits: (B, C, ...) float32.
        top_k: k, below C.

    Returns:
        (B, 2 k + 1, ...) float32: k logits, their k classes, and the logit that each of the other classes must have for
        their probabilities to add up to what they did.
    """
    values, classes = logits.topk(top_k, dim=1)
    others = logits.scatter(1, classes, float("-inf"))
    level = others.logsumexp(dim=1, keepdim=True) - math.log(logits.shape[1] - top_k)
    return torch.cat([values, classes.to(values.dtype), level], dim=1)


def restore_top(packed: Tensor, classes: int) -> Tensor:
    """What `keep_top` kept as logits (B, C, ...) again."""
    top_k = packed.shape[1] // 2
    values, places, level = packed.split([top_k, top_k, 1], dim=1)
    return level.repeat_interleave(classes, dim=1).scatter(1, places.long(), values)


def model_hash(model: Model) -> str:
    """A hash of a model's weights and of all that it does to its input."""
    info = model.info
    facts = [info.library, info.architecture, info.config, [asdict(change) for change in info.edits], info.extra]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, value in sorted(model.module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checksum(content: bytes) -> int:
    """A nonzero CRC-32: zeros, which an untouched part of a file reads as, never match."""
    return zlib.crc32(content) or 1
