"""Accuracy, and precision and recall by class."""

import numpy as np
import pytest

from compressor.errors import RequestError
from compressor.metrics.classification import ClassFigures, accuracy, per_class


def test_accuracy_is_the_share_of_right_predictions():
    assert accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75


def test_per_class_counts_right_and_wrong_predictions_of_each_class():
    table = per_class(np.array([0, 0, 0, 1, 2, 2]), np.array([0, 0, 1, 1, 2, 0]), ["cat", "dog", "owl"])
    assert table == [
        ClassFigures("cat", pytest.approx(2 / 3), pytest.approx(2 / 3), 3, 3),
        ClassFigures("dog", 0.5, 1.0, 1, 2),
        ClassFigures("owl", 1.0, 0.5, 2, 1),
    ]


def test_per_class_is_zero_for_a_class_that_never_occurs():
    table = per_class(np.array([0, 1]), np.array([0, 1]), 3)
    assert table[2] == ClassFigures("2", 0.0, 0.0, 0, 0)


def test_per_class_refuses_a_label_outside_the_classes():
    with pytest.raises(RequestError, match=r"labels lie in \[0, 3\], but there are 3 classes"):
        per_class(np.array([0, 3]), np.array([0, 1]), 3)


def test_accuracy_refuses_lists_of_different_length():
    with pytest.raises(RequestError, match="of one length"):
        accuracy(np.array([0, 1]), np.array([0]))
