"""Start the processes that `accelerate launch --cpu --num_processes N` leaves to MPI.

On CPUs accelerate starts one process and expects MPI to have made the others; without MPI the run would silently train
on one. Where that is the case, the processes are started here by torch's own launcher, with the same arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

__all__ = ["processes_left_out", "relaunch"]

_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def processes_left_out(environment: Mapping[str, str], parent: Sequence[str]) -> int:
    """How many processes the launcher was asked for and has not started; 0 where there is nothing to do.

    Args:
        environment: Of this process.
        parent: Command line of the process that started it.
    """
    launched = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") and "MASTER_ADDR" in environment
    if not launched or "WORLD_SIZE" in environment or any(name in environment for name in _MPI):
        return 0
    if not any("accelerate" in part for part in parent):
        return 0
    for place, part in enumerate(parent):
        name, _, value = part.partition("=")
        if name in ("--num_processes", "--num-processes"):
            text = value or (parent[place + 1] if place + 1 < len(parent) else "")
            return int(text) if text.isdigit() and int(text) > 1 else 0
    return 0


def relaunch(arguments: Sequence[str]) -> None:
    """Replace this process by torch's launcher where accelerate left processes out; otherwise return at once."""
    if "ACCELERATE_USE_CPU" not in os.environ:
        return
    import psutil  # accelerate depends on it

    count = processes_left_out(os.environ, psutil.Process().parent().cmdline())
    if not count:
        return
    port = os.environ.pop("MASTER_PORT", "29500")
    address = ["--master-addr", os.environ.pop("MASTER_ADDR"), "--master-port", port]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), *address]
    os.execv(sys.executable, [*launcher, "-m", "compressor", *arguments])
