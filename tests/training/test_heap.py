"""Memory that one step frees serves the next."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import contextlib, resource, sys
import torch
from compressor.training.heap import heap_kept

def step():
    held = [torch.ones(size) for size in (100_000, 300_000, 1_000_000, 12_000_000) for _ in range(4)]
    return sum(len(tensor) for tensor in held)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

with heap_kept() if sys.argv[1] == "kept" else contextlib.nullcontext():
    step(), step()
    before = faults()
    step(), step(), step()
    print(faults() - before)
held = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
step()
print(held)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_step_reuses_the_pages_of_the_step_before_and_gives_them_back_at_the_end():
    faults, held = {}, {}
    for arm in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, arm], check=True, capture_output=True, text=True)
        faults[arm], held[arm] = map(int, done.stdout.split())
    assert faults["kept"] < faults["given back"] / 10
    assert held["kept"] < held["given back"] + (50 << 20)  # a step holds 214 MB
