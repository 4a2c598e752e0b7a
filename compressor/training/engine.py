"""The training engine: runs a method's phases, saves them, and goes on to the same bits after a kill.

Its rules: a loss reaches the parameters of its update's owners alone; a step goes on after its owners have stepped;
gradients are averaged over the processes at the update, so nothing is wrapped; all randomness is a function of seed,
phase and step.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compressor.atomic import write_json
from compressor.errors import InterruptedRunError, RequestError
from compressor.training.batches import Batches
from compressor.training.distributed import Distributed
from compressor.training.heap import heap_kept
from compressor.training.interruption import Interruption
from compressor.training.phase import Compute, Phases, Train
from compressor.training.phase_store import PhaseStore, file_name, phase_fingerprint
from compressor.training.progress import ProgressBar
from compressor.training.random import Randomness
from compressor.training.train_run import TrainRun, apply_modes, load_state, state_of

__all__ = ["Engine"]

Curves = dict[str, list[tuple[int, float]]]


class Engine:
    """Runs phases.

    Args:
        directory: Where results and checkpoints go; nothing else may be in it.
        distributed: The processes.
        randomness: All random numbers; the engine sets its ``phase``.
        fingerprint: Of everything that the phases depend on and do not show: configuration, models, data, code.
        log: Called with an event (a flat dict with "event" and "phase") on the main process.
        checkpoint_seconds: Longest time between two checkpoints within a phase.
        checkpoint_steps: Write one every so many steps, too.
        log_seconds: Time between two "progress" events.
        progress: Show a progress bar.
        loader_threads: Threads that make batches ahead; 0 makes each when its step begins.
        precision: "bf16" runs the steps (not the backward, nor the update) under autocast.
        replay: Only read: finished phases are loaded, other results are computed but not stored, and training is
            refused. So another student of the same training is made.

    Attributes:
        history: ``{phase: {loss: [(steps done, mean)]}}``, at most about 500 points each; also in ``history.json``.
    """

    def __init__(
        self,
        directory: Path,
        *,
        distributed: Distributed,
        randomness: Randomness,
        fingerprint: str,
        log: Callable[[dict[str, Any]], None] | None = None,
        checkpoint_seconds: float = 60,
        checkpoint_steps: int | None = None,
        log_seconds: float = 10,
        progress: bool = False,
        loader_threads: int = 0,
        precision: Literal["fp32", "bf16"] = "fp32",
        replay: bool = False,
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise RequestError(f"the precision of training is 'fp32' or 'bf16', got {precision!r}")
        if checkpoint_steps is not None and checkpoint_steps < 1:
            raise RequestError(f"checkpoint_steps counts from 1, got {checkpoint_steps}")
        self.directory = Path(directory)
        self.history: dict[str, Curves] = {}
        self._distributed, self._randomness = distributed, randomness
        self._chain, self._log_to = fingerprint, log
        self._checkpoint_seconds, self._checkpoint_steps = checkpoint_seconds, checkpoint_steps
        self._log_seconds, self._progress = log_seconds, progress and distributed.is_main
        self._precision, self._replay, self._loader_threads = precision, replay, loader_threads
        self._interruption = Interruption()
        self._before: PhaseStore | None = None  # of the Train phase before this one

    def run(self, phases: Phases, prefix: str = "") -> None:
        """Run all phases, or load those that are done and go on with the one under way.

        Args:
            phases: What ``Method.phases`` returned.
            prefix: Distinguishes the methods of a chain, e.g. "0-ppcl/".

        Raises:
            InterruptedRunError: The user or the machine stopped it; it is saved as far as possible.
            DivergedError: Losses or gradients stayed non-finite.
            CheckpointError: Something stored is damaged, or cannot be written.
            RequestError: The method asks for something impossible.
        """
        self._before, answer, names = None, None, set()
        doing = f"{prefix}start"
        with self._interruption:
            try:
                for number in itertools.count():
                    self._seed(f"{prefix}build-{number}")
                    try:
                        phase = phases.send(answer)
                    except StopIteration:
                        break
                    if phase.name in names:
                        raise RequestError(f"two phases are named {phase.name!r}")
                    names.add(phase.name)
                    doing = f"{prefix}{phase.name}"
                    directory = self.directory / prefix / f"{number:02d}-{file_name(phase.name)}"
                    answer = self._run_phase(phase, doing, directory)
            except KeyboardInterrupt:
                raise InterruptedRunError(
                    f"stopped in phase {doing!r}; run the same command again to go on from what was saved last"
                ) from None
        if self._before is not None:
            self._before.drop_optimizers()

    def _run_phase(self, phase: Train | Compute, name: str, directory: Path) -> dict[str, Tensor] | None:
        self._chain = phase_fingerprint(self._chain, phase)
        self._seed(name)
        store = PhaseStore(directory, self._chain, name, self._distributed, lambda path: self._stale(name, path))
        if isinstance(phase, Compute):
            return self._compute(phase, name, store)
        if phase.steps < 0:
            raise RequestError(f"phase {name!r} cannot have {phase.steps} steps")
        if phase.steps > 0:
            self._train(phase, name, store)
            if self._before is not None:
                self._before.drop_optimizers()
            self._before = store
        return None

    def _compute(self, phase: Compute, name: str, store: PhaseStore) -> dict[str, Tensor]:
        if store.finished():
            self._log("phase-loaded", name)
        elif self._replay:
            return {key: value.detach().cpu().contiguous() for key, value in _as_tensors(phase.run(), name).items()}
        else:
            self._log("phase-start", name, kind="compute")
            started = time.monotonic()
            store.finish(_as_tensors(phase.run(), name))
            self._log("phase-end", name, seconds=time.monotonic() - started)
        # Read back even when it was computed just now: the method sees the same in both cases.
        result: dict[str, Tensor] = store.load_finished()
        return result

    def _train(self, phase: Train, name: str, store: PhaseStore) -> None:
        if store.finished():
            stored = store.load_finished()
            load_state(dict(phase.state), stored["state"], name)
            apply_modes(phase)
            self.history[name] = _points(stored["history"])
            self._log("phase-loaded", name)
            return
        if self._replay:
            raise RequestError(f"phase {name!r} would have to be trained anew for that: start a run of its own")
        restored = store.checkpoint()
        carried = self._carried(phase, name) if restored is None else {}

        def on_skip(step: int, cause: str) -> None:
            self._log("skipped", name, step=step, cause=cause)

        run = TrainRun(phase, name, self._distributed, self._randomness, self._precision, restored, carried, on_skip)
        del restored, carried  # as large as the models
        self._log("phase-start", name, kind="train", steps=phase.steps, step=run.done)
        started = time.monotonic()
        self._interruption.patient = True
        try:
            self._steps(run, store)
            run.finish()
            self._record(run)
            value = {"state": state_of(dict(phase.state)), "history": run.history.curves}
            store.finish(value, optimizers=run.optimizer_state())
        finally:
            self._interruption.patient = False
        self._log("phase-end", name, step=run.done, seconds=time.monotonic() - started, **_flat(run.history.latest()))
        if self._anywhere(self._interruption.asked)[0]:
            raise InterruptedRunError(f"stopped after phase {name!r}; run the same command again to go on")

    def _steps(self, run: TrainRun, store: PhaseStore) -> None:
        steps, saved, logged, logged_step = run.phase.steps, time.monotonic(), time.monotonic(), run.done
        with (
            heap_kept(),
            ProgressBar(run.name, run.done, steps, self._progress) as bar,
            Batches(run.phase.streams, steps, self._loader_threads) as batches,
        ):
            while run.done < steps:
                run.step(batches)
                if run.validation_due():
                    self._log("validation", run.name, step=run.done, score=run.validate())
                now = time.monotonic()
                stop, save = self._decide(run.done, now - saved)
                if run.done < steps and (stop or save):
                    store.save_checkpoint(run.done, run.snapshot())
                    self._record(run)
                    saved = time.monotonic()
                    self._log("checkpoint", run.name, step=run.done, seconds=saved - now)
                if run.done < steps and stop:
                    raise InterruptedRunError(
                        f"saved at step {run.done} of phase {run.name!r}; run the same command again to go on"
                    )
                bar.update(run.done, run.history.latest())
                if now - logged >= self._log_seconds:
                    rate = (run.done - logged_step) / (now - logged)
                    self._log("progress", run.name, step=run.done, steps_per_second=rate, **_flat(run.history.latest()))
                    logged, logged_step = now, run.done

    def _decide(self, done: int, seconds: float) -> tuple[bool, bool]:
        """(stop, save), the same on all processes: any may be told to stop, the main one looks at the clock."""
        due = self._checkpoint_steps is not None and done % self._checkpoint_steps == 0
        late = self._distributed.is_main and seconds >= self._checkpoint_seconds
        stop, late = self._anywhere(self._interruption.asked, late)
        return stop, due or late

    def _anywhere(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true if it is on any process."""
        if self._distributed.processes == 1:
            return flags
        counts = self._distributed.reduce(torch.tensor([int(flag) for flag in flags]), "sum")
        return tuple(count > 0 for count in counts.tolist())

    def _carried(self, phase: Train, name: str) -> dict[str, Any]:
        if not phase.carry:
            return {}
        states = self._before.load_optimizers() if self._before is not None else {}
        for optimizer in phase.carry:
            if optimizer not in phase.optimizers or optimizer not in states:
                raise RequestError(
                    f"phase {name!r} carries on the optimiser {optimizer!r}: it and the phase before must both have it"
                )
        return {optimizer: states[optimizer] for optimizer in phase.carry}

    def _seed(self, phase: str) -> None:
        self._randomness.phase = phase
        self._randomness.seed_global(0, "phase", shared=True, device=self._distributed.device)

    def _record(self, run: TrainRun) -> None:
        self.history[run.name] = _points(run.history.curves)
        self._distributed.on_main(lambda: write_json(self.directory / "history.json", self.history))

    def _stale(self, name: str, path: Path) -> None:
        if self._replay:  # another student is asked for: its results are others
            return
        self._log("phase-stale", name, path=str(path), reason="made by another configuration; doing it again")

    def _log(self, event: str, phase: str, **facts: Any) -> None:
        if self._log_to is not None and self._distributed.is_main:
            self._log_to({"event": event, "phase": phase, **facts})


def _as_tensors(result: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    if not isinstance(result, Mapping):
        raise RequestError(f"phase {name!r} must return named arrays, not {type(result).__name__}")
    tensors = {}
    for key, value in result.items():
        try:
            tensors[key] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        except TypeError as error:
            raise RequestError(f"the result {key!r} of phase {name!r} is no tensor or array of numbers") from error
    return tensors


def _points(curves: Mapping[str, Any]) -> Curves:
    return {loss: [(int(step), float(value)) for step, value in points] for loss, points in curves.items()}


def _flat(losses: Mapping[str, float]) -> dict[str, float]:
    return {f"loss/{name}": value for name, value in losses.items()}
