"""The driver of classifiers."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.errors import RequestError
from compressor.runtimes.drivers.predict import Predict


def identity(inputs):
    return {"logits": inputs["image"].reshape(len(inputs["image"]), -1), "extra": np.ones(1)}


def test_pixels_are_normalised_channel_by_channel():
    driver = Predict({"classifier": identity}, {"mean": [0.5, 0.25], "std": [0.5, 0.25]}, {})
    image = np.stack([np.full((1, 1), 1.0), np.full((1, 1), 0.5)])[None]
    assert np.allclose(driver({"image": image})["logits"], [[1.0, 1.0]])


def test_bytes_mean_the_same_as_numbers_from_zero_to_one():
    driver = Predict({"classifier": identity}, {}, {})
    numbers = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    assert np.allclose(driver({"image": numbers})["logits"], driver({"image": numbers / 255.0})["logits"])


def test_probabilities_sum_to_one_even_for_huge_logits():
    outputs = Predict({"classifier": identity}, {}, {})({"image": np.array([1e4, 0, -1e4]).reshape(1, 1, 1, 3)})
    assert np.allclose(outputs["probabilities"], [[1, 0, 0]]) and "extra" in outputs


def test_graph_that_gives_probabilities_is_not_normalised_twice():
    driver = Predict({"classifier": identity}, {"probabilities": True}, {})
    given = np.array([0.2, 0.8]).reshape(1, 1, 1, 2)
    assert np.allclose(driver({"image": given})["probabilities"], [[0.2, 0.8]])


def test_ports_say_what_goes_in_and_comes_out():
    driver = Predict({"classifier": identity}, {"shape": [3, None, None], "classes": 10}, {})
    assert [port.shape for port in driver.inputs] == [("batch", 3, "height", "width")]
    assert [(port.name, port.shape) for port in driver.outputs] == [
        ("logits", ("batch", 10)),
        ("probabilities", ("batch", 10)),
    ]


def test_single_image_without_a_batch_is_refused():
    with pytest.raises(RequestError, match="must have the shape"):
        Predict({"classifier": identity}, {}, {})({"image": np.zeros((1, 2, 2))})
