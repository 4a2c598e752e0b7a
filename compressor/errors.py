"""The project's exceptions: each message is one line for a person, each class knows its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "CheckpointError",
    "CompressorError",
    "DivergedError",
    "InterruptedRunError",
    "ModelError",
    "RequestError",
    "RunLockedError",
    "TargetError",
    "first_line",
    "nearest",
]


class CompressorError(Exception):
    """Base of all errors that a user can act on. The message says what is wrong and what to do."""

    exit_code = 1


class RequestError(CompressorError):
    """The request itself is wrong: an unknown name, a bad value, an impossible combination. Found before any work."""

    exit_code = 2


class ModelError(RequestError):
    """A model or data spec names something that cannot be loaded."""


class RunLockedError(CompressorError):
    """Another process works in the same directory."""


class CheckpointError(CompressorError):
    """A checkpoint or stored result is damaged or belongs to something else."""


class DivergedError(CompressorError):
    """Training produced non-finite losses or gradients again and again."""


class InterruptedRunError(CompressorError):
    """The user or the machine stopped the run; the same command goes on where it stopped."""

    exit_code = 130


class TargetError(CompressorError):
    """A target cannot be built or run on this machine."""


class ArtifactError(CompressorError):
    """An exported artifact is damaged, or differs from the model that it was made of."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says, or its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__


def nearest(name: str, choices: Iterable[str], *, limit: int = 3) -> str:
    """Return a hint that ends an "unknown name" message.

    Args:
        name: What the user wrote.
        choices: The valid names.
        limit: How many near names to offer before falling back to the whole list.

    Returns:
        ``"did you mean a or b?"`` where something is close, otherwise ``"choose from a, b, c"``.
    """
    known = sorted(set(choices))
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    if close:
        # what is much less like it than the best is noise
        likeness = [difflib.SequenceMatcher(None, other, name).ratio() for other in close]
        close = [other for other, ratio in zip(close, likeness, strict=True) if ratio >= likeness[0] - 0.1]
        return f"did you mean {' or '.join(close)}?"
    return f"choose from {', '.join(known)}" if known else "there are none"
