"""Sorted outputs are equal up to the order of tied entries, and no further."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.deployable import Graph
from compressor.errors import ArtifactError
from compressor.exporters.onnx_graph import export_onnx
from compressor.exporters.tied_entries import OrderError, compare_sorted, possible_scores


class Selected(nn.Module):
    """The best of some boxes, as detectors give them."""

    def forward(self, boxes: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, labels = logits.sigmoid().topk(4, dim=1)
        return boxes.gather(1, labels[..., None].expand(-1, -1, 4)), scores, labels


def outputs(order=(0, 1, 2, 3), **changes) -> dict[str, np.ndarray]:
    made = {
        "boxes": np.arange(16, dtype=np.float32).reshape(1, 4, 4)[:, list(order)],
        "scores": np.array([[0.9, 0.5, 0.5, 0.1]], np.float32),
        "labels": np.array([[3, 4, 5, 6]])[:, list(order)],
    }
    return {**made, **changes}


def test_tied_entries_may_come_in_another_order():
    found = compare_sorted(outputs(), outputs((0, 2, 1, 3)), 1e-4, "an engine", ["scores"])
    assert found.relative == 0 and found.judged_by == "an engine, up to the order of tied scores"


def test_scores_that_differ_by_rounding_are_tied():
    rounded = np.array([[0.9, 0.5, 0.4999999, 0.1]], np.float32)
    found = compare_sorted(outputs(scores=rounded), outputs((0, 2, 1, 3)), 1e-4, "an engine", ["scores"])
    assert found.relative < 1e-6


@pytest.mark.parametrize(
    "given", [outputs((1, 0, 2, 3)), outputs(labels=np.array([[3, 9, 5, 6]])), outputs(boxes=np.zeros((1, 4, 4), "f4"))]
)
def test_entries_that_are_not_tied_or_not_the_same_are_refused_in_words(given):
    with pytest.raises(OrderError, match=r"\d of 4 entries of 'boxes' and 'labels' differ while 'scores' agrees: the"):
        compare_sorted(outputs(), given, 1e-4, "an engine", ["scores"])


def test_another_number_of_entries_is_refused_with_what_to_do():
    fewer = {name: value[:, :3] for name, value in outputs().items()}
    with pytest.raises(OrderError, match=r"the shape \(1, 3, 4\), .* it selects entries by scores.*trained weights"):
        compare_sorted(outputs(), fewer, 1e-4, "an engine", ["scores"])


def test_scores_that_differ_are_a_difference_like_any():
    wrong = outputs(scores=np.array([[0.9, 0.7, 0.5, 0.1]], np.float32))
    assert compare_sorted(outputs(), wrong, 1e-4, "an engine", ["scores"]).relative > 0.1


def test_order_counts_where_nothing_is_sorted():
    assert compare_sorted(outputs(), outputs((0, 2, 1, 3)), 1e-4, "an engine").relative > 0.1
    with pytest.raises(ArtifactError):
        compare_sorted({"y": np.ones(1)}, {"z": np.ones(1)}, 1e-4, "an engine", ["y"])


def test_scores_are_looked_for_where_a_graph_sorts_and_never_along_the_batch(tmp_path):
    torch.manual_seed(0)
    inputs = {"boxes": torch.rand(2, 9, 4), "logits": torch.rand(2, 9)}
    free = {name: {0: "batch"} for name in inputs}
    made = export_onnx(Graph(Selected(), inputs, ("boxes_out", "scores", "labels"), free), tmp_path / "a.onnx")
    assert "scores" in possible_scores(made.path) and "labels" not in possible_scores(made.path)
    plain = export_onnx(Graph(nn.Linear(4, 3), {"input": torch.rand(2, 4)}, ("y",), {}), tmp_path / "b.onnx")
    assert possible_scores(plain.path) == ()
