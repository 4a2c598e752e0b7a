"""A bundle is loaded like its artifact, and called with what an app has: pictures, labels."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image, ImageOps

from compressor.errors import ArtifactError, RequestError, TargetError
from compressor.exporters.bundle import write_bundle
from compressor.runtimes import load
from compressor.runtimes.images import fit, png_bytes, to_graph
from compressor.runtimes.loaded_model import LoadedModel
from compressor.runtimes.manifest import hash_file
from compressor.runtimes.runtime import Port
from tests.small_artifacts import LABELS, classifier, generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bundles")
    write_bundle(classifier(made / "looks"), made / "looks.zip")
    write_bundle(generator(made / "draws"), made / "draws.zip")
    write_bundle(generator(made / "latents", clip=None), made / "latents.zip")
    return made


@pytest.fixture(scope="module")
def looks(folder: Path) -> LoadedModel:
    return load(folder / "looks.zip")


@pytest.fixture(scope="module")
def draws(folder: Path) -> LoadedModel:
    return load(folder / "draws.zip")


def left(size: int = 4) -> np.ndarray:
    """Bright on the left half."""
    image = np.zeros((size, size), np.uint8)
    image[:, : size // 2] = 255
    return image


def test_bundle_and_artifact_give_the_same(folder: Path, looks: LoadedModel) -> None:
    image = np.random.default_rng(0).random((3, 1, 4, 4)).astype(np.float32)
    from_folder = load(folder / "looks")({"image": image})
    assert np.array_equal(looks({"image": image})["probabilities"], from_folder["probabilities"])


@pytest.mark.parametrize("form", ["bytes", "floats", "channel", "batch"])
def test_classifier_gives_labels_whatever_form_the_picture_has(looks: LoadedModel, form: str) -> None:
    image = left()
    given = {"bytes": image, "floats": image / 255.0, "channel": image[:, :, None], "batch": image[None, :, :, None]}
    found = looks(given[form])
    labels = found[0] if form == "batch" else found
    assert labels[0].name == "left"
    assert {label.name for label in labels} == set(LABELS)
    assert sum(label.probability for label in labels) == pytest.approx(1, abs=1e-5)
    assert labels[0].index == 1 and labels[0].probability > labels[1].probability > labels[2].probability


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_classifier_takes_picture_files_of_any_mode_and_size(looks: LoadedModel, tmp_path: Path, mode: str) -> None:
    Image.fromarray(left(40)).convert(mode).save(tmp_path / "picture.png")
    assert looks(tmp_path / "picture.png")[0].name == "left"
    assert looks(str(tmp_path / "picture.png"))[0].name == "left"


def test_generator_gives_pictures_of_labels(draws: LoadedModel) -> None:
    assert draws(label=2).tolist() == [[[255], [255]], [[255], [255]]]
    several = draws(label=[0, 2, 3], seed=1)
    assert (several.dtype, several.shape) == (np.uint8, (3, 2, 2, 1))
    assert several[2, :, :, 0].tolist() == [[0, 255], [0, 255]]
    assert set(np.unique(draws(label=1))) <= {127, 128}


def test_latents_stay_numbers(folder: Path) -> None:
    latents = load(folder / "latents.zip")(label=3)
    assert (latents.dtype, latents.shape) == (np.float32, (1, 2, 2))


def test_labels_are_called_by_name(looks: LoadedModel) -> None:
    assert looks.label_index("bright") == 2 and looks.label_index("1") == 1
    with pytest.raises(RequestError, match="no label 'brigt': did you mean bright"):
        looks.label_index("brigt")


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4,)), r"must have the shape \(height, width\)"),
        (np.zeros((1, 5, 5)), r"must have the shape \(height, width\)"),
        (np.zeros((0, 4)), "must have the shape"),
        (np.zeros((4, 4, 3)), r"takes images of 1 channels, got 3 in the shape \(4, 4, 3\)"),
        (np.zeros((4, 4), np.int64), "must be uint8, or float in .0, 1., got int64"),
        (np.full((4, 4), 255.0), "must lie in .0, 1., got 255 to 255: divide by 255"),
        (np.full((4, 4), np.nan), "not finite"),
        ([[1, 2], [3]], "must be an array or a path"),
        (np.array([["a"]]), "must be uint8"),
        ("nowhere.png", "cannot read the picture nowhere.png: No such file"),
    ],
)
def test_picture_that_does_not_fit_is_refused_in_one_line(looks: LoadedModel, image: object, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        looks(image)
    assert "\n" not in str(caught.value)


def test_file_that_is_no_picture_is_named(looks: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no picture")
    with pytest.raises(RequestError, match=r"cannot read the picture .*text\.png"):
        looks(path)
    data = png_bytes(left(64))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(RequestError, match=r"cannot read the picture .*text\.png"):
        looks(path)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m(left()), r"takes no image: call model\(label=...\)"),
        (lambda m: m(), r"nothing is given: call model\(label=...\)"),
        (lambda m: m(label=4), r"must lie in \[0, 4\)"),
        (lambda m: m(label=-1), r"must lie in \[0, 4\)"),
        (lambda m: m(label="four"), "no label 'four': give a number"),
        (lambda m: m(label=[]), "give 1 to 4096 labels"),
        (lambda m: m(label=0, seed=-1), "a seed must be a whole number"),
        (lambda m: m(label=0, seed=0.5), "a seed must be a whole number"),
    ],
)
def test_wrong_request_to_a_generator_is_refused_in_one_line(draws: LoadedModel, call, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        call(draws)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rows", "columns", "height", "width"), [(40, 64, 8, 8), (5, 9, 20, 16), (64, 64, 32, 16)])
def test_resizing_is_that_of_the_training_data(rows: int, columns: int, height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), np.uint8)
    ours = fit(image.astype(np.float32) / 255, height, width) * 255
    fitted = ImageOps.fit(Image.fromarray(image), (width, height), method=Image.Resampling.BICUBIC)
    assert np.abs(ours - np.asarray(fitted, np.float32)).max() < 2  # Pillow rounds between its two passes


def test_gray_fills_three_channels_and_opacity_is_left_out() -> None:
    port = Port("image", "image", ("batch", 3, "height", "width"), "float32")
    array, batched = to_graph(np.full((5, 6), 255, np.uint8), port)
    assert array.shape == (1, 3, 5, 6) and array.min() == 1 and not batched
    array, batched = to_graph(np.zeros((2, 5, 6, 4), np.float32), port)
    assert array.shape == (2, 3, 5, 6) and batched


def test_pictures_are_written_without_a_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shape in ((3, 5), (3, 5, 1), (3, 5, 3)):
        pixels = rng.integers(0, 256, shape, np.uint8)
        (tmp_path / "picture.png").write_bytes(png_bytes(pixels))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "picture.png")), pixels.squeeze())
    palette = rng.integers(0, 256, (4, 3), np.uint8)
    mask = rng.integers(0, 4, (6, 7), np.uint8)
    (tmp_path / "mask.png").write_bytes(png_bytes(mask, palette))
    picture = Image.open(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(picture), mask)
    assert np.array_equal(np.asarray(picture.convert("RGB")), palette[mask])


def test_loading_leaves_nothing_behind_and_imports_no_torch(folder: Path, tmp_path: Path) -> None:
    code = f"""
        import sys
        import numpy as np
        from compressor.runtimes import load
        with load({str(folder / "looks.zip")!r}) as model:
            assert model(np.zeros((4, 4), np.uint8))[0].name == "dark"
        heavy = {{"torch", "onnx", "PIL", "typer", "rich", "yaml"}} & set(sys.modules)
        assert not heavy, heavy
    """
    environment = {"TMPDIR": str(tmp_path), "PATH": "/usr/bin"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120, env=environment)
    assert [path.name for path in tmp_path.iterdir() if "compressor" in path.name] == []


def test_bundle_that_fails_to_load_leaves_nothing_behind_and_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = classifier(tmp_path / "broken")
    manifest = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").write_text(
        manifest.replace('"logits"', '"scores"').replace('"name": "image"', '"name": "im"')
    )
    write_bundle(artifact, tmp_path / "broken.zip")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(ArtifactError, match="other inputs or outputs"):
        load(tmp_path / "broken.zip")
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(("what", "number"), [("IR version", 99), ("opset", 99)])
def test_graph_that_is_newer_than_the_engine_says_what_it_needs(tmp_path: Path, what: str, number: int) -> None:
    artifact = classifier(tmp_path / "new")
    path = artifact / "classifier.onnx"
    model = onnx.load(str(path))
    if what == "opset":
        model.opset_import[0].version = number
    else:
        model.ir_version = number
    onnx.save(model, str(path))
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["graphs"]["classifier"]["sha256"] = hash_file(path)
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    write_bundle(artifact, tmp_path / "new.zip")
    with pytest.raises(
        TargetError, match=rf"new.zip.*needs ONNX {what} {number}, ONNX Runtime \S+ has \d+: upgrade"
    ) as caught:
        load(tmp_path / "new.zip")
    assert "\n" not in str(caught.value) and "onnxruntime_src" not in str(caught.value)


def test_run_directory_is_refused_with_what_to_load(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    with pytest.raises(RequestError, match="is a run: load one of the folders"):
        load(tmp_path)
