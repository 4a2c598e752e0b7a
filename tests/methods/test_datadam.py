"""DataDAM as a method: what its images start as, who is trained, resuming, students, and what is handed over."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compressor import pipeline
from compressor.data.digits import digits
from compressor.data.distilled_set import read_tensors
from compressor.data.sources import load_data
from compressor.errors import RequestError
from compressor.log import Log
from compressor.methods.dataset import datadam
from compressor.methods.dataset.datadam import DataDAM, DataDAMConfig
from compressor.models.classifier import Classifier
from compressor.models.model import load_model
from compressor.models.spec import load_model_spec
from compressor.recipe import Recipe
from compressor.runtimes.manifest import hash_file
from compressor.tasks.classification import Classification
from compressor.training.phase import Train
from tests.method_runs import Killed, run_method

SMALL: dict[str, Any] = {
    "images_per_class": 2,
    "match": {"steps": 3, "batch": 4},
    "width": 4,
    "depth": 2,
    "student": {"steps": 3, "batch": 8},
}


def trained(
    directory: Path,
    config: Mapping[str, Any] | None = None,
    *,
    data: str = "digits",
    student: str | None = None,
    kill: tuple[str, int] | None = None,
    watch: Callable[[Train], None] = lambda phase: None,
) -> DataDAM:
    """Run the method's phases, or as far as the step (phase, i) that kills them."""
    task = Classification({"train": data}, {})
    students = {"student": lambda: load_model_spec(student, defaults=task.student_defaults())} if student else {}
    method = DataDAM(DataDAMConfig.model_validate({**SMALL, **dict(config or {})}))
    run_method(directory, method, task, students=students, kill=kill, watch=watch)
    return method


def matching(directory: Path, config: Mapping[str, Any] | None = None) -> tuple[DataDAM, Train]:
    """The method, and its matching phase."""
    seen: list[Train] = []
    method = trained(directory, config, watch=seen.append)
    return method, next(phase for phase in seen if phase.name == "match")


# --- what the images start as ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["real", "k-center"])
def test_images_start_as_different_real_images_of_their_class(tmp_path: Path, init: str) -> None:
    method = trained(tmp_path, {"init": init, "images_per_class": 3, "match": {"steps": 0}})
    assert method.images.labels.tolist() == [label for label in range(10) for _ in range(3)]
    pixels, real = method.images.pixels(method.images.images.detach()).numpy(), digits("train")
    for image, label in zip(pixels, method.images.labels.tolist(), strict=True):
        distance = np.abs(real.fields["image"] - image).max(axis=(1, 2, 3))
        assert distance.min() < 1e-5
        assert real.fields["label"][distance.argmin()] == label
    assert len(np.unique(pixels.round(4), axis=0)) == 30


def test_images_start_as_standard_normal_noise_when_asked_to(tmp_path: Path) -> None:
    start = trained(tmp_path, {"init": "noise", "match": {"steps": 0}, "images_per_class": 20}).images.images
    assert abs(float(start.detach().mean())) < 0.05 and abs(float(start.detach().std()) - 1) < 0.05


# --- who is trained --------------------------------------------------------------------------------------------------


def test_gradient_reaches_the_synthetic_pixels_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, phase = matching(tmp_path)
    networks: list[torch.nn.Module] = []
    make = datadam.random_convnet
    monkeypatch.setattr(datadam, "random_convnet", lambda *a: networks.append(make(*a)) or networks[-1])
    batch = {key: value for key, value in phase.streams["train"][0].items()}
    batch["image"].requires_grad_(True)
    for i in (0, 1, 0):
        update = next(iter(phase.step({"train": batch}, i)))
        assert update.owner == "images" and set(update.losses) == {"attention", "features"}
        method.images.images.grad = None
        torch.stack(list(update.losses.values())).sum().backward()
        assert (method.images.images.grad.flatten(1).abs().sum(dim=1) > 0).all()
    assert batch["image"].grad is None
    for network in networks:
        assert network.training
        assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    first, other, again = (network.state_dict()["convolutions.0.weight"] for network in networks)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_matching_lowers_its_losses_in_a_network_that_it_has_not_seen(tmp_path: Path) -> None:
    def loss(config: dict[str, Any], directory: str) -> float:
        config = {"augment": [], "power": 1.0, "width": 8} | config
        _, phase = matching(tmp_path / directory, config)
        whole = {"train": phase.streams["train"][1000]}
        return sum(
            float(value.detach())
            for i in range(3)
            for value in next(iter(phase.step(whole, 10_000 + i))).losses.values()
        )

    before = loss({"match": {"steps": 1, "batch": 32, "lr": 1e-12}}, "before")
    assert loss({"match": {"steps": 25, "batch": 32, "lr": 0.3}}, "after") < 0.7 * before


def test_real_and_synthetic_images_of_a_class_undergo_the_same_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, phase = matching(tmp_path)
    changes: list[tuple[int, bool]] = []
    real = datadam.siamese_augmentation

    def seen(images: Any, operations: Any, generator: torch.Generator, *, shared: bool) -> Any:
        changes.append((generator.initial_seed(), shared))
        return real(images, operations, generator, shared=shared)

    monkeypatch.setattr(datadam, "siamese_augmentation", seen)
    next(iter(phase.step({"train": phase.streams["train"][0]}, 0)))
    assert changes[::2] == changes[1::2] and all(shared for _, shared in changes)
    assert len(set(changes)) == 10


def test_distribution_matching_alone_is_left_when_the_attention_has_no_weight(tmp_path: Path) -> None:
    _, phase = matching(tmp_path, {"attention_weight": 0})
    assert set(next(iter(phase.step({"train": phase.streams["train"][0]}, 0))).losses) == {"features"}


def test_pixels_stay_in_what_can_be_shown_when_they_are_clipped(tmp_path: Path) -> None:
    def pixels(clip: bool) -> torch.Tensor:
        config = {"clip": clip, "match": {"steps": 3, "batch": 4, "lr": 5.0}}
        images = trained(tmp_path / str(clip), config).images
        return images.pixels(images.images.detach())

    clipped, free = pixels(True), pixels(False)
    assert float(clipped.min()) > -1e-6 and float(clipped.max()) < 1 + 1e-6
    assert float(free.min()) < -1e-3


def test_student_is_trained_on_the_final_images_alone(tmp_path: Path) -> None:
    phases: list[Train] = []
    method = trained(tmp_path, watch=phases.append)
    stream = phases[-1].streams["train"]
    batch = stream[0]
    assert len(stream.dataset) == 20 and set(phases[-1].state) == {"student"}
    assert torch.equal(batch["image"], method.images.images.detach()[batch["index"]])
    assert torch.equal(batch["label"], method.images.labels[batch["index"]])


def test_student_is_trained_with_the_normalisation_that_it_is_exported_with(tmp_path: Path) -> None:
    phases: list[Train] = []
    method = trained(tmp_path, {"augment": []}, watch=phases.append)
    images, batch = method.images, phases[-1].streams["train"][0]
    loss = next(iter(phases[-1].step({"train": batch}, 0))).losses["cross_entropy"]
    graph = Classification({"train": "digits"}, {}).deployable(method.student())
    assert graph.driver.settings["mean"] == pytest.approx(images.mean.flatten().tolist())
    logits = Classifier(method.student())(images.pixels(batch["image"]))
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits, batch["label"]), atol=1e-6)


@pytest.mark.parametrize("kill", [("match", 2), ("student", 1)])
def test_run_goes_on_to_the_same_bits_when_killed(tmp_path: Path, kill: tuple[str, int]) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tmp_path / "killed", kill=kill)
    resumed = trained(tmp_path / "killed")
    assert torch.equal(whole.images.images, resumed.images.images)
    states = [method.student().module.state_dict() for method in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# --- what is refused before any work ---------------------------------------------------------------------------------


def test_more_images_than_a_class_has_are_refused_unless_they_start_as_noise(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"class '\d' of the set 'digits/train' has \d+ images, 500 a class are"):
        trained(tmp_path, {"images_per_class": 500})
    assert not list(tmp_path.rglob("finished"))
    none = {"images_per_class": 200, "init": "noise", "match": {"steps": 0}, "student": {"steps": 0}}
    assert len(trained(tmp_path, none).images.labels) == 2000


def test_images_too_small_for_the_depth_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="images of 8x8 are too small for a ConvNet of 4 blocks"):
        trained(tmp_path, {"depth": 4})


def test_student_of_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="tells 7 classes apart"):
        trained(tmp_path, student="timm:resnet18?layers=[1,1,1,1],channels=[4,4,4,4],num_classes=7,in_chans=1")


# --- what is handed over ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: three classes of colour pictures in one hue each."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for channel, name in enumerate(["blue", "green", "red"]):
        (folder / name).mkdir()
        for k in range(12):
            image = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
            image[..., 2 - channel] += 150
            Image.fromarray(image).save(folder / name / f"{k}.png")
    return folder


def run(directory: Path, pictures: Path) -> dict[str, Any]:
    config = {
        **SMALL,
        "match": {"steps": 3, "batch": 4, "lr": 0.1},
        "student": {"steps": 12, "batch": 6, "lr": 0.05, "augment": "shift"},
        "clip": True,
    }
    recipe = Recipe.parse(
        {
            "methods": [{"name": "datadam", "config": config}],
            "students": "timm:resnet18?layers=[1,1,1,1],channels=[8,8,8,8]",
            "data": f"imagefolder:{pictures}",
            "targets": ["ort-fp32"],
            "evaluation": {"samples": 10},
            "benchmark": {"batches": [1], "seconds": 0.2, "rounds": 3},
        }
    )
    page = pipeline.run(recipe.resolve(), directory, log=Log(quiet=True))
    report: dict[str, Any] = json.loads((page.parent / "report.json").read_text())
    return report


def test_own_pictures_and_student_go_the_whole_way(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    report = run(tmp_path / "run", pictures)
    results = tmp_path / "run" / "results"
    assert load_model(tmp_path / "run" / "student").info.architecture == "resnet18"
    (student,), (engine,) = report["models"], report["engines"]
    assert engine["metrics"] == student["metrics"] and student["metrics"]["top1"] > 0.5

    images, labels, classes = read_tensors(results / "distilled.safetensors")
    assert images.shape == (6, 3, 16, 16) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert classes == ("blue", "green", "red")
    folder = load_data(f"imagefolder:{results / 'distilled'}?hold_out=false", "train")
    assert len(folder) == 6 and folder.info.classes == classes
    for k in range(6):
        assert folder[k]["label"] == labels[k]
        assert np.abs(folder[k]["image"] - images[k]).max() <= 0.5 / 255 + 1e-6

    manifest = json.loads((results / "manifest.json").read_text())["files"]
    assert set(manifest) >= {"distilled.safetensors", "distilled.png", "distilled/train/red/001.png"}
    assert all(hash_file(results / name) == facts["sha256"] for name, facts in manifest.items())
    assert any(note.startswith("results/distilled: 6 files, ") for note in report["notes"])
    assert [sheet["title"] for sheet in report["samples"]] == ["distilled"]

    before = (results / "distilled.safetensors").read_bytes()
    results.rename(tmp_path / "moved")
    run(tmp_path / "run", pictures)
    assert (results / "distilled.safetensors").read_bytes() == before
