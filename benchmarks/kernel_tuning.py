"""Neighbours of each launch configuration, timed: what `compressor.kernels.configurations` should say for this GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from kernel_suites import FULL, OURS, QUICK, Case, attention_cases, kl_cases
from kernel_timing import milliseconds

from compressor.kernels import kl_divergence_triton, sparse_attention_triton
from compressor.kernels.configurations import AttentionTiles, RowTiles, attention_tiles, next_power_of_two, row_tiles
from compressor.kernels.dispatch import gpu_family

__all__ = ["attention_choices", "row_choices", "tune"]


def row_choices(columns: int) -> list[RowTiles]:
    """Whole rows by several numbers of warps, and walks by several blocks."""
    block = next_power_of_two(columns)
    choices = []
    if block <= 32768:
        rows = max(1, min(64, 1024 // block))
        choices += [RowTiles(rows, block, warps, True) for warps in (1, 2, 4, 8, 16, 32) if rows * block >= 128 * warps]
    choices += [
        RowTiles(1, step, warps, False)
        for step in (2048, 4096, 8192, 16384)
        for warps in (4, 8, 16)
        if step < block and step >= 256 * warps
    ]
    return choices


def attention_choices(block_size: int, head_dim: int) -> list[AttentionTiles]:
    """Tiles that divide the block, by warps and stages."""
    return [
        AttentionTiles(queries, keys, warps, stages)
        for queries in (32, 64, 128)
        for keys in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3, 4)
        if queries <= block_size and keys <= block_size and queries * keys * head_dim <= 128 * 128 * 128
    ]


def tune(quick: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Time the choices; says the fastest of each case beside the one in the table."""
    sizes, device = QUICK if quick else FULL, torch.device("cuda")
    family, found = gpu_family(device), []
    for case in kl_cases(sizes, device):
        columns = int(case.name.split()[1].split("x")[1])
        now = row_tiles(family, columns, True, crowded=case.name.startswith("jsd"))
        found.append(_fastest(case, "rows", now, row_choices(columns), _with_row_tiles))
        report(found[-1]["line"])
    for case in attention_cases(sizes, device):
        if "80% sparse" not in case.name:
            continue
        width = int(case.name.split("D=")[1].split()[0])
        backward = case.name.startswith("forward+backward")
        for part in ("query_gradient", "key_gradient") if backward else ("forward",):
            attend = functools.partial(_with_attention_tiles, part=part)
            now = attention_tiles(family, part, sizes.block_size, width, 2)
            choices = attention_choices(sizes.block_size, width)
            found.append(_fastest(case, part, now, choices, attend))
            report(found[-1]["line"])
    return {"gpu": torch.cuda.get_device_name(), "family": family, "cases": found}


def _with_row_tiles(choice: RowTiles) -> AbstractContextManager[Any]:
    return mock.patch.object(kl_divergence_triton, "row_tiles", lambda *_, **__: choice)


def _with_attention_tiles(choice: AttentionTiles, part: str) -> AbstractContextManager[Any]:
    def chosen(family: str, of: str, *sizes: int) -> AttentionTiles:
        return choice if of == part else attention_tiles(family, of, *sizes)

    return mock.patch.object(sparse_attention_triton, "attention_tiles", chosen)


def _fastest(
    case: Case, kernel: str, now: Any, choices: list[Any], launched_with: Callable[[Any], AbstractContextManager[Any]]
) -> dict[str, Any]:
    """Time one kernel of a case under each choice; choices that do not fit the GPU are left out."""
    times: dict[Any, float] = {}
    for choice in [now, *choices]:
        with launched_with(choice):
            try:
                times[choice] = milliseconds(case.candidates[OURS])[0]
            except Exception as problem:  # Triton has no common class for tiles that do not fit
                if isinstance(problem, torch.cuda.OutOfMemoryError):
                    raise
    best = min(times, key=lambda choice: times[choice])
    before = times.get(now, float("nan"))
    line = f"{case.suite} {case.name}, {kernel}: {before:.3f} ms with {now}, {times[best]:.3f} ms with {best}"
    timed = [{"tiles": str(choice), "milliseconds": time} for choice, time in times.items()]
    return {"case": case.name, "kernel": kernel, "now": str(now), "best": str(best), "times": timed, "line": line}
