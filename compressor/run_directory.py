"""One run's directory: locked while a process works in it, its recipe and the state of every stage on disk.

    runs/NAME/  recipe.yaml  run.json  checkpoints/  students/LINK/  student/  artifacts/TARGET/  report/  log.jsonl

Everything appears by write-to-temp then rename, so a kill at any moment leaves it whole. All that lies in a run's
directory belongs to the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from compressor import __version__
from compressor.atomic import write_json, write_text
from compressor.errors import CheckpointError, CompressorError, RequestError, RunLockedError
from compressor.plain_yaml import YAMLError, dump_yaml, load_yaml
from compressor.versions import installed_versions

__all__ = ["FREE_KEYS", "RunDirectory", "Stage", "fingerprint"]

SCHEMA = 1
FREE_KEYS = frozenset(
    {"benchmark", "checkpoint_seconds", "device", "evaluation", "name", "targets", "trust_remote_code"}
)
"""Recipe keys that may differ when a run goes on: they do not change the student, and the stages behind it know by
their own fingerprints what is to be done again."""

_LIBRARIES = ("numpy", "torch", "diffusers", "transformers", "timm", "accelerate", "onnx", "onnxruntime", "openvino")


def fingerprint(*parts: Any) -> str:
    """A hash of JSON values: a stage's part of the recipe, the hashes of its inputs, the stage before."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Stage:
    """A stage while it is worked on.

    Attributes:
        finished: It was done before with the same fingerprint: nothing is to be done.
        facts: JSON values kept with it; the finished stage's own, or those to be kept.
    """

    name: str
    finished: bool
    facts: dict[str, Any] = field(default_factory=dict)


class RunDirectory:
    """A run's directory, held by this process until `close`; use `create`, or `existing`.

    Attributes:
        path: The directory.
        leads: This process writes; the others of a launch only read.
    """

    def __init__(self, path: Path, lock: filelock.BaseFileLock | None, state: dict[str, Any], leads: bool) -> None:
        self.path, self.leads = path, leads
        self._lock, self._state = lock, state

    # -- opening --

    @classmethod
    def create(
        cls,
        path: Path,
        recipe: Mapping[str, Any],
        *,
        overwrite: bool = False,
        may_differ: Collection[str] = FREE_KEYS,
        leads: bool = True,
    ) -> RunDirectory:
        """Make a run's directory, or go on in one of the same recipe.

        Args:
            path: The directory; its parents are made.
            recipe: `Recipe.to_dict` of the resolved recipe.
            overwrite: Remove what another run left there.
            may_differ: Recipe keys that may have other values than before.
            leads: False on all processes of a launch but the first: they neither lock nor write.

        Raises:
            RequestError: The directory holds another recipe's run, or files that are no run.
            RunLockedError: Another process works there.
            CompressorError: It cannot be written.
            CheckpointError: Its ``run.json`` is damaged.
        """
        path = Path(path)
        if not leads:
            return cls(path, None, {}, leads=False)
        lock = _acquire(path)
        try:
            if overwrite:
                _clear(path)
            state = _read_state(path)
            if state is None:
                _refuse_foreign_files(path)
                state = {"schema": SCHEMA, "created": _now(), "stages": {}}
            else:
                _refuse_other_recipe(path, recipe, may_differ)
            command = [Path(sys.argv[0]).name, *sys.argv[1:]]
            state |= {"command": command, "started_in": os.getcwd(), "versions": _versions()}
            run = cls(path, lock, state, leads=True)
            run._write()
            write_text(path / "recipe.yaml", dump_yaml(recipe))
        except BaseException:
            _release(path, lock)
            raise
        return run

    @classmethod
    def existing(cls, path: Path, *, lock: bool = True) -> RunDirectory:
        """Open a directory that a run has made, to export, measure or report.

        Raises:
            RequestError: It holds no run.
            RunLockedError: Another process works there.
        """
        path = Path(path)
        if not (path / "run.json").is_file() or not (path / "recipe.yaml").is_file():
            raise RequestError(f"{path} holds no run: give the directory that `compress run` printed")
        held = _acquire(path) if lock else None
        state = _read_state(path)
        if state is None:
            raise RequestError(f"{path} holds no run: give the directory that `compress run` printed")
        return cls(path, held, state, leads=lock)

    def close(self) -> None:
        """Let others work here."""
        if self._lock is not None:
            _release(self.path, self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- contents --

    @property
    def recipe(self) -> dict[str, Any]:
        """The stored recipe, for `Recipe.parse`."""
        return _read_recipe(self.path)

    @property
    def checkpoints(self) -> Path:
        """Folder of the training engine."""
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        """Folder of the final model."""
        return self.path / "student"

    @property
    def results(self) -> Path:
        """Folder of what is handed over beside the model and its engines."""
        return self.path / "results"

    def link(self, name: str) -> Path:
        """Folder of a student that the chain made on its way."""
        return self.path / "students" / name

    @property
    def command(self) -> str:
        """The command line that the run was last started with."""
        return shlex.join(self._state.get("command", []))

    @contextlib.contextmanager
    def where_it_was_started(self) -> Iterator[None]:
        """The working directory that relative paths of the recipe count from, as long as it is there."""
        place = Path(self._state.get("started_in", os.curdir))
        with contextlib.chdir(place if place.is_dir() else os.curdir):
            yield

    @property
    def report(self) -> Path:
        """Folder of ``report.html``, ``.md`` and ``.json``."""
        return self.path / "report"

    @property
    def log(self) -> Path:
        """File of the events."""
        return self.path / "log.jsonl"

    def artifact(self, target: str) -> Path:
        """Folder of a target's artifact."""
        return self.path / "artifacts" / target

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """What is stored of each stage: state, fingerprint, seconds, facts."""
        if not self.leads:
            self._state = _read_state(self.path) or {}
        stages: dict[str, dict[str, Any]] = self._state.get("stages", {})
        return stages

    # -- stages --

    def done(self, name: str, mark: str) -> bool:
        """Whether a stage is finished and its fingerprint still holds."""
        stage = self.stages.get(name, {})
        return stage.get("state") == "done" and stage.get("fingerprint") == mark

    def facts(self, name: str) -> dict[str, Any]:
        """What a finished stage left to be remembered."""
        return dict(self.stages.get(name, {}).get("facts", {}))

    def mark(self, name: str, state: str, **values: Any) -> None:
        """Store a stage's state ("running", "done", "failed", "interrupted") and JSON values beside it.

        Raises:
            CompressorError: The disk is full or the directory cannot be written.
        """
        if self.leads:
            self._state.setdefault("stages", {})[name] = {"state": state, **values}
            self._write()

    @contextlib.contextmanager
    def stage(self, name: str, mark: str) -> Iterator[Stage]:
        """Work on a stage, unless it is finished: the block asks ``stage.finished``.

        Args:
            name: The stage.
            mark: Its `fingerprint`. A finished stage with another one is done again.
        """
        if self.done(name, mark):
            yield Stage(name, True, self.facts(name))
            return
        stage, began = Stage(name, False), time.monotonic()
        self.mark(name, "running", fingerprint=mark, started=_now())
        try:
            yield stage
        except BaseException as error:
            state = "failed" if isinstance(error, Exception) else "interrupted"
            message = " ".join(f"{type(error).__name__}: {error}".split())
            with contextlib.suppress(CompressorError):  # the disk may be what failed
                self.mark(name, state, fingerprint=mark, seconds=_since(began), error=message)
            raise
        self.mark(name, "done", fingerprint=mark, seconds=_since(began), finished=_now(), facts=stage.facts)

    def _write(self) -> None:
        write_json(self.path / "run.json", self._state | {"updated": _now()})


# --- the lock --------------------------------------------------------------------------------------------------------


def _acquire(path: Path) -> filelock.BaseFileLock:
    if path.exists() and not path.is_dir():
        raise RequestError(f"{path} is a file: --out must name a directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise RunLockedError(
            f"another run works in {path} ({_holder(path)}): wait for it, or name another --out"
        ) from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CompressorError(f"cannot use {path} as the run's directory: {reason}") from error
    try:
        write_json(path / ".holder.json", {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()})
    except BaseException:
        lock.release()
        raise
    return lock


def _release(path: Path, lock: filelock.BaseFileLock) -> None:
    with contextlib.suppress(OSError):
        (path / ".holder.json").unlink(missing_ok=True)
    lock.release()


def _holder(path: Path) -> str:
    try:
        holder = json.loads((path / ".holder.json").read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process is unknown"


# --- what is there ---------------------------------------------------------------------------------------------------


def _read_state(path: Path) -> dict[str, Any] | None:
    file = path / "run.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: name another --out, or use --overwrite to start afresh") from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA or not isinstance(state.get("stages"), dict):
        raise CheckpointError(
            f"{file} is damaged or of another version: name another --out, or use --overwrite to start afresh"
        )
    return state


def _read_recipe(path: Path) -> dict[str, Any]:
    file = path / "recipe.yaml"
    try:
        recipe = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{file} is damaged: it is no recipe")
    return recipe


def _refuse_other_recipe(path: Path, recipe: Mapping[str, Any], may_differ: Collection[str]) -> None:
    if not (path / "recipe.yaml").exists():  # killed before it was written
        return
    stored = _read_recipe(path)
    for key in [*recipe, *(key for key in stored if key not in recipe)]:
        if key in may_differ:
            continue
        found = _first_difference(key, stored.get(key), recipe.get(key))
        if found is not None:
            where, old, new = found
            raise RequestError(
                f"{path} holds the run of another recipe: {where} was {_shown(old)}, now {_shown(new)}; "
                f"name another --out, or use --overwrite to start afresh"
            )


def _first_difference(key: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    if old == new:
        return None
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(f"{key}.{part}", old.get(part), new.get(part)) for part in [*new, *(p for p in old if p not in new)]]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{key}.{place}", *pair) for place, pair in enumerate(zip(old, new, strict=True))]
    else:
        return key, old, new
    return next((found for pair in pairs if (found := _first_difference(*pair)) is not None), (key, old, new))


def _refuse_foreign_files(path: Path) -> None:
    foreign = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if foreign and foreign != ["recipe.yaml"]:
        raise RequestError(f"{path} is not empty and holds no run (it has {foreign[0]}): name another --out")


def _clear(path: Path) -> None:
    """Remove a run; what makes the directory a run goes last, so a kill in between can be repeated."""
    if not (path / "run.json").is_file() or not ((path / "recipe.yaml").is_file() or _read_state(path)):
        return
    last = ("run.json",)
    entries = [e for e in path.iterdir() if e.name not in (".lock", ".holder.json", *last)]
    for entry in [*entries, *(path / name for name in last)]:
        try:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        except OSError as error:
            raise CompressorError(f"cannot remove {entry}: {error.strerror or error}") from error


def _versions() -> dict[str, str]:
    return {"compressor": __version__, "python": platform.python_version()} | installed_versions(_LIBRARIES)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
