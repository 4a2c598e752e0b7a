"""Loading an artifact: it trusts nothing, needs no torch, and gives a driver that is ready to call."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.errors import ArtifactError, RequestError, TargetError
from compressor.exporters.export import export
from compressor.profiles.target import load_target
from compressor.runtimes import load
from compressor.runtimes.load import driver_class, driver_names
from compressor.runtimes.manifest import hash_file, read_manifest

SETTINGS = {"mean": [0.5], "std": [0.25], "shape": [1, 2, 2], "classes": 3}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layer(image.flatten(1))
        return logits


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def made(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = Graph(net, {"image": torch.rand(2, 1, 2, 2)}, ("logits",), {"image": {0: "batch"}})
    deployable = Deployable(
        {"classifier": graph}, DriverSpec("predict", SETTINGS), {"table": np.arange(3), "names": "a"}
    )
    folder = tmp_path_factory.mktemp("artifacts") / "artifact"
    export(deployable, load_target("ort-fp32"), folder)
    return folder


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "artifact"))


def change(artifact: Path, edit) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    edit(manifest)
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def test_loaded_driver_answers_as_the_model_does(net, artifact):
    image = np.random.default_rng(0).random((5, 1, 2, 2)).astype(np.float32)
    outputs = load(artifact, {"threads": 1})({"image": image})
    with torch.no_grad():
        expected = net(torch.from_numpy((image - 0.5) / 0.25))
    assert np.allclose(outputs["logits"], expected.numpy(), atol=1e-5)
    assert np.allclose(outputs["probabilities"], expected.softmax(1).numpy(), atol=1e-6)


def test_loading_imports_no_torch(artifact):
    code = f"""
        import sys
        import numpy as np
        import compressor.runtimes
        model = compressor.runtimes.load({str(artifact)!r})
        assert model({{"image": np.zeros((1, 1, 2, 2))}})["logits"].shape == (1, 3)
        heavy = {{"torch", "onnx", "onnxscript", "openvino", "transformers", "diffusers"}} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_changed_file_is_refused(artifact):
    data = bytearray((artifact / "classifier.onnx").read_bytes())
    data[-1] ^= 1
    (artifact / "classifier.onnx").write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"classifier\.onnx differs from the manifest"):
        load(artifact)
    read_manifest(artifact, verify=False)


def test_missing_file_is_named(artifact):
    (artifact / "assets.npz").unlink()
    with pytest.raises(ArtifactError, match=r"lacks assets\.npz"):
        load(artifact)


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/hostname", "a/../../outside.onnx", "", "C:\\net.onnx"])
def test_path_outside_the_folder_is_refused(artifact, name):
    (artifact.parent / "outside.onnx").write_bytes(b"")
    change(artifact, lambda manifest: manifest["graphs"]["classifier"].update(file=name))
    with pytest.raises(ArtifactError, match="outside itself"):
        load(artifact)


def test_link_out_of_the_folder_is_refused(artifact):
    target = artifact.parent / "elsewhere.onnx"
    shutil.move(artifact / "classifier.onnx", target)
    (artifact / "classifier.onnx").symlink_to(target)
    with pytest.raises(ArtifactError, match="outside itself"):
        load(artifact)


def test_pickled_assets_are_refused(artifact):
    np.savez(artifact / "assets.npz", table=np.array([{"a": 1}], dtype=object))
    change(artifact, lambda manifest: manifest["assets"].update(sha256=hash_file(artifact / "assets.npz")))
    with pytest.raises(ArtifactError, match=r"assets\.npz is damaged"):
        load(artifact)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m.update(schema_version=99), "has schema 99; this version reads 1"),
        (lambda m: m.update(surprise=1), "is damaged: surprise"),
        (lambda m: m["graphs"]["classifier"].pop("sha256"), r"is damaged: graphs\.classifier\.sha256"),
        (lambda m: m["graphs"].update(other=m["graphs"].pop("classifier")), "misses 'classifier' in the artifact"),
    ],
)
def test_manifest_that_does_not_fit_is_refused_in_one_line(artifact, edit, said):
    change(artifact, edit)
    with pytest.raises(ArtifactError, match=said) as caught:
        load(artifact)
    assert "\n" not in str(caught.value)


def test_folder_that_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="is not an artifact"):
        load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        load(tmp_path)


def test_engine_that_does_not_run_here_says_why(artifact):
    change(artifact, lambda manifest: manifest["engine"].update(name="tensorrt"))
    with pytest.raises(TargetError, match="TensorRT is not installed|no NVIDIA GPU|does not load"):
        load(artifact)


def test_unknown_driver_names_the_nearest(artifact):
    change(artifact, lambda manifest: manifest["driver"].update(name="predic"))
    with pytest.raises(RequestError, match="no driver 'predic': did you mean predict"):
        load(artifact)


def test_driver_of_an_installed_package_is_found(install_package):
    install_package(
        "third_party_drivers",
        {"echo": "class Echo:\n    inputs = outputs = ()\n"},
        "[compressor.drivers]\necho = third_party_drivers.echo:Echo\nbroken = third_party_drivers.echo:Nothing\n",
    )
    assert driver_class("echo").__name__ == "Echo" and "echo" in driver_names()
    with pytest.raises(TargetError, match="'broken'"):
        driver_class("broken")
