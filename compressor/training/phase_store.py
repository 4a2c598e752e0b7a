"""Where a phase's results and checkpoints lie, and which of them may be used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError
from compressor.training.checkpoint import describe, load, pack, write
from compressor.training.distributed import Distributed
from compressor.training.phase import Compute, Optim, Train

__all__ = ["PhaseStore", "file_name", "phase_fingerprint"]

_KEPT_CHECKPOINTS = 2  # the newest and the one before it, in case the newest gets damaged


class PhaseStore:
    """The directory of one phase: ``finished/``, ``optimizers/`` and ``step-N/``. The main process writes.

    Args:
        directory: Of the phase.
        fingerprint: What is stored must bear it, otherwise it is of another configuration and not used.
        phase: Its name, for messages.
        distributed: The processes.
        stale: Called with the path of a stored result or checkpoint that does not match.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: str,
        phase: str,
        distributed: Distributed,
        stale: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.directory, self.fingerprint = directory, fingerprint
        self._phase, self._distributed, self._stale = phase, distributed, stale
        self._finished, self._optimizers = directory / "finished", directory / "optimizers"

    def finished(self) -> bool:
        """Whether the phase is done; clears away what a kill left half written."""

        def look() -> bool:
            for rest in self.directory.glob(".*"):
                shutil.rmtree(rest, ignore_errors=True)
            return self._matches(self._finished)

        return self._distributed.on_main(look)

    def load_finished(self) -> Any:
        """What `finish` stored."""
        return self._load(self._finished, f"remove {self.directory} to do the phase again")

    def finish(self, value: Any, optimizers: Any = None) -> None:
        """Store the result of the phase, then drop its checkpoints."""
        if optimizers is not None:
            self._write(self._optimizers, optimizers)
        self._write(self._finished, value)
        self._distributed.on_main(lambda: self._drop(self._checkpoints()))

    def load_optimizers(self) -> Any:
        """The optimisers' state at the end of the phase.

        Raises:
            CheckpointError: It is no longer kept.
        """
        if not self._distributed.on_main(lambda: self._matches(self._optimizers)):
            raise CheckpointError(
                f"the optimisers of phase {self._phase!r} are no longer kept, but the next phase goes on with them: "
                f"remove {self.directory} to do it again"
            )
        return self._load(self._optimizers, f"remove {self.directory} to do the phase again")

    def drop_optimizers(self) -> None:
        """Remove the optimisers' state, which no later phase needs."""
        self._distributed.on_main(lambda: self._drop([self._optimizers]))

    def checkpoint(self) -> Any:
        """The newest checkpoint, or None.

        Raises:
            CheckpointError: It is damaged; the message says what to go on from instead.
        """
        found = self._distributed.on_main(self._newest)
        return None if found is None else self._load(*found)

    def save_checkpoint(self, step: int, value: Any) -> None:
        """Write a checkpoint after ``step`` steps, then drop the oldest."""
        self._write(self.directory / f"step-{step:08d}", value)
        self._distributed.on_main(lambda: self._drop(self._checkpoints()[:-_KEPT_CHECKPOINTS]))

    def _newest(self) -> tuple[Path, str] | None:
        paths = self._checkpoints()
        advice = "start the phase again"
        if len(paths) > 1:
            advice = f"go on from step {int(paths[-2].name.removeprefix('step-'))}"
        if not paths:
            return None
        advice = f"remove {paths[-1]} to {advice}"
        if self._matches(paths[-1], advice):
            return paths[-1], advice
        self._drop(paths)
        return None

    def _checkpoints(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"))

    def _matches(self, path: Path, advice: str = "") -> bool:
        if not path.exists():
            return False
        about = self._advised(lambda: describe(path), advice or f"remove {self.directory} to do the phase again")
        if about.get("fingerprint") == self.fingerprint:
            return True
        self._stale(path)
        return False

    def _load(self, path: Path, advice: str) -> Any:
        return self._advised(lambda: load(path), advice)

    def _advised(self, read: Callable[[], Any], advice: str) -> Any:
        try:
            return read()
        except CheckpointError as error:
            raise CheckpointError(f"{error}: {advice}") from error

    def _write(self, path: Path, value: Any) -> None:
        tree, tensors = pack(value)  # on all processes: a sharded tensor is gathered by all
        about = {"fingerprint": self.fingerprint, "phase": self._phase}
        self._distributed.on_main(lambda: write(path, tree, tensors, about))

    @staticmethod
    def _drop(paths: list[Path]) -> None:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)


def file_name(text: str) -> str:
    """A phase's name as the name of a directory."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".") or "_"


def phase_fingerprint(before: str, phase: Train | Compute) -> str:
    """What a stored phase must bear to be used: what it was asked, and all before it.

    Callables cannot be compared, so schedules are sampled, and code and data count through the run's own fingerprint.
    """
    facts: dict[str, Any] = {"before": before, "kind": type(phase).__name__, "name": phase.name, "key": phase.key}
    if isinstance(phase, Train):
        facts |= {
            "steps": phase.steps,
            "optimizers": {name: _optim_facts(optim, phase.steps) for name, optim in phase.optimizers.items()},
            "streams": {name: _stream_facts(stream) for name, stream in phase.streams.items()},
            "state": sorted(phase.state),
            "validate": [phase.validate is not None, phase.validate_every, type(phase.keep).__name__],
            "carry": sorted(phase.carry),
        }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=repr).encode(), digest_size=16).hexdigest()


def _optim_facts(optim: Optim, steps: int) -> dict[str, Any]:
    # What is a one-way iterator (``module.parameters()``) is still needed afterwards.
    items: list[Any] = list(optim.params)
    optim.params = [{**item, "params": list(item["params"])} if isinstance(item, dict) else item for item in items]
    groups = [
        {**item, "params": [tuple(parameter.shape) for parameter in item["params"]]}
        if isinstance(item, dict)
        else {"params": [tuple(item.shape)]}
        for item in optim.params
    ]
    return {
        "kind": optim.kind,
        "lr": optim.lr,
        "options": optim.options,
        "schedule": [optim.schedule(max(steps - 1, 0) * part // 8) for part in range(9)],
        "limits": [optim.clip_norm, optim.clip_value, optim.clean, optim.update_mask is not None],
        "groups": groups,
    }


def _stream_facts(stream: Any) -> list[Any]:
    sampler, info = getattr(stream, "sampler", None), getattr(getattr(stream, "dataset", None), "info", None)
    kind = repr(sampler) if dataclasses.is_dataclass(sampler) else type(sampler).__qualname__
    return [getattr(stream, "size", None), getattr(stream, "seed", None), kind, getattr(info, "fingerprint", None)]
