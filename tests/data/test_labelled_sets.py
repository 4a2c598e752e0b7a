"""torchvision's and Hugging Face's data sets from local folders, and the digit scenes."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.data.dataset import labels_of
from compressor.data.scenes import scenes
from compressor.data.sources import load_data
from compressor.data.stream import Stream
from compressor.errors import RequestError


def write_mnist(root: Path, kind: str, count: int) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
    (raw / f"{kind}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
    (raw / f"{kind}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    with gzip.open(raw / f"{kind}.gz", "wb") as file:
        file.write(b"")


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[Any, Any]) -> list[str]:
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch(count: int) -> dict[str, Any]:
        return {"data": rng.integers(0, 256, (count, 3072), np.uint8), "labels": [k % 10 for k in range(count)]}

    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch(40))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(20))])
    names = [f"class{k}" for k in range(10)]
    file, digest = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": file, "key": "label_names", "md5": digest})


def test_a_local_cifar10_has_its_own_test_split_and_val_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path, monkeypatch)
    parts = {split: load_data(f"torchvision:CIFAR10:{tmp_path}", split) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 36, "val": 4, "test": 20}
    assert parts["train"].info.classes[3] == "class3"
    assert parts["train"].info.shape == (3, 32, 32)
    assert list(labels_of(parts["test"])) == [parts["test"][k]["label"] for k in range(20)]
    assert len({part.info.fingerprint for part in parts.values()}) == 3


def test_a_local_mnist_is_gray(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 30)
    write_mnist(tmp_path, "t10k", 10)
    dataset = load_data(f"torchvision:MNIST:{tmp_path}?size=16", "train")
    assert dataset.info.shape == (1, 16, 16)
    assert dataset[0]["image"].shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:CIFAR10:{root}", "nothing is downloaded"),
        ("torchvision:CIFAR11:{root}", "did you mean.*CIFAR10"),
        ("torchvision:CIFAR10", "torchvision:NAME:ROOT"),
    ],
)
def test_a_wrong_torchvision_spec_is_refused_in_one_line(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        load_data(spec.format(root=tmp_path), "train")
    assert "\n" not in str(caught.value)


def test_a_saved_hugging_face_set_is_read_with_its_class_names(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [Image.new("RGB", (8, 8), (k, k, k)) for k in range(20)], "label": [k % 2 for k in range(20)]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": whole, "test": whole.select(range(6))}).save_to_disk(str(tmp_path / "set"))
    parts = {split: load_data(f"hf:{tmp_path / 'set'}", split) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 18, "val": 2, "test": 6}
    assert parts["train"].info.classes == ("cat", "dog")
    assert parts["test"][3]["image"].max() == np.float32(3 / 255)


def test_a_missing_package_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(RequestError, match=r"pip install 'compressor\[hf\]'"):
        load_data(f"hf:{tmp_path}", "train")


def test_scenes_of_train_and_test_share_no_digit() -> None:
    train, test = scenes("train"), scenes("test")
    seen = {mask.tobytes() for mask in train.masks}
    assert not seen & {mask.tobytes() for mask in test.masks}
    assert len(train) > 20_000 and len(test) > 500


def test_a_scene_is_a_function_of_its_index_and_its_digit_is_drawn_anew() -> None:
    dataset = scenes("train")
    digits = len(dataset.masks)
    assert np.array_equal(dataset[5]["image"], dataset[5]["image"])
    assert dataset[5]["label"] == dataset[5 + digits]["label"]
    assert not np.array_equal(dataset[5]["image"], dataset[5 + digits]["image"])


@pytest.mark.parametrize(("spec", "shape"), [("scenes", (1, 16, 16)), ("scenes:32?channels=3", (3, 32, 32))])
def test_scenes_come_in_the_size_and_channels_that_are_asked_for(spec: str, shape: tuple[int, ...]) -> None:
    dataset = load_data(spec, "val")
    batch = Stream(dataset, 4)[0]
    assert tuple(batch["image"].shape) == (4, *shape)
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1
    assert list(labels_of(dataset)[:5]) == [dataset[k]["label"] for k in range(5)]


def test_labels_are_found_whatever_the_set_is() -> None:
    class Plain:
        info = scenes("val").info

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"label": 7 - index}

    assert list(labels_of(Plain())) == [7, 6, 5]


def test_a_stream_with_a_period_repeats_its_batches_with_their_augmentation() -> None:
    def noisy(samples: Any, rngs: Any) -> dict[str, Any]:
        import torch

        return {"x": torch.tensor([sample["index"] + rng.random() for sample, rng in zip(samples, rngs, strict=True)])}

    stream = Stream(scenes("val"), 4, view=noisy, period=3)
    assert stream[1]["x"].equal(stream[4]["x"])
    assert not stream[1]["x"].equal(stream[2]["x"])
