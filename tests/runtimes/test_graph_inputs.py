"""Inputs come to a graph in its own types and order, whatever came before them."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.errors import RequestError
from compressor.runtimes.graph_inputs import InputCheck
from compressor.runtimes.runtime import TensorSpec

SPECS = (TensorSpec("image", ("batch", 2), "float32"), TensorSpec("step", (), "int64"))
IMAGE = np.arange(6, dtype=np.float32).reshape(3, 2)
STEP = np.array(7)


@pytest.fixture(params=["first", "again"])
def check(request: pytest.FixtureRequest) -> InputCheck:
    """Both a new check and one that has seen good inputs of the same shapes."""
    made = InputCheck(SPECS)
    if request.param == "again":
        for _ in range(2):
            made({"image": IMAGE, "step": STEP})
    return made


def test_inputs_that_are_ready_are_passed_on_as_they_are_in_the_graphs_order(check: InputCheck) -> None:
    ready = check({"extra": IMAGE, "step": STEP, "image": IMAGE})
    assert list(ready) == ["image", "step"]
    assert ready["image"] is IMAGE or np.shares_memory(ready["image"], IMAGE)
    assert ready["step"].shape == () and ready["step"] == 7


@pytest.mark.parametrize(
    "image",
    [
        IMAGE.astype(np.float64), IMAGE.astype(">f4"), IMAGE.T.copy().T, IMAGE.tolist(), IMAGE.astype(np.int8),
        np.repeat(IMAGE, 2, 0)[::2],
    ],
    ids=["wide", "other byte order", "columns first", "list", "small integers", "every second row"],
)  # fmt: skip
def test_other_types_and_layouts_are_converted(check: InputCheck, image: object) -> None:
    ready = check({"image": image, "step": 7})
    assert ready["image"].dtype == np.dtype("float32") and ready["image"].dtype.isnative
    assert ready["image"].flags.c_contiguous
    assert np.array_equal(ready["image"], IMAGE)
    assert ready["step"].dtype == np.int64 and ready["step"].shape == ()


@pytest.mark.parametrize("shape", [(3, 3), (3,), (3, 2, 1)])
def test_a_shape_that_does_not_fit_is_refused(check: InputCheck, shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"'image' must have the shape \(batch, 2\), got"):
        check({"image": np.zeros(shape, np.float32), "step": STEP})


def test_a_missing_input_is_named(check: InputCheck) -> None:
    with pytest.raises(RequestError, match=r"needs the inputs step; given: image"):
        check({"image": IMAGE})


def test_any_number_of_shapes_comes_through() -> None:
    check = InputCheck(SPECS)
    for _ in range(2):
        for batch in range(1, 200):
            assert check({"image": np.zeros((batch, 2), np.float32), "step": STEP})["image"].shape == (batch, 2)
