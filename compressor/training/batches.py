"""The batches of a phase, made ahead by threads where that helps."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from compressor.data.stream import Batch, Stream

__all__ = ["Batches"]


class Batches:
    """Batch i of every stream, by name. It is a function of i alone, so it does not matter who makes it, and when.

    Args:
        streams: Sources by name.
        steps: No batch from here on is made ahead.
        threads: How many make batches, and how far ahead; 0 makes them when they are asked for.
    """

    def __init__(self, streams: Mapping[str, Stream], steps: int, threads: int = 0) -> None:
        self._streams, self._steps, self._threads = streams, steps, threads
        self._pool = ThreadPoolExecutor(threads, "batches") if threads and streams else None
        self._coming: dict[int, Future[dict[str, Batch]]] = {}

    def __getitem__(self, i: int) -> dict[str, Batch]:
        if self._pool is None:
            return self._make(i)
        for ahead in range(i, min(i + self._threads + 1, self._steps)):
            if ahead not in self._coming:
                self._coming[ahead] = self._pool.submit(self._make, ahead)
        return self._coming.pop(i).result()

    def _make(self, i: int) -> dict[str, Batch]:
        return {name: stream[i] for name, stream in self._streams.items()}

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
