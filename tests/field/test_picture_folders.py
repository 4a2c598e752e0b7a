"""Folders of pictures: which file is damaged, and what the system leaves beside the pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from compressor.data.sources import load_data
from compressor.errors import RequestError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(10):
            picture = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))
            picture.save(tmp_path / "set" / name / f"{k}.jpg")
    return tmp_path / "set"


def damage(root) -> set[str]:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (48, 48, 3), np.uint8)).save(buffer, "JPEG")
    (root / "cat" / "truncated.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (root / "cat" / "zero.jpg").touch()
    (root / "dog" / "text.png").write_text("not an image\n")
    return {"cat/truncated.jpg", "cat/zero.jpg", "dog/text.png"}


def test_every_damaged_picture_is_named_before_any_work(root):
    bad = damage(root)
    with pytest.raises(RequestError, match="3 of 23 pictures") as caught:
        load_data(f"imagefolder:{root}", "train")
    assert all(name in str(caught.value) for name in bad) and "\n" not in str(caught.value)


def test_damaged_pictures_are_left_out_by_name_when_asked(root):
    bad = damage(root)
    parts = [load_data(f"imagefolder:{root}?skip_bad=true", split) for split in ("train", "val", "test")]
    assert sum(len(part) for part in parts) == 20 and set(parts[0].info.extra["skipped"]) == bad


def test_what_systems_leave_behind_is_neither_a_class_nor_a_picture(root):
    for name in ("cat/.DS_Store", "cat/._0.jpg", ".ipynb_checkpoints/x-checkpoint.jpg", "__MACOSX/cat/._1.jpg",
                 "dog/Thumbs.db", "dog/desktop.ini"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7\0\2\0\0")
    dataset = load_data(f"imagefolder:{root}?hold_out=false", "train")
    assert dataset.info.classes == ("cat", "dog") and len(dataset) == 20
    assert "skipped" not in dataset.info.extra


def test_empty_class_is_refused_by_name(root):
    (root / "empty_class").mkdir()
    with pytest.raises(RequestError, match="empty_class holds no pictures"):
        load_data(f"imagefolder:{root}", "train")


def test_a_message_of_very_many_damaged_pictures_stays_readable(root):
    for number in range(50):
        (root / "cat" / f"bad-{number:02}.jpg").touch()
    with pytest.raises(RequestError, match=r"50 of 70 pictures.*bad-19\.jpg \(empty\) and 30 more; repair") as caught:
        load_data(f"imagefolder:{root}", "train")
    assert "bad-20.jpg" not in str(caught.value)


def test_a_folder_without_its_kind_is_told_what_to_write(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    with pytest.raises(RequestError, match=r"'set' are a folder; of what\? write imagefolder:set \(or segfolder:set"):
        load_data("set", "train")
    with pytest.raises(RequestError, match="unknown data 'nothing': choose from"):
        load_data("nothing", "train")
