"""Distilled sets: what they start from, and that they are read back as they were written."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compressor.data.distilled_set import class_folders, picture_sheet, read_tensors, write_folder, write_tensors
from compressor.data.samplers import PerField
from compressor.data.sources import load_data
from compressor.data.synthetic_images import k_center
from compressor.errors import ArtifactError, RequestError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("classes", "folders"),
    [
        (("cat", "dog"), ["cat", "dog"]),
        (("dog", "cat"), ["0-dog", "1-cat"]),
        (("a/b", "c"), ["0-a_b", "1-c"]),
        (("..", "x"), ["0", "1-x"]),
        (tuple(map(str, range(12))), [f"{k:02d}-{k}" for k in range(12)]),
    ],
)
def test_folders_of_classes_sort_as_their_labels(classes: tuple[str, ...], folders: list[str]) -> None:
    assert class_folders(classes) == folders == sorted(folders)


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_is_read_back_within_eight_bits(tmp_path: Path, channels: int) -> None:
    images = np.random.default_rng(0).uniform(-0.2, 1.2, (6, channels, 12, 10)).astype(np.float32)
    labels = np.array([0, 0, 1, 1, 2, 2])
    write_folder(tmp_path / "set", images, labels, ("zebra", "ape", "bear"))
    found = load_data(f"imagefolder:{tmp_path / 'set'}?hold_out=false", "train")
    assert [found[k]["label"] for k in range(6)] == labels.tolist()
    shown = np.clip(images, 0, 1)
    assert max(np.abs(found[k]["image"] - shown[k]).max() for k in range(6)) <= 0.5 / 255 + 1e-6
    with pytest.raises(RequestError, match="no pictures for the split 'test'"):
        load_data(f"imagefolder:{tmp_path / 'set'}?hold_out=false", "test")
    assert len(load_data(f"imagefolder:{tmp_path / 'set'}", "train")) == 3  # one a class is held out for the test


def test_folder_takes_real_pictures_to_measure_on(tmp_path: Path) -> None:
    images, labels = np.zeros((4, 1, 8, 8), np.float32), np.array([0, 0, 1, 1])
    write_folder(tmp_path / "set", images, labels, ("ape", "bear"))
    write_folder(tmp_path / "real", images + 1, labels, ("ape", "bear"))
    (tmp_path / "real" / "train").rename(tmp_path / "set" / "test")
    parts = {split: load_data(f"imagefolder:{tmp_path / 'set'}?hold_out=false", split) for split in ("train", "test")}
    assert {split: (len(part), float(part[0]["image"].mean())) for split, part in parts.items()} == {
        "train": (4, 0.0),
        "test": (4, 1.0),
    }


def test_images_of_other_channels_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="images of 4 channels"):
        write_folder(tmp_path / "set", np.zeros((2, 4, 8, 8), np.float32), np.array([0, 1]), ("a", "b"))


def test_tensors_are_read_back_bit_by_bit(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(4, 1, 5, 5)).astype(np.float32)
    write_tensors(tmp_path / "set.safetensors", images, np.array([0, 0, 1, 1]), ("one", "two"))
    found, labels, classes = read_tensors(tmp_path / "set.safetensors")
    assert np.array_equal(found, images) and labels.tolist() == [0, 0, 1, 1] and classes == ("one", "two")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="no distilled set"):
        read_tensors(tmp_path / "bad.safetensors")


def test_sheet_shows_a_row_a_class() -> None:
    images = np.zeros((4, 1, 8, 8), np.float32)
    images[3] = 1
    picture = np.asarray(Image.open(io.BytesIO(picture_sheet(images, np.array([0, 0, 1, 1])))))
    assert picture.shape == (100, 100)
    assert picture[75, 75] == 255 and picture[75, 25] == picture[25, 75] == 0


def test_k_center_takes_the_point_farthest_from_those_taken() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0], [-5.0]])
    assert k_center(points, 4).tolist() == [2, 3, 4, 0]
    assert sorted(k_center(torch.zeros(3, 2), 3).tolist()) == [0, 1, 2]


def test_every_part_of_a_batch_holds_all_classes_in_blocks() -> None:
    labels = (0, 1, 2) * 10
    chosen = PerField(labels, parts=2)(0, 12, 30, lambda k: np.random.default_rng(k))
    assert [labels[k] for k in chosen] == [0, 0, 1, 1, 2, 2] * 2
    assert len(set(chosen)) == 12
    with pytest.raises(RequestError, match="cannot hold 3 classes"):
        PerField(labels, parts=2)(0, 9, 30, lambda k: np.random.default_rng(k))
