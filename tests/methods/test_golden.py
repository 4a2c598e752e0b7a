"""The methods' mathematics agrees with the numbers that the papers' own code produced.

A case of ``tests/golden/NAME.json`` names a function ("module:name"), its arguments, the expected parts of its result
and the tolerances. A value "@key" stands for the array of that name in ``NAME.npz``, given as a tensor; lists and dicts
may hold such values. An expected key is a path into the result ("", "0", "name", "1.name").
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "golden"


def golden_cases() -> list[Any]:
    return [
        pytest.param(path.stem, case, id=f"{path.stem}-{case['id']}")
        for path in sorted(FOLDER.glob("*.json"))
        for case in json.loads(path.read_text(encoding="utf-8"))["cases"]
    ]


def module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def fill_in(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, str) and value.startswith("@"):
        return torch.from_numpy(np.array(arrays[value[1:]]))
    if isinstance(value, list):
        return [fill_in(item, arrays) for item in value]
    if isinstance(value, dict):
        return {key: fill_in(item, arrays) for key, item in value.items()}
    return value


def part_of(result: Any, path: str) -> Any:
    for key in path.split(".") if path else ():
        if isinstance(result, Mapping):
            result = result[key]
        elif isinstance(result, (tuple, list)):
            result = result[int(key)]
        else:
            result = getattr(result, key)
    return result


@pytest.mark.parametrize(("method", "case"), golden_cases())
def test_contract_function_returns_the_published_numbers(method: str, case: dict[str, Any]) -> None:
    module, name = case["function"].split(":")
    if not module_exists(module):
        pytest.skip(f"{module} does not exist yet")
    arrays_path = FOLDER / f"{method}.npz"
    arrays = dict(np.load(arrays_path, allow_pickle=False)) if arrays_path.exists() else {}

    result = getattr(importlib.import_module(module), name)(**fill_in(case["args"], arrays))

    for path, value in case["expected"].items():
        expected = torch.as_tensor(np.asarray(fill_in(value, arrays)))
        got = torch.as_tensor(part_of(result, path)).detach().cpu()
        if expected.numel() == 1:
            got, expected = got.reshape(-1), expected.reshape(-1)
        torch.testing.assert_close(
            got.double(), expected.double(), rtol=case.get("rtol", 1e-4), atol=case.get("atol", 1e-6), equal_nan=True
        )
