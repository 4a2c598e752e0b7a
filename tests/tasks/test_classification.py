"""The classification task: what fits, how a model is packed, what is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from compressor.deployable import Deployable
from compressor.errors import ModelError, RequestError
from compressor.evaluate import TorchRun, evaluate
from compressor.models.classifier import Classifier
from compressor.models.model import Model, ModelInfo
from compressor.models.spec import load_model_spec
from compressor.registry import load_task
from compressor.runtimes.load import driver_class
from compressor.runtimes.runtime import Driver
from compressor.tasks.classification import Classification, ClassificationMetric

RESNET = "timm:resnet18?layers=[1,1,1,1],channels=[8,8,8,16],num_classes=10,in_chans=1"


@pytest.fixture
def task() -> Classification:
    return Classification({"train": "scenes"}, {})


def own(module: nn.Module, **extra: object) -> Model:
    return Model(module, ModelInfo("python", type(module).__name__, {}, (), dict(extra)))


def driver_of(deployable: Deployable) -> Driver:
    runs = {name: TorchRun(graph.module, graph.outputs) for name, graph in deployable.graphs.items()}
    return driver_class(deployable.driver.name)(runs, deployable.driver.settings, deployable.assets)


class Bright(nn.Module):
    """Tells by the mean of its input: class 1 where it is above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        mean = self.scale * image.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean, *[mean * 0 - 100] * 8], dim=1)


def test_the_task_is_found_by_its_name() -> None:
    assert load_task("classification") is Classification


@pytest.mark.parametrize(
    "spec",
    [
        RESNET,
        "timm:mobilenetv3_small_050?num_classes=10,in_chans=1",
        "timm:vit_tiny_patch16_224?num_classes=10,in_chans=1,img_size=8,patch_size=4,embed_dim=16,depth=2,num_heads=2",
        "torchvision:resnet18?num_classes=10",
        "transformers:{folder}",
    ],
)
def test_a_deployed_model_gives_its_own_logits_from_raw_pixels(tmp_path: Path, task: Classification, spec: str) -> None:
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=10)
    config.update({"image_size": 24, "patch_size": 8, "num_channels": 3})
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    model = load_model_spec(spec.format(folder=tmp_path / "vit"))
    task.check(model)
    request = task.request(3)
    outputs = driver_of(task.deployable(model))(request)
    with torch.no_grad():
        expected = Classifier(model)(torch.from_numpy(request["image"]))
    assert outputs["logits"].shape == (3, 10)
    assert np.allclose(outputs["logits"], expected.numpy(), atol=1e-5)
    assert np.allclose(outputs["probabilities"].sum(axis=1), 1, atol=1e-5)


def test_a_model_is_measured_with_its_own_normalisation(task: Classification) -> None:
    """Fed with another mean, the same weights decide otherwise."""
    pixels = {"image": np.full((1, 1, 16, 16), 0.3, np.float32)}
    low = driver_of(task.deployable(own(Bright(), mean=[0.1], std=[0.5])))
    high = driver_of(task.deployable(own(Bright(), mean=[0.5], std=[0.5])))
    assert low(pixels)["logits"].argmax() == 1
    assert high(pixels)["logits"].argmax() == 0


def test_the_example_inputs_are_normalised_images_of_the_data(task: Classification) -> None:
    graph = task.deployable(own(Bright(), mean=[0.5], std=[0.25])).graphs["classifier"]
    image = task.dataset("train", "test")[0]["image"]
    assert np.allclose(graph.inputs["image"][0].numpy(), (image - 0.5) / 0.25, atol=1e-6)
    assert graph.inputs["image"].shape[0] == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("timm:resnet18?num_classes=7,in_chans=1", "7 classes apart.*has 10.*num_classes=10"),
        ("timm:resnet18?num_classes=10,in_chans=4", "images of 4 channels"),
    ],
)
def test_a_model_that_does_not_fit_colour_data_is_refused(model: str, message: str) -> None:
    task = Classification({"train": "scenes?channels=3"}, {})
    loaded = load_model_spec(model.replace("in_chans=1", "in_chans=3"))
    with pytest.raises(RequestError, match=message):
        task.check(loaded)


def test_a_model_without_logits_is_refused(task: Classification) -> None:
    with pytest.raises(ModelError, match="must return logits"):
        task.check(own(nn.Sequential(nn.Conv2d(1, 3, 1))))


def test_a_model_that_cannot_take_the_images_is_refused_in_one_line(task: Classification) -> None:
    with pytest.raises(RequestError, match="cannot take images of shape 1x16x16") as caught:
        task.check(own(nn.Sequential(nn.Flatten(), nn.Linear(9, 10))))
    assert "\n" not in str(caught.value)


def test_a_model_that_knows_the_classes_in_another_order_is_refused(task: Classification) -> None:
    with pytest.raises(RequestError, match="another order"):
        task.check(own(Bright(), classes=[str(k) for k in reversed(range(10))]))


def test_checking_leaves_the_model_in_its_mode(task: Classification) -> None:
    model = load_model_spec(RESNET)
    model.module.train()
    task.check(model)
    assert model.module.training


def test_a_perfect_model_scores_one_in_every_figure(task: Classification) -> None:
    feed = task.feeds(60)["test"]
    metric = task.metrics()[0]
    samples = [feed.dataset[k] for k in range(len(feed.dataset))]
    metric.update("test", {"logits": np.eye(10)[[s["label"] for s in samples]]}, samples)
    assert metric.compute() == {"macro_f1": 1.0, "top1": 1.0, "top5": 1.0}
    assert {figure.name for figure in task.figures} == set(metric.compute())


def test_top5_counts_the_label_among_the_five_best() -> None:
    metric = ClassificationMetric({"top1", "top5"})
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    metric.update("test", {"logits": scores}, [{"label": 4}, {"label": 5}])
    assert metric.compute() == {"top1": 0.0, "top5": 0.5}


def test_scores_that_are_not_finite_count_as_wrong() -> None:
    metric = ClassificationMetric({"top1", "top5", "macro_f1"})
    metric.update("test", {"logits": np.array([[np.nan, 0], [1, 0]])}, [{"label": 0}, {"label": 0}])
    assert metric.compute()["top1"] == 0.5


def test_five_or_fewer_classes_have_no_top5(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        for k in range(3):
            (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), k).save(tmp_path / "set" / name / f"{k}.png")
    task = Classification({"train": f"imagefolder:{tmp_path / 'set'}"}, {})
    assert [figure.name for figure in task.figures] == ["top1", "macro_f1"]


def test_an_evaluation_measures_the_same_mixed_samples_every_time(task: Classification) -> None:
    feed = task.feeds(50)["test"]
    indices = [feed.dataset[k]["index"] for k in range(len(feed.dataset))]
    assert indices == [task.feeds(50)["test"].dataset[k]["index"] for k in range(50)]
    assert len({feed.dataset[k]["label"] for k in range(50)}) > 5
    driver = driver_of(task.deployable(load_model_spec(RESNET)))
    first = evaluate(driver, task.feeds(50), task.metrics())
    assert first == evaluate(driver, task.feeds(50), task.metrics())
    assert 0 <= first["top1"] <= first["top5"] <= 1


def test_the_loss_is_the_cross_entropy_on_raw_pixels(task: Classification) -> None:
    model = load_model_spec(RESNET)
    batch = {"image": torch.rand(4, 1, 16, 16), "label": torch.tensor([1, 2, 3, 4])}
    expected = nn.functional.cross_entropy(Classifier(model)(batch["image"]), batch["label"])
    assert torch.equal(task.loss(model, batch)["cross_entropy"], expected)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"train": "scenes"}, {"spilt": "val"}, "spilt.*split"),
        ({"train": "scenes"}, {"split": "dev"}, "split"),
    ],
)
def test_a_wrong_option_is_refused_by_name(data: dict[str, str], options: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Classification(data, options)


def test_a_missing_role_is_named(task: Classification) -> None:
    with pytest.raises(RequestError, match="--data unlabelled=SPEC"):
        task.dataset("unlabelled")
