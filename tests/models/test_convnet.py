"""The ConvNet: its shape, and that its description alone rebuilds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.errors import RequestError
from compressor.models.convnet import ConvNet, convnet_depth, convnet_model, random_convnet
from compressor.models.model import load_model, save_model


@pytest.mark.parametrize(("channels", "edge", "embedding"), [(3, 32, 2048), (1, 28, 2048), (1, 16, 512), (3, 28, 1152)])
def test_embedding_has_the_size_of_the_published_network(channels: int, edge: int, embedding: int) -> None:
    network = ConvNet(channels, (edge, edge), 10)
    maps, features = network.features(torch.rand(2, channels, edge, edge))
    assert features.shape == (2, embedding) and len(maps) == 3
    assert [m.shape[2] for m in maps] == [maps[0].shape[2] >> k for k in range(3)]
    assert all((m >= 0).all() for m in maps)
    assert network(torch.rand(2, channels, edge, edge)).shape == (2, 10)


def test_depth_follows_the_size() -> None:
    assert [convnet_depth((edge, edge)) for edge in (4, 8, 16, 32, 64, 128)] == [2, 3, 3, 3, 4, 6]


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(
        RequestError, match="images of 4x16 are too small for a ConvNet of 3 blocks: edges of at least 8"
    ):
        ConvNet(1, (4, 16), 10, depth=3)


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_model_is_rebuilt_from_its_folder(tmp_path: Path, norm: str) -> None:
    model = convnet_model(1, (8, 12), 4, width=6, norm=norm)
    save_model(model, tmp_path / "model")
    again, images = load_model(tmp_path / "model"), torch.rand(3, 1, 8, 12)
    assert torch.equal(again.module.eval()(images), model.module.eval()(images))
    assert again.info == model.info


def test_random_network_follows_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again, other = (random_convnet(seed, 1, (8, 8), 3, 4, 2, "batch") for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
