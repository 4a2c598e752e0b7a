"""torchvision's detectors fail in `torch.export`: their sizes depend on how many boxes are left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator

from compressor.errors import ArtifactError

NAMES = ("boxes", "scores", "labels")


class Detector(nn.Module):
    """Faster R-CNN on a backbone of one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 16, 3, stride=8, padding=1), nn.ReLU())
        backbone.out_channels = 16
        self.detector = FasterRCNN(
            backbone, num_classes=3, rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
            box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 4, 2), min_size=64, max_size=128,
            rpn_pre_nms_top_n_test=20, rpn_post_nms_top_n_test=10, box_score_thresh=0.0,
        )  # fmt: skip

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.detector([image])[0]
        return tuple(found[name] for name in NAMES)


def test_detector_is_exported_by_tracing_and_the_artifact_says_so(exported, capfd):
    module, image = Detector().eval(), torch.rand(3, 64, 80)
    for target in ("ort-fp32", "openvino-fp32"):
        made = exported(module, {"image": torch.rand(3, 64, 80)}, target, NAMES, dynamic={})
        given = made(image=image)
        with torch.no_grad():
            expected = dict(zip(NAMES, module(image), strict=True))
        for name in NAMES:
            assert np.allclose(given[name], expected[name].numpy(), atol=1e-3), (target, name)
        assert any("tracing with TorchScript" in note for note in made.manifest.notes)
    out, err = capfd.readouterr()
    assert "torch.ops" not in out + err, "the exporter's own words stay off the terminal"


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.max()) > 0.5 else x - 1


def test_branch_on_a_value_that_tracing_would_fix_is_refused(exported):
    with pytest.raises(ArtifactError, match="holds for its example alone") as caught:
        exported(Branches(), {"x": torch.tensor([[0.1, 1.0], [0.2, 0.9]])})
    assert "\n" not in str(caught.value)


def test_graph_that_torch_export_can_follow_is_not_traced(exported):
    made = exported(nn.Sequential(nn.Linear(2, 2)), {"input": torch.rand(2, 2)})
    assert not any("TorchScript" in note for note in made.manifest.notes)
