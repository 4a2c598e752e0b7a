"""Bundles are written whole, the same bytes for the same artifact, with all that an app needs; or they are refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compressor.errors import ArtifactError, CompressorError, RequestError
from compressor.exporters.bundle import write_bundle
from compressor.exporters.licence import licence_note
from compressor.runtimes import load
from compressor.runtimes.bundle import check_bundle, read_bundle
from compressor.runtimes.manifest import hash_file, read_manifest
from compressor.runtimes.zip_reader import Limits
from tests.small_artifacts import LABELS, classifier, generator, segmenter


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return classifier(tmp_path / "artifact", recipe={"seed": 3})


def change(artifact: Path, edit) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    edit(manifest)
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def with_weights_beside(artifact: Path, location: str, listed: bool) -> None:
    """The graph's weights move to a file of their own."""
    path = artifact / "classifier.onnx"
    model = onnx.load(str(path))
    data = b""
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": str(len(data)), "length": str(len(raw))}.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        data += raw
    onnx.save(model, str(path))
    (artifact / location).write_bytes(data)
    facts = {"sha256": hash_file(path)}
    if listed:
        facts |= {"data_file": location, "data_sha256": hash_file(artifact / location)}
    change(artifact, lambda manifest: manifest["graphs"]["classifier"].update(facts))


def test_bundle_holds_every_file_and_a_manifest_that_describes_them(artifact: Path, tmp_path: Path) -> None:
    figures = {"teacher": {"top1": 0.9}, "engine": {"top1": 0.8, "macro_f1": None}}
    written = write_bundle(artifact, tmp_path / "x.zip", metrics=figures, licence="Ask its author.")
    manifest = check_bundle(tmp_path / "x.zip")
    assert manifest == written == read_bundle(tmp_path / "x.zip")
    assert set(zipfile.ZipFile(tmp_path / "x.zip").namelist()) == {"manifest.json", "classifier.onnx"}
    facts = manifest.bundle
    assert facts is not None
    assert facts.labels == tuple(LABELS) and facts.metrics == figures and facts.licence == "Ask its author."
    assert [(port.name, port.shape) for port in facts.inputs] == [("image", ("batch", 1, 4, 4))]
    assert [port.name for port in facts.outputs] == ["logits", "probabilities"]
    assert "mean, std: Of the normalisation" in facts.processing
    assert manifest.metadata == {"recipe": {"seed": 3}}
    assert manifest.graphs == read_manifest(artifact).graphs


def test_same_artifact_gives_the_same_bytes_and_no_times_of_this_machine(artifact: Path, tmp_path: Path) -> None:
    write_bundle(artifact, tmp_path / "a.zip")
    shutil.copytree(artifact, tmp_path / "copy")
    (tmp_path / "copy" / "classifier.onnx").touch()
    write_bundle(tmp_path / "copy", tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    entries = zipfile.ZipFile(tmp_path / "a.zip").infolist()
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert zipfile.ZipFile(tmp_path / "a.zip").testzip() is None


def test_weights_that_shrink_like_a_bomb_are_stored(artifact: Path, tmp_path: Path) -> None:
    (artifact / "zeros.bin").write_bytes(bytes(3 * 2**20))
    change(artifact, lambda manifest: manifest["files"].update({"zeros.bin": hash_file(artifact / "zeros.bin")}))
    write_bundle(artifact, tmp_path / "x.zip")
    assert load(tmp_path / "x.zip")(np.zeros((4, 4)))[0].name == "dark"


@pytest.mark.parametrize("maker", [classifier, generator, segmenter])
def test_every_driver_of_ours_is_described_without_an_engine(tmp_path: Path, maker) -> None:
    artifact = maker(tmp_path / "artifact")
    change(artifact, lambda manifest: manifest["engine"].update(name="tensorrt"))
    facts = write_bundle(artifact, tmp_path / "x.zip").bundle
    assert facts is not None and facts.inputs and facts.outputs and "Inputs:" in facts.processing


def test_weights_in_a_side_file_travel_when_they_are_listed(artifact: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((2, 1, 4, 4)).astype(np.float32)
    expected = load(artifact)({"image": image})["logits"]
    with_weights_beside(artifact, "classifier.onnx.data", listed=True)
    write_bundle(artifact, tmp_path / "x.zip")
    shutil.rmtree(artifact)
    assert "classifier.onnx.data" in zipfile.ZipFile(tmp_path / "x.zip").namelist()
    assert np.array_equal(load(tmp_path / "x.zip")({"image": image})["logits"], expected)


@pytest.mark.parametrize("location", ["left_behind.data", "../outside.data"])
def test_weights_in_a_side_file_that_is_not_listed_are_refused(artifact: Path, tmp_path: Path, location: str) -> None:
    with_weights_beside(artifact, location, listed=False)
    for attempt in (lambda: write_bundle(artifact, tmp_path / "x.zip"), lambda: load(artifact)):
        with pytest.raises(ArtifactError, match=r"keeps weights in another file .*does not list") as caught:
            attempt()
        assert "\n" not in str(caught.value) and location in str(caught.value)
    assert not (tmp_path / "x.zip").exists()


def test_weights_at_an_absolute_path_are_refused(artifact: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.data"
    with_weights_beside(artifact, str(secret), listed=False)
    with pytest.raises(ArtifactError, match="keeps weights in another file"):
        write_bundle(artifact, tmp_path / "x.zip")


def test_reference_inside_a_subgraph_is_found(artifact: Path, tmp_path: Path) -> None:
    tensor = helper.make_tensor("c", TensorProto.FLOAT, [1], [0.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "hidden.data"
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    branch = helper.make_graph([constant], "b", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])])
    path = artifact / "classifier.onnx"
    model = onnx.load(str(path))
    model.graph.node.append(helper.make_node("If", ["flag"], ["d"], then_branch=branch, else_branch=branch))
    onnx.save(model, str(path))
    change(artifact, lambda manifest: manifest["graphs"]["classifier"].update(sha256=hash_file(path)))
    with pytest.raises(ArtifactError, match=r"another file \('hidden.data'\)"):
        write_bundle(artifact, tmp_path / "x.zip")


def test_damaged_artifact_is_not_bundled_and_the_old_bundle_stays(artifact: Path, tmp_path: Path) -> None:
    write_bundle(artifact, tmp_path / "x.zip")
    before = (tmp_path / "x.zip").read_bytes()
    (artifact / "classifier.onnx").write_bytes(b"changed")
    with pytest.raises(ArtifactError, match="differs from the manifest"):
        write_bundle(artifact, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "x.zip"]


def test_file_that_changes_while_it_is_bundled_is_noticed(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import compressor.exporters.bundle as module

    checked = module.read_manifest

    def then_change(*arguments, **options):
        manifest = checked(*arguments, **options)
        (artifact / "classifier.onnx").write_bytes(b"changed")
        return manifest

    monkeypatch.setattr(module, "read_manifest", then_change)
    with pytest.raises(ArtifactError, match="changed while it was bundled"):
        write_bundle(artifact, tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


def test_engine_options_that_name_files_stay_at_home(artifact: Path, tmp_path: Path) -> None:
    options = {
        "threads": 1,
        "properties": {"CACHE_DIR": "/home/me/cache", "PERFORMANCE_HINT": "LATENCY"},
        "provider_options": {"TensorrtExecutionProvider": {"trt_engine_cache_path": "x", "trt_fp16_enable": "1"}},
    }
    change(artifact, lambda manifest: manifest["target"].update(options=options))
    manifest = write_bundle(artifact, tmp_path / "x.zip")
    assert manifest.target["options"] == {
        "threads": 1,
        "properties": {"PERFORMANCE_HINT": "LATENCY"},
        "provider_options": {"TensorrtExecutionProvider": {"trt_fp16_enable": "1"}},
    }
    assert "CACHE_DIR, trt_engine_cache_path" in manifest.notes[-1]
    load(tmp_path / "x.zip")


def test_wrong_names_are_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="a bundle is called NAME.zip, got x.tar"):
        write_bundle(artifact, tmp_path / "x.tar")
    with pytest.raises(CompressorError, match="is not an artifact"):
        write_bundle(tmp_path, tmp_path / "x.zip")


def test_licence_note_says_what_the_teacher_s_files_say(tmp_path: Path) -> None:
    for name, file, text in [
        ("carded", "README.md", "---\ntags: [a]\nlicense: cc-by-nc-4.0\n---\nA model."),
        ("filed", "LICENSE", "\n  Apache License\n  Version 2.0"),
        ("silent", "README.md", "# A model"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    teachers = {
        "teacher": [f"diffusers:{tmp_path / name}" for name in ("carded", "filed", "silent")],
        "judge": "demo:x",
    }
    note = licence_note({"teachers": teachers, "data": {"train": "imagefolder:photos"}})
    assert f"Teacher diffusers:{tmp_path / 'carded'}: cc-by-nc-4.0 (its README.md)." in note
    assert f"{tmp_path / 'filed'}: Apache License (its LICENSE)." in note
    assert "demo:x: trained by compressor itself" in note
    assert f"Not stated, look them up: diffusers:{tmp_path / 'silent'}, imagefolder:photos." in note
    assert licence_note({}).count(".") == 1


def test_licence_of_a_timm_teacher_is_its_catalogue_s() -> None:
    assert "timm:resnet18.a1_in1k: apache-2.0" in licence_note({"teachers": {"teacher": "timm:resnet18.a1_in1k"}})


def test_bundle_in_which_zip_uses_its_64_bit_form_is_read(artifact, tmp_path, monkeypatch):
    limit = 50_000
    for name in ("first.bin", "second.bin"):
        (artifact / name).write_bytes(np.random.default_rng(0).bytes(limit - 1000))
        change(artifact, lambda manifest, name=name: manifest["files"].update({name: hash_file(artifact / name)}))
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)  # it is 2 GB: the archive is beyond it, no file is
    made = write_bundle(artifact, tmp_path / "model.zip")
    data = (tmp_path / "model.zip").read_bytes()
    assert b"PK\x06\x06" in data and b"PK\x06\x07" in data
    assert check_bundle(tmp_path / "model.zip") == made
    end = data.rindex(b"PK\x05\x06")
    (tmp_path / "two.zip").write_bytes(data[: end + 16] + b"\x01\0\0\0" + data[end + 20 :])
    with pytest.raises(ArtifactError, match="list of files is not where it says"):
        check_bundle(tmp_path / "two.zip")


def test_bundle_over_the_limit_of_its_reader_is_refused_by_size(artifact, tmp_path):
    write_bundle(artifact, tmp_path / "model.zip")
    with pytest.raises(ArtifactError, match=r"it unpacks to .* GB; the limit is") as caught:
        check_bundle(tmp_path / "model.zip", Limits(total_bytes=100))
    assert "\n" not in str(caught.value)
