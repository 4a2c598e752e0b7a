"""Folders of pictures with masks: layouts, pairs, classes, damaged and odd files; digit scenes with masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compressor.data.segfolder import segfolder
from compressor.data.segmented_scenes import segmented_scenes
from compressor.data.sources import load_data
from compressor.data.stream import Stream
from compressor.errors import CompressorError, RequestError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))


def pair(
    images: Path, masks: Path, name: str, *, size: tuple[int, int] = (20, 16), classes: int = 3, palette: bool = False
) -> None:
    """A picture (width, height) whose red is 10 times the class, and its mask."""
    rng = np.random.default_rng(len(name) + sum(name.encode()))
    numbers = rng.integers(0, classes, (size[1], size[0])).astype(np.uint8)
    numbers[0, 0], numbers[0, 1] = 255, classes - 1
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    colours = np.stack([np.where(numbers == 255, 250, 10 * numbers), *rng.integers(0, 256, (2, *numbers.shape))], -1)
    Image.fromarray(colours.astype(np.uint8)).save(images / f"{name}.png")
    mask = Image.fromarray(numbers)
    if palette:
        mask = mask.convert("P")
        mask.putdata(numbers.flatten().tolist())
        mask.putpalette(list(range(256)) * 3)
    mask.save(masks / f"{name}.png")


def folder(root: Path, count: int = 10, **options: Any) -> Path:
    for k in range(count):
        pair(root / "images", root / "masks", f"p{k}", **options)
    return root


def matches(sample: dict[str, Any]) -> bool:
    """Whether every pixel's mask says what its red does."""
    red, mask = np.rint(sample["image"][0] * 255), sample["mask"]
    return bool((np.where(mask == 255, 250, 10 * mask) == red).all())


def test_pictures_and_masks_are_paired_and_divided_disjointly_and_completely(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    parts = {split: load_data(f"segfolder:{root}", split) for split in ("train", "val", "test")}
    assert [len(parts[split]) for split in parts] == [7, 1, 2]
    for part in parts.values():
        assert part.info.shape == (3, 16, 20)
        assert part.info.classes == ("0", "1", "2")
        assert all(matches(part[k]) and part[k]["index"] == k for k in range(len(part)))
    images = [part[k]["image"].tobytes() for part in parts.values() for k in range(len(part))]
    assert len(set(images)) == 10
    assert parts["train"][0]["mask"].dtype == np.int64


@pytest.mark.parametrize("layout", ["split/images", "images/split", "camvid"])
def test_folders_of_splits_are_used_and_val_is_what_is_measured_where_test_is_missing(
    tmp_path: Path, layout: str
) -> None:
    for split, count in (("train", 10), ("val", 4)):
        places = {
            "split/images": (tmp_path / split / "images", tmp_path / split / "masks"),
            "images/split": (tmp_path / "images" / split, tmp_path / "labels" / split),
            "camvid": (tmp_path / split, tmp_path / f"{split}annot"),
        }[layout]
        for k in range(count):
            pair(*places, f"{split}{k}")
    sizes = {split: len(segfolder(str(tmp_path), split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 9, "val": 1, "test": 4}
    whole = f"{tmp_path}?hold_out=false"
    assert len(segfolder(whole, "train")) == 10
    with pytest.raises(RequestError, match="no pictures for the split 'val'"):
        segfolder(whole, "val")


def test_indexed_masks_and_those_of_other_names_load(tmp_path: Path) -> None:
    for k in range(4):
        pair(tmp_path / "views", tmp_path / "truth", f"p{k}", palette=True)
    for mask in (tmp_path / "truth").iterdir():
        mask.rename(mask.with_name(f"{mask.stem}_L.png"))
    dataset = segfolder(f"{tmp_path}?images=views,masks=truth,mask_suffix=_L")
    assert len(dataset) == 3
    assert matches(dataset[0])


def test_classes_come_from_the_option_or_the_file_and_the_ignored_number_may_be_another(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", classes=4)
    assert segfolder(f"{root}?classes=6").info.classes == tuple("012345")
    assert segfolder(f"{root}?classes=[a,b,c,d]").info.classes == ("a", "b", "c", "d")
    (root / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    named = segfolder(str(root))
    assert named.info.classes == ("sky", "road", "car", "tree")
    assert named.info.extra["ignore_index"] == 255
    with pytest.raises(RequestError, match="holds class 255 of 3"):
        segfolder(f"{root}?classes=3,ignore=3")


def test_resizing_keeps_masks_on_their_pictures_and_class_numbers_whole(tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    numbers = np.zeros((40, 60), np.uint8)
    numbers[10:30, 20:50] = 2
    for k in range(3):
        Image.fromarray(np.repeat(numbers[..., None] * 100, 3, -1)).save(root / "images" / f"{k}.png")
        Image.fromarray(numbers).save(root / "masks" / f"{k}.png")
    sample = segfolder(f"{root}?size=20x20")[0]
    assert sample["image"].shape == (3, 20, 20)
    assert set(np.unique(sample["mask"])) == {0, 2}
    assert ((sample["image"][0] > 0.4) == (sample["mask"] == 2)).mean() > 0.9


def test_hidden_files_are_not_looked_at(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    for path in (root / "images" / "._p0.png", root / "images" / "__MACOSX" / "p0.png", root / ".hidden" / "x.png"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no picture")
    assert sum(len(segfolder(str(root), split)) for split in ("train", "val", "test")) == 10


def spoil(root: Path) -> None:
    (root / "images" / "p0.png").write_bytes(b"no picture")
    Image.new("L", (7, 5)).save(root / "masks" / "p1.png")
    Image.new("RGB", (20, 16)).save(root / "masks" / "p2.png")
    (root / "masks" / "p3.png").unlink()


def test_pairs_that_cannot_be_used_are_named_all_at_once_or_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    spoil(root)
    with pytest.raises(RequestError) as error:
        segfolder(str(root))
    message = str(error.value)
    assert "\n" not in message
    for part in ("4 of 10", "p0.png (no picture)", "7x5, the picture 20x16", "mask of colours", "no mask p3.png"):
        assert part in message
    left = [segfolder(f"{root}?skip_bad=true", split) for split in ("train", "val", "test")]
    assert sum(map(len, left)) == 6
    assert len(left[0].info.extra["skipped"]) == 4


def test_a_picture_that_vanishes_is_an_error_that_names_it(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    dataset = segfolder(f"{root}?cache_mb=0")
    for path in (root / "images").iterdir():
        path.unlink()
    with pytest.raises(CompressorError, match=r"images/p\d\.png or its mask"):
        dataset[0]


@pytest.mark.parametrize(
    ("make", "argument", "message"),
    [
        (lambda root: None, "/nowhere", "no such directory"),
        (lambda root: (root / "pics").mkdir(), "", "no folders images/ and masks/.*it holds pics"),
        (lambda root: folder(root), "?clases=3", "clases"),
    ],
)
def test_wrong_requests_are_one_line(tmp_path: Path, make: Any, argument: str, message: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    make(root)
    with pytest.raises(RequestError, match=message):
        segfolder(argument if argument.startswith("/") else f"{root}{argument}")


def test_training_batches_scale_and_mirror_pictures_with_their_masks(tmp_path: Path) -> None:
    from compressor.data.views import training_view

    dataset = segfolder(str(folder(tmp_path / "set")))
    batch = Stream(dataset, 6, view=training_view("auto", dataset.info))[0]
    assert batch["image"].shape == (6, 3, 16, 20)
    assert batch["mask"].shape == (6, 16, 20)
    assert set(np.unique(batch["mask"])) <= {0, 1, 2, 255}


# --- digit scenes ----------------------------------------------------------------------------------------------------


def test_scenes_with_masks_are_pure_functions_of_their_index_and_masks_lie_on_the_digits() -> None:
    dataset = load_data("scenes:32?masks=true", "test")
    first, again = dataset[3], segmented_scenes("test")[3]
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert dataset.info.classes[0] == "background"
    assert len(dataset.info.classes) == 11
    images, masks = (np.stack([dataset[k][key] for k in range(50)]) for key in ("image", "mask"))
    digit, free = images[:, 0][(masks > 0) & (masks < 255)], images[:, 0][masks == 0]
    assert digit.mean() > free.mean() + 0.3
    assert set(np.unique(masks)) <= {*range(11), 255}
    assert set(range(11)) <= set(np.unique(masks))


def test_scenes_have_as_many_objects_and_channels_as_asked() -> None:
    sample = load_data("scenes:64?masks=true,channels=3,objects=8", "train")[0]
    assert sample["image"].shape == (3, 64, 64)
    shares = [
        np.mean([(segmented_scenes("train", 32, 1, objects)[k]["mask"] > 0).mean() for k in range(40)])
        for objects in (1, 8)
    ]
    assert shares[1] > 2 * shares[0]


@pytest.mark.parametrize("spec", ["scenes:8?masks=true", "scenes:32?objects=3", "scenes:32?masks=true,objects=0"])
def test_impossible_scenes_are_refused(spec: str) -> None:
    with pytest.raises(RequestError, match="scenes"):
        load_data(spec, "train")
