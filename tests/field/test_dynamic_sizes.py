"""A size that was declared free is fixed in the file: a batch of one, an image of the example's size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ArtifactError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.Flatten(), nn.Linear(16, 2)).eval()


@pytest.mark.parametrize("target", ["openvino-fp32", "ort-fp32"])
def test_artifact_takes_every_batch_size_when_the_batch_is_dynamic(exported, target):
    module = network()
    made = exported(module, {"input": torch.rand(2, 3, 16, 16)}, target)
    assert made.entry.inputs[0].shape == ("batch", 3, 16, 16)
    for batch in (1, 8):
        assert made.near(module, input=torch.rand(batch, 3, 16, 16))


def test_artifact_takes_other_image_sizes_when_they_are_dynamic(exported):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    free = {"input": {0: "batch", 2: "height", 3: "width"}}
    made = exported(module, {"input": torch.rand(2, 3, 16, 12)}, "openvino-fp32", dynamic=free)
    assert made.near(module, input=torch.rand(3, 3, 24, 20))


class FixedReshape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class FixedRange(nn.Module):
    """Fails at no other size, but gives something else than the module."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(int(x.shape[0]))[:, None]


@pytest.mark.parametrize("module", [FixedReshape(), FixedRange()])
def test_size_that_the_module_fixes_is_refused_or_follows(exported, module):
    try:
        made = exported(module, {"x": torch.rand(2, 4)})
    except ArtifactError as error:
        assert "axis 0 of input 'x' is declared dynamic" in str(error) and "\n" not in str(error)
    else:
        assert made.near(module, x=torch.rand(5, 4))
