"""Taps into networks, their stages, and the layer that reads the embedding."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from compressor.errors import RequestError
from compressor.models.classifier import Classifier
from compressor.models.feature_layers import FeatureLayer, as_embedding, as_map, pair_layers
from compressor.models.model import Model, ModelInfo
from compressor.models.taps import tap


def classifier(module: nn.Module) -> Classifier:
    return Classifier(Model(module, ModelInfo("python", "module", {})))


def vit(**changes: Any) -> nn.Module:
    values = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**values, image_size=16, patch_size=4, num_labels=5, **changes))


def test_a_tap_records_a_copy_with_its_gradient_even_where_the_next_layer_works_in_place() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    with tap(net, "0") as features:
        net(x)
    assert torch.equal(features["0"], net[0](x))
    features["0"].sum().backward()
    assert net[0].weight.grad is not None


def test_a_tap_finds_layers_by_class_and_can_record_inputs() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with tap(net, nn.Linear) as outputs, tap(net, "2", inputs=True) as inputs:
        result = net(torch.randn(5, 3))
    assert list(outputs) == ["0", "2"]
    assert torch.equal(outputs["2"], result)
    assert torch.equal(inputs["2"], outputs["0"].relu())


def test_a_tap_leaves_no_hook_behind() -> None:
    net = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError), tap(net, "0"):
        raise ValueError
    assert not net[0]._forward_hooks


def test_an_unknown_layer_is_named_with_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"no layer 'layr1'.*layer1"), tap(timm.create_model("resnet18"), "layr1"):
        pass


@pytest.mark.parametrize(
    ("make", "size", "names", "head"),
    [
        (lambda: timm.create_model("resnet18"), 64, ["act1", "layer1", "layer2", "layer3", "layer4"], "fc"),
        (lambda: torchvision.models.resnet18(), 64, ["relu", "layer1", "layer2", "layer3", "layer4"], "fc"),
        (
            lambda: torchvision.models.mobilenet_v2(),
            96,
            ["features.1", "features.3", "features.6", "features.13", "features"],
            "classifier.1",
        ),
        (
            lambda: ResNetForImageClassification(
                ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 2, 1], num_labels=5)
            ),
            64,
            ["resnet.encoder.stages.0", "resnet.encoder.stages.1", "resnet"],
            "classifier.1",
        ),
        (
            lambda: SwinForImageClassification(
                SwinConfig(
                    image_size=32,
                    patch_size=2,
                    embed_dim=8,
                    depths=[1, 1],
                    num_heads=[2, 2],
                    window_size=4,
                    num_labels=5,
                )
            ),
            32,
            ["swin.encoder.layers.0.blocks.0", "swin"],
            "classifier",
        ),
        (vit, 16, ["vit.layers.0", "vit.layers.2", "vit.layers.3", "vit.layers.5"], "classifier"),
        (
            lambda: timm.create_model(
                "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=2
            ),
            16,
            ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
            "head",
        ),
    ],
)
def test_stages_and_head_are_found_in_every_library(make: Any, size: int, names: list[str], head: str) -> None:
    net = classifier(make())
    layers = net.layers((3, size, size))
    assert [layer.name for layer in layers] == names
    assert net.head((3, size, size)) == head
    logits, maps = net.features(torch.rand(2, 3, size, size), names)
    assert [tuple(m.shape[1:]) for m in maps] == [layer.shape for layer in layers]
    again, embedding = net.embed(torch.rand(2, 3, size, size), head)
    assert embedding.dim() == 2 and logits.shape == again.shape


def test_looking_for_stages_leaves_modes_and_statistics_alone() -> None:
    module = timm.create_model("resnet18").train()
    module.layer1.eval()
    before = module.bn1.running_mean.clone()
    classifier(module).layers((3, 64, 64))
    classifier(module).layers((3, 64, 64), ["layer2"])
    assert module.training and not module.layer1.training and module.layer2.training
    assert torch.equal(module.bn1.running_mean, before)


def test_features_train_the_network_but_not_what_comes_after() -> None:
    net = classifier(timm.create_model("resnet18"))
    _, (features,) = net.features(torch.rand(2, 3, 32, 32), ["layer2"])
    features.square().mean().backward()
    assert net.module.conv1.weight.grad is not None
    assert net.module.layer3[0].conv1.weight.grad is None


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 7, 4, 4), (2, 7, 4, 4)),
        ((2, 4, 4, 7), (2, 7, 4, 4)),
        ((2, 17, 7), (2, 7, 4, 4)),
        ((2, 16, 7), (2, 7, 4, 4)),
    ],
)
def test_features_of_every_layout_become_maps(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert tuple(as_map(torch.zeros(shape)).shape) == expected


def test_prefix_tokens_are_left_out_of_a_map() -> None:
    tokens = torch.cat([torch.full((1, 1, 3), -1.0), torch.arange(4.0)[None, :, None].expand(1, 4, 3)], dim=1)
    assert torch.equal(as_map(tokens)[0, 0], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))


def test_features_that_are_no_map_are_refused() -> None:
    with pytest.raises(RequestError, match="no map"):
        as_map(torch.zeros(2, 5))


def test_an_embedding_is_the_mean_over_places() -> None:
    x = torch.rand(2, 3, 4, 5)
    assert torch.allclose(as_embedding(x), x.mean((2, 3)))
    assert torch.allclose(as_embedding(x.flatten(2).transpose(1, 2)), x.mean((2, 3)))
    assert torch.equal(as_embedding(x[:, :, 0, 0]), x[:, :, 0, 0])


def layer(name: str, *shape: int) -> FeatureLayer:
    return FeatureLayer(name, (shape[0], shape[1], shape[2]))


def test_stages_are_paired_from_the_deepest_and_single_places_left_out() -> None:
    student = [layer("a", 4, 8, 8), layer("b", 8, 4, 4)]
    teacher = [layer("x", 4, 16, 16), layer("y", 4, 8, 8), layer("z", 8, 4, 4), layer("end", 8, 1, 1)]
    pairs = pair_layers(student, teacher, 3)
    assert [(one.name, other.name) for one, other in pairs] == [("a", "y"), ("b", "z")]
    with pytest.raises(RequestError, match="the teacher's feature maps"):
        pair_layers(student, [layer("end", 8, 1, 1)], 3)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 6), nn.Linear(6, 4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(image.flatten(1)).relu())}


def test_a_network_of_our_own_that_returns_a_mapping_has_a_head_but_no_stages() -> None:
    net = classifier(TwoHeads())
    assert net.head((3, 2, 2)) == "head"
    assert net(torch.rand(2, 3, 2, 2)).shape == (2, 4)
    with pytest.raises(RequestError, match="no feature maps"):
        net.layers((3, 2, 2))
