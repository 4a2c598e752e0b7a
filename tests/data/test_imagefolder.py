"""Folders of pictures: classes, splits, damaged and hidden files, sizes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor.data.imagefolder import imagefolder
from compressor.data.sources import load_data
from compressor.data.stream import Stream
from compressor.errors import CompressorError, RequestError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))


def picture(path: Path, size: tuple[int, int] = (20, 20), mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


def folder(root: Path, count: int = 10, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for label, name in enumerate(classes):
        for k in range(count):
            picture(root / name / f"{k}.png", seed=100 * label + k)
    return root


def names(root: Path, split: str) -> set[str]:
    dataset = imagefolder(str(root), split)
    return {dataset._name(k) for k in range(len(dataset))}


def test_one_folder_is_divided_disjointly_and_completely_with_every_class_in_every_split(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    parts = {split: imagefolder(str(root), split) for split in ("train", "val", "test")}
    assert [len(parts[split]) for split in ("train", "val", "test")] == [14, 2, 4]
    assert len(set().union(*(names(root, split) for split in parts))) == 20
    for dataset in parts.values():
        assert set(dataset.labels) == {0, 1}
        assert dataset.info.classes == ("cat", "dog")


def test_a_further_picture_leaves_most_others_in_their_splits(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", count=20)
    before = names(root, "test")
    picture(root / "cat" / "new.png", seed=9)
    assert len(before - names(root, "test")) <= 1


def test_folders_of_splits_are_used_and_val_is_held_out_of_train_when_it_is_missing(tmp_path: Path) -> None:
    folder(tmp_path / "set" / "train", count=20)
    folder(tmp_path / "set" / "test", count=3)
    sizes = {split: len(imagefolder(str(tmp_path / "set"), split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 36, "val": 4, "test": 6}
    assert all("/test/" in name for name in names(tmp_path / "set", "test"))
    assert not names(tmp_path / "set", "val") & names(tmp_path / "set", "train")


def test_the_validation_folder_is_measured_when_there_is_no_test_folder(tmp_path: Path) -> None:
    folder(tmp_path / "set" / "train", count=20)
    folder(tmp_path / "set" / "val", count=3)
    assert all("/val/" in name for name in names(tmp_path / "set", "test"))
    assert all("/train/" in name for name in names(tmp_path / "set", "val"))


def test_an_unknown_class_in_the_test_folder_is_refused_by_name(tmp_path: Path) -> None:
    folder(tmp_path / "set" / "train")
    folder(tmp_path / "set" / "test", classes=("cat", "fox"))
    with pytest.raises(RequestError, match="fox.*cat, dog"):
        imagefolder(str(tmp_path / "set"), "test")


def test_hidden_files_and_folders_are_neither_classes_nor_pictures(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    for hidden in ("cat/._0.png", "cat/.DS_Store", ".ipynb_checkpoints/x.png", "__MACOSX/cat/0.png", "dog/notes.txt"):
        (root / hidden).parent.mkdir(parents=True, exist_ok=True)
        (root / hidden).write_bytes(b"\0\5\26\7 no picture")
    dataset = imagefolder(str(root), "train")
    assert dataset.info.classes == ("cat", "dog")
    assert len(dataset) == 14
    assert "skipped" not in dataset.info.extra


def damaged(root: Path) -> Path:
    folder(root)
    (root / "cat" / "zero.jpg").write_bytes(b"")
    (root / "dog" / "text.png").write_text("hello")
    picture(root / "dog" / "whole.jpg", (64, 64))
    content = (root / "dog" / "whole.jpg").read_bytes()
    (root / "dog" / "truncated.jpg").write_bytes(content[: len(content) // 2])
    return root


def test_damaged_pictures_are_refused_before_any_work_and_every_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        imagefolder(str(damaged(tmp_path / "set")), "val")
    message = str(caught.value)
    assert "3 of 24" in message and "skip_bad" in message and "\n" not in message
    assert all(name in message for name in ("cat/zero.jpg", "dog/text.png", "dog/truncated.jpg"))


def test_damaged_pictures_are_left_out_and_listed_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = damaged(tmp_path / "set")
    total = sum(len(imagefolder(f"{root}?skip_bad=true", split)) for split in ("train", "val", "test"))
    assert total == 21
    skipped = imagefolder(f"{root}?skip_bad=1", "train").info.extra["skipped"]
    assert skipped == ["cat/zero.jpg", "dog/text.png", "dog/truncated.jpg"]
    assert all(name in caplog.text for name in skipped)
    assert caplog.text.count("cat/zero.jpg") == 1


def test_a_picture_that_breaks_after_the_check_is_named(tmp_path: Path) -> None:
    dataset = imagefolder(str(folder(tmp_path / "set")), "train")
    Path(dataset._name(0)).write_bytes(b"")
    with pytest.raises(CompressorError, match=r"\.png cannot be read"):
        dataset[0]


def test_pictures_are_looked_at_again_only_when_a_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "set")
    first = imagefolder(str(root), "train").info.fingerprint
    monkeypatch.setattr("compressor.data.imagefolder.look_at", None)
    assert imagefolder(str(root), "train").info.fingerprint == first
    monkeypatch.undo()
    os.utime(root / "cat" / "0.png", (1, 1))
    assert imagefolder(str(root), "train").info.fingerprint != first


def test_pictures_of_one_small_size_are_taken_as_they_are(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    dataset = imagefolder(str(root), "train")
    original = np.asarray(Image.open(dataset._name(3)), np.float32).transpose(2, 0, 1) / 255
    assert dataset.info.shape == (3, 20, 20)
    assert dataset[3]["image"].dtype == np.float32
    assert np.array_equal(dataset[3]["image"], original)


def test_pictures_of_mixed_sizes_are_resized_and_cropped_to_one(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    picture(root / "cat" / "wide.png", (50, 20))
    assert imagefolder(str(root), "train").info.shape == (3, 224, 224)
    dataset = load_data(f"imagefolder:{root}?size=16x12", "train")
    batch = Stream(dataset, 15)[0]
    assert tuple(batch["image"].shape) == (15, 3, 16, 12)
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1


def test_gray_pictures_have_one_channel_and_colour_is_kept_when_only_some_are_gray(tmp_path: Path) -> None:
    for k in range(5):
        picture(tmp_path / "gray" / "a" / f"{k}.png", mode="L", seed=k)
        picture(tmp_path / "some" / "a" / f"{k}.png", mode="L" if k else "RGB", seed=k)
    assert imagefolder(str(tmp_path / "gray")).info.shape[0] == 1
    assert imagefolder(str(tmp_path / "some")).info.shape[0] == 3
    assert imagefolder(f"{tmp_path / 'gray'}?channels=3").info.shape[0] == 3


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_every_mode_of_a_picture_becomes_pixels_from_0_to_1(tmp_path: Path, mode: str) -> None:
    for k in range(5):
        path = tmp_path / "set" / "a" / f"{k}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        if mode == "I;16":
            Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(path)
        else:
            Image.new("RGB", (8, 8), "white").convert(mode).save(path)
    image = imagefolder(f"{tmp_path / 'set'}?channels=3")[0]["image"]
    assert image.shape == (3, 8, 8)
    assert np.allclose(image, 1, atol=0.01)


def test_a_picture_that_lies_on_its_side_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for k in range(5):
        path = tmp_path / "set" / "a" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20)).save(path, exif=exif)
    assert imagefolder(str(tmp_path / "set")).info.shape == (3, 40, 20)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagefolder:nowhere", "no such directory"),
        ("imagefolder:{root}?sise=3", "did you mean.*size"),
        ("imagefolder:{root}?size=0", "size"),
        ("imagefolder:{root}/cat", "no class folders"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(tmp_path: Path, spec: str, message: str) -> None:
    root = folder(tmp_path / "set")
    with pytest.raises(RequestError, match=message) as caught:
        load_data(spec.format(root=root), "train")
    assert "\n" not in str(caught.value)


def test_an_empty_class_is_refused_by_name(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    (root / "emu").mkdir()
    with pytest.raises(RequestError, match="emu holds no pictures"):
        imagefolder(str(root))
