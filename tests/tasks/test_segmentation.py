"""Segmentation as a task: what fits, what is packed, what is measured, with models of every library."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from compressor.data.stream import stack
from compressor.errors import RequestError
from compressor.exporters.export import export
from compressor.measurement import quality, torch_driver
from compressor.models.model import Model, load_model, save_model
from compressor.models.segmenter import Segmenter
from compressor.models.spec import load_model_spec
from compressor.profiles.target import load_target
from compressor.recipe import Evaluation
from compressor.runtimes.load import load
from compressor.tasks.segmentation import Segmentation

SMALL = "timm:resnet18?layers=[1,1,1,1],channels=[4,4,8,8],width=16"
SEGFORMER = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "mlp_ratios": [2, 2, 2, 2],
}


def task(spec: str = "scenes:32?masks=true", **options: object) -> Segmentation:
    return Segmentation({"train": spec}, options)


def model(spec: str = SMALL, made: Segmentation | None = None) -> Model:
    torch.manual_seed(0)
    defaults = (made or task()).student_defaults()
    return load_model_spec(spec, defaults=defaults, task="segmentation")


@pytest.fixture
def segformer(tmp_path: Path) -> str:
    config = SegformerConfig(**SEGFORMER, num_labels=11, num_channels=3)
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "segformer")
    return f"transformers:{tmp_path / 'segformer'}"


def test_models_of_every_library_give_logits_of_every_pixel_and_are_built_again(tmp_path: Path, segformer: str) -> None:
    made = task("scenes:32?masks=true,channels=3")
    kind = "transformers:segformer?" + ",".join(f"{key}={value}" for key, value in SEGFORMER.items())
    image = torch.rand(2, 3, 32, 32)
    for place, spec in enumerate((SMALL, "torchvision:lraspp_mobilenet_v3_large", segformer, kind.replace(" ", ""))):
        given = model(spec, made)
        made.check(given)
        with torch.no_grad():
            expected = Segmenter(given)(image)
            save_model(given, tmp_path / str(place))
            again = load_model(tmp_path / str(place))
            again.module.eval()
            assert expected.shape == (2, 11, 32, 32)
            assert torch.equal(Segmenter(again)(image), expected)


def test_stages_and_head_are_found_in_every_library_also_in_images_that_are_not_square(segformer: str) -> None:
    made = task("scenes:32?masks=true,channels=3")
    for spec, low in ((SMALL, 4), ("torchvision:lraspp_mobilenet_v3_large", 24), (segformer, 8)):
        network = Segmenter(model(spec, made))
        low_layer = next(layer for layer in network.layers((3, 64, 32)) if layer.shape[1] <= 16)
        assert low_layer.shape == (low, 16, 8)
        logits, early, last = network.low_and_last(torch.rand(2, 3, 64, 32), low_layer.name, network.head((3, 64, 32)))
        assert early.shape == (2, low, 16, 8)
        assert last.dim() == 4
        assert logits.requires_grad and early.requires_grad and last.requires_grad


def test_loss_is_the_cross_entropy_of_the_pixels_that_belong_to_a_class() -> None:
    made, given = task(), model()
    batch = stack([made.dataset()[k] for k in range(4)])
    expected = F.cross_entropy(Segmenter(given)(batch["image"]), batch["mask"], ignore_index=255)
    torch.testing.assert_close(made.loss(given, batch)["cross_entropy"], expected)
    batch["mask"] = torch.full_like(batch["mask"], 255)
    empty = made.loss(given, batch)["cross_entropy"]
    assert empty == 0
    empty.backward()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"{SMALL},num_classes=7", "7 classes apart.*num_classes=11"),
        (f"{SMALL},in_chans=2", "images of 2 channels, the set .* has 3"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(spec: str, message: str) -> None:
    made = task("scenes:32?masks=true,channels=3")
    with pytest.raises(RequestError, match=message):
        made.check(model(spec, made))


def test_data_without_masks_are_refused() -> None:
    with pytest.raises(RequestError, match="no masks"):
        task("scenes").dataset()


def test_gray_images_fill_a_colour_model() -> None:
    given = model("torchvision:lraspp_mobilenet_v3_large?num_classes=11,in_chans=3", task())
    task().check(given)


def test_an_engine_has_the_figures_of_the_model(tmp_path: Path) -> None:
    made, given = task(), model()
    deployable = made.deployable(given)
    expected = quality(made, torch_driver(deployable), Evaluation(samples=20))
    export(deployable, load_target("ort-fp32"), tmp_path / "artifact")
    loaded = load(tmp_path / "artifact")
    assert quality(made, loaded, Evaluation(samples=20)) == pytest.approx(expected, abs=1e-3)
    request = made.request(3)
    assert np.allclose(loaded(request)["logits"], torch_driver(deployable)(request)["logits"], atol=1e-4)
    large = {"image": np.random.default_rng(0).random((1, 1, 70, 41), np.float32)}
    assert np.allclose(loaded(large)["logits"], torch_driver(deployable)(large)["logits"], atol=1e-4)


def test_free_sizes_run_whole_images_on_an_engine(tmp_path: Path) -> None:
    made = task("scenes:32?masks=true,channels=3", sizes="free")
    given = model(SMALL, made)
    deployable = made.deployable(given)
    export(deployable, load_target("ort-fp32"), tmp_path / "artifact")
    image = np.random.default_rng(0).random((2, 3, 48, 36), np.float32)
    with torch.no_grad():
        expected = Segmenter(given)(torch.from_numpy(image)).numpy()
    assert np.allclose(load(tmp_path / "artifact")({"image": image})["logits"], expected, atol=1e-4)


def test_free_sizes_are_refused_for_a_model_of_one_size() -> None:
    made = task(sizes="free")
    with pytest.raises(RequestError, match=r"one size.*task_options\.sizes"):
        given = model("timm:vit_tiny_patch16_224?img_size=32,patch_size=8,embed_dim=16,depth=3,num_heads=2,width=16")
        made.deployable(given)


def test_pictures_show_images_masks_and_answers() -> None:
    made = task()
    sheet = Image.open(BytesIO(made.pictures(torch_driver(made.deployable(model())), columns=3)))
    assert sheet.mode == "RGB"
    assert sheet.size == (3 * 98, 3 * 98)
