"""Artifacts of tiny ONNX graphs, written without torch: what the tests of bundles take apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compressor.atomic import write_json
from compressor.runtimes.manifest import (
    ASSETS_FILE,
    MANIFEST_FILE,
    Assets,
    DriverEntry,
    Engine,
    GraphEntry,
    Manifest,
    hash_file,
)
from compressor.runtimes.runtime import TensorSpec

TARGET = {
    "name": "ort-fp32", "runtime": "onnxruntime", "precision": "fp32", "device": "cpu", "options": {"threads": 1},
    "batch": {"min": 1, "opt": 1, "max": 16},
}  # fmt: skip
LABELS = ["dark", "left", "bright"]


def classifier(folder: Path, **metadata: Any) -> Path:
    """Three classes of gray 4x4 pictures: dark, bright on the left alone, bright all over."""
    weights = np.zeros((16, 3), np.float32)
    weights[:, 2] = 1.0
    left = np.tile([1.0, 1.0, -1.0, -1.0], 4).astype(np.float32)
    weights[:, 1] = 1.4 * left
    bias = np.array([1.0, 0.0, -6.0], np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
    ]
    settings = {"mean": [0.0], "std": [1.0], "shape": [1, 4, 4], "classes": 3, "labels": LABELS}
    ports = {"image": ("batch", 1, 4, 4)}, {"logits": ("batch", 3)}
    return _write(folder, "classifier", nodes, ports, {"weights": weights, "bias": bias}, "predict", settings, metadata)


def generator(folder: Path, clip: float | None = 1.0, **metadata: Any) -> Path:
    """One step; whatever the noise, label k gives its row of the table: black, gray, white, half and half."""
    nodes = [
        helper.make_node("Mul", ["sample", "zero"], ["nothing"]),
        helper.make_node("Sub", ["nothing", "row"], ["wanted"]),
        helper.make_node("Add", ["sample", "wanted"], ["prediction"]),
    ]
    ports = (
        {"sample": ("batch", 1, 2, 2), "timestep": ("batch",), "row": ("batch", 1, 2, 2)},
        {"prediction": ("batch", 1, 2, 2)},
    )
    table = np.array([[-1, -1, -1, -1], [0, 0, 0, 0], [1, 1, 1, 1], [-1, 1, -1, 1]], np.float32).reshape(4, 1, 2, 2)
    assets = {
        "timesteps": np.array([1000.0], np.float32),
        "levels": np.array([1.0, 0.0]),
        "condition.row": table,
    }
    settings = {"rule": "euler", "prediction_type": "flow", "shape": [1, 2, 2], "guidance_scale": 1.0, "clip": clip}
    weights = {"zero": np.zeros((), np.float32)}
    return _write(folder, "denoiser", nodes, ports, weights, "sampler", settings, metadata, assets)


def segmenter(folder: Path, **metadata: Any) -> Path:
    """A class for every pixel of gray pictures of any size: bright is class 1."""
    nodes = [
        helper.make_node("Sub", ["half", "image"], ["dark"]),
        helper.make_node("Sub", ["image", "half"], ["bright"]),
        helper.make_node("Concat", ["dark", "bright"], ["logits"], axis=1),
    ]
    settings = {"mean": [0.0], "std": [1.0], "channels": 1, "classes": 2, "tile": [8, 8], "labels": ["dark", "bright"]}
    ports = {"image": ("batch", 1, 8, 8)}, {"logits": ("batch", 2, 8, 8)}
    return _write(folder, "segmenter", nodes, ports, {"half": np.float32(0.5)}, "dense", settings, metadata)


def _write(
    folder: Path,
    name: str,
    nodes: list[Any],
    ports: tuple[dict[str, Any], dict[str, Any]],
    weights: dict[str, np.ndarray],
    driver: str,
    settings: dict[str, Any],
    metadata: dict[str, Any],
    assets: dict[str, np.ndarray] | None = None,
    engine: str = "onnxruntime",
) -> Path:
    folder.mkdir(parents=True)
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in side.items()] for side in ports]
    graph = helper.make_graph(nodes, name, *values, [numpy_helper.from_array(v, n) for n, v in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / f"{name}.onnx"
    onnx.save(model, str(path))
    data: dict[str, Any] = {}
    if engine == "openvino":
        import openvino

        converted = openvino.convert_model(str(path))
        path.unlink()
        path = path.with_suffix(".xml")
        openvino.save_model(converted, str(path), compress_to_fp16=False)
        data = {"data_file": f"{name}.bin", "data_sha256": hash_file(path.with_suffix(".bin"))}
    if assets:
        np.savez(folder / ASSETS_FILE, **assets)
    inputs, outputs = (tuple(TensorSpec(n, s, "float32") for n, s in side.items()) for side in ports)
    entry = GraphEntry(
        file=path.name, sha256=hash_file(path), bytes=path.stat().st_size,
        precision="fp32", inputs=inputs, outputs=outputs, opset=20, **data,
    )  # fmt: skip
    manifest = Manifest(
        target={**TARGET, "name": "openvino-fp32", "runtime": engine} if engine == "openvino" else TARGET,
        engine=Engine(name=engine, version="any"),
        driver=DriverEntry(name=driver, settings=settings),
        graphs={name: entry},
        assets=Assets(file=ASSETS_FILE, sha256=hash_file(folder / ASSETS_FILE)) if assets else Assets(),
        metadata=metadata,
    )
    write_json(folder / MANIFEST_FILE, manifest.model_dump(mode="json"))
    return folder


def digits_classifier(folder: Path, engine: str = "onnxruntime") -> Path:
    """Logistic regression on scikit-learn's handwritten digits: ten classes of gray 8x8 pictures, about 0.97 right."""
    from sklearn.linear_model import LogisticRegression

    pixels, labels = digits()
    fitted = LogisticRegression(max_iter=300, C=0.5).fit(pixels.reshape(len(pixels), -1)[::2], labels[::2])
    # the driver hands over normalised pixels
    weights = (fitted.coef_ * 0.5).astype(np.float32).T
    bias = (fitted.intercept_ + 0.5 * fitted.coef_.sum(axis=1)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
    ]
    settings = {"mean": [0.5], "std": [0.5], "shape": [1, 8, 8], "classes": 10, "labels": list("0123456789")}
    ports = {"image": ("batch", 1, 8, 8)}, {"logits": ("batch", 10)}
    made = {"weights": weights, "bias": bias}
    return _write(folder, "classifier", nodes, ports, made, "predict", settings, {}, engine=engine)


def digits_generator(folder: Path) -> Path:
    """One step: the mean picture of a label and a little of the noise."""
    pixels, labels = digits()
    means = np.stack([pixels[labels == digit].mean(axis=0) for digit in range(10)])[:, None] * 2 - 1
    nodes = [
        helper.make_node("Mul", ["sample", "share"], ["kept"]),
        helper.make_node("Sub", ["kept", "row"], ["prediction"]),
    ]
    shape = ("batch", 1, 8, 8)
    ports = {"sample": shape, "timestep": ("batch",), "row": shape}, {"prediction": shape}
    assets = {
        "timesteps": np.array([1000.0], np.float32),
        "levels": np.array([1.0, 0.0]),
        "condition.row": means.astype(np.float32),
    }
    settings = {"rule": "renoise", "prediction_type": "flow", "shape": [1, 8, 8], "guidance_scale": 1.0, "clip": 1.0}
    return _write(folder, "denoiser", nodes, ports, {"share": np.float32(0.95)}, "sampler", settings, {}, assets)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 8, 8) float64 in [0, 1], and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images / 16, data.target
