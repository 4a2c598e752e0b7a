"""Figures of a segmentation, against a count by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compressor.metrics.segmentation import SegmentationMetric, confusion_matrix, segmentation_figures


def test_figures_equal_a_count_by_hand() -> None:
    labels = np.array([[0, 0, 1, 1], [2, 2, 255, 0]])
    predicted = np.array([[0, 1, 1, 1], [2, 0, 2, 0]])
    figures = segmentation_figures(confusion_matrix(predicted, labels, 4))
    # class 0: 2 of (3 labels + 3 predictions - 2); class 1: 2 of 3; class 2: 1 of 2; class 3 occurs nowhere
    assert figures["miou"] == pytest.approx((2 / 4 + 2 / 3 + 1 / 2) / 3)
    assert figures["pixel_accuracy"] == pytest.approx(5 / 7)
    assert figures["mean_accuracy"] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)


def test_a_class_that_is_predicted_but_never_labelled_lowers_the_miou() -> None:
    labels, predicted = np.zeros((2, 2), np.int64), np.array([[0, 0], [0, 1]])
    assert segmentation_figures(confusion_matrix(predicted, labels, 2))["miou"] == pytest.approx(0.75 / 2)


def test_pixels_without_an_answer_count_as_wrong() -> None:
    labels, predicted = np.zeros((1, 4), np.int64), np.array([[0, 0, -1, 9]])
    figures = segmentation_figures(confusion_matrix(predicted, labels, 2))
    assert figures["pixel_accuracy"] == figures["miou"] == pytest.approx(0.5)


def test_without_labelled_pixels_there_are_no_figures() -> None:
    labels = np.full((1, 4), 255)
    assert math.isnan(segmentation_figures(confusion_matrix(labels * 0, labels, 2))["miou"])


def test_batches_add_up_and_the_sets_own_ignored_class_is_left_out() -> None:
    rng = np.random.default_rng(0)
    masks, answers = rng.integers(0, 4, (2, 6, 5, 5))
    whole, parts = SegmentationMetric(3, ignore_index=3), SegmentationMetric(3, ignore_index=3)
    samples = [{"mask": mask} for mask in masks]
    whole.update("test", {"classes": answers}, samples)
    parts.update("test", {"classes": answers[:2]}, samples[:2])
    parts.update("test", {"classes": answers[2:]}, samples[2:])
    assert whole.compute() == parts.compute()
    assert 0 < whole.compute()["miou"] < 1
