"""How difference is measured."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.errors import ArtifactError
from compressor.exporters.parity import compare, worst


def parity(expected, given):
    return compare({"y": np.asarray(expected)}, {"y": np.asarray(given)}, 1e-2, "a test")


def test_difference_is_relative_to_the_largest_value_of_the_output():
    found = parity([1.0, -4.0], [1.1, -4.0])
    assert found.max_absolute == pytest.approx(0.1) and found.relative == pytest.approx(0.025)


def test_worst_output_is_named():
    expected = {"a": np.ones(2), "b": np.ones(2)}
    assert compare(expected, {"a": np.ones(2), "b": np.zeros(2)}, 1e-2, "a test").output == "b"


@pytest.mark.parametrize("given", [[np.nan, 1.0], [np.inf, 1.0]])
def test_value_that_is_not_finite_fails_whatever_the_tolerance(given):
    assert parity([0.0, 1.0], given).relative == np.inf


def test_infinities_of_the_model_must_come_back():
    assert parity([-np.inf, 1.0], [-np.inf, 1.0]).relative == 0
    assert parity([-np.inf, 1.0], [0.0, 1.0]).relative == np.inf


def test_labels_differ_by_the_share_that_changed():
    assert parity([1, 2, 3, 4], [1, 2, 9, 4]).relative == 0.25


def test_missing_output_and_other_shape_are_refused():
    with pytest.raises(ArtifactError, match="has no output 'y'; it has z"):
        compare({"y": np.ones(1)}, {"z": np.ones(1)}, 1e-2, "a test")
    with pytest.raises(ArtifactError, match=r"'y' has the shape \(2,\), the model's has \(1,\)"):
        parity([1.0], [1.0, 2.0])


def test_worst_counts_all_records():
    assert worst([parity([1.0], [1.0]), parity([1.0], [2.0])]).model_dump()["records"] == 2
