"""Every kernel test runs once an implementation: the PyTorch references here, Triton on a GPU or in its interpreter.

Triton reads TRITON_INTERPRET when it is first imported, so the interpreted runs have a process of their own:
``TRITON_INTERPRET=1 pytest tests/kernels``, which ``test_interpreter.py`` starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from compressor.kernels import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED


def _implementations() -> list[str]:
    if INTERPRETED:
        return ["triton"]
    return ["reference", "triton"] if ON_GPU else ["reference"]


@pytest.fixture(params=_implementations())
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with dispatch.backend(request.param):
        yield request.param


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 4 entries count as long and are walked in chunks of 16."""
    from compressor.kernels import configurations

    families = configurations.FAMILIES
    monkeypatch.setattr(configurations, "_WHOLE_ROW_LIMIT", dict.fromkeys(families, 4))
    monkeypatch.setattr(configurations, "_WHOLE_ROW_LIMIT_CROWDED", dict.fromkeys(families, 4))
    monkeypatch.setattr(configurations, "_LONG_ROW", dict.fromkeys(families, (16, 4)))
    monkeypatch.setattr(configurations, "_LONG_ROW_CROWDED", dict.fromkeys(families, (16, 4)))
    monkeypatch.setattr(configurations, "_LONG_COLUMNS", (16, 8, 1))
    monkeypatch.setattr(configurations, "_WHOLE_COLUMN_TILE", 1)
