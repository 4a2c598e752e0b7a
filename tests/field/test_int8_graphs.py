"""Graphs at which quantisers crash: grouped transposed convolutions by channel, weights in a side file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from compressor.exporters import model_file


def upsampler() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.ConvTranspose2d(3, 8, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(8, 16, 4, 2, 1, groups=2)
    ).eval()


@pytest.mark.parametrize("target", ["ort-int8", "openvino-int8"])
def test_grouped_upsampler_is_quantised_on_the_right_axis_or_left_in_float(exported, target):
    module, images = upsampler(), torch.rand(32, 3, 8, 8)
    made = exported(module, {"input": images}, target)
    (given,) = made(input=images[:4]).values()
    with torch.no_grad():
        expected = module(images[:4]).numpy()
    assert given.shape == expected.shape
    error = float(np.sqrt(np.mean((given - expected) ** 2)) / np.sqrt(np.mean(expected**2)))
    assert error <= made.entry.quantization.limit


def test_weights_in_a_side_file_stay_there_when_they_are_quantised(exported, monkeypatch):
    monkeypatch.setattr(model_file, "INLINE_LIMIT", 1000)
    torch.manual_seed(0)
    module, rows = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(), torch.randn(32, 64)
    made = exported(module, {"input": rows}, "ort-int8")
    assert made.entry.data_file == "network.onnx.data" and (made.folder / "network.onnx.data").is_file()
    (given,) = made(input=rows[:4]).values()
    with torch.no_grad():
        expected = module(rows[:4]).numpy()
    assert np.abs(given - expected).max() < 0.1 * np.abs(expected).max()
