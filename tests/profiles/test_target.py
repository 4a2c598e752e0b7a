"""Targets: names, files, overrides, and the truth about what this machine can do."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from compressor.errors import RequestError
from compressor.profiles import target as target_module
from compressor.profiles.target import availability, engine_for, load_target, target_names, with_overrides
from compressor.runtimes.gpu import Gpu, nvidia_gpu

NO_GPU = pytest.mark.skipif(nvidia_gpu() is not None, reason="there is a GPU")


def test_every_built_in_target_loads_and_is_described():
    assert {"trt-fp16", "trt-rtx-fp16", "ort-fp32", "ort-cuda-fp16", "ort-trt-fp16", "openvino-fp16", "torch-fp32"} <= {
        *target_names()
    }
    for name in target_names():
        target = load_target(name)
        assert target.name == name and target.description
        runtime, _, precision = name.rpartition("-")
        assert precision == target.precision, f"{runtime} names another precision than it has"


def test_unknown_name_offers_the_nearest_and_a_path():
    with pytest.raises(RequestError, match=r"no target 'trt-fp61': did you mean trt-fp16.*\./trt-fp61\.toml"):
        load_target("trt-fp61")


def test_own_file_is_named_after_itself(tmp_path):
    (tmp_path / "jetson.toml").write_text('runtime = "tensorrt"\nprecision = "fp16"\ncompute_capability = "8.7"\n')
    target = load_target(str(tmp_path / "jetson.toml"))
    assert (target.name, target.compute_capability, target.batch.max) == ("jetson", "8.7", 16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('runtime = "tensort"', "runtime: no runtime 'tensort': did you mean tensorrt"),
        ('runtime = "openvino"\n[batch]\nmaximum = 3', r"no key 'batch.maximum': did you mean batch.max"),
        ('runtime = "openvino"\nprecison = "fp16"', "no key 'precison': did you mean precision"),
        ('runtime = "openvino"\nprecision = "fp15"', "precision: Input should be 'fp32'"),
        ('runtime = "openvino"\n[batch]\nmin = 8\nopt = 2', "needs min <= opt <= max, got 8, 2, 16"),
        ('runtime = "openvino"\n[batch]\nbenchmark = [64]', r"benchmark sizes \[64\] lie outside"),
        ('runtime = "tensorrt"\ncompute_capability = "sm89"', "must look like"),
        ("precision = 'fp16'", "runtime: Field required"),
        ("runtime = ", "is not valid TOML"),
    ],
)
def test_file_with_a_mistake_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(RequestError, match=said) as caught:
        load_target(tmp_path / "own.toml")
    assert "own.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="cannot read the target"):
        load_target(tmp_path / "none.toml")


def test_overrides_change_a_copy():
    before = load_target("ort-fp32")
    after = with_overrides(before, {"batch.max": 64, "options.threads": 2, "precision": "fp16"})
    assert (after.batch.max, after.options.threads, after.precision) == (64, 2, "fp16")
    assert (before.batch.max, before.options.threads, before.precision) == (16, 0, "fp32")


@pytest.mark.parametrize("key", ["batch.maxx", "presicion", "batch.max.more", "name.x"])
def test_override_of_an_unknown_key_is_refused(key):
    with pytest.raises(RequestError, match=f"no key '{key}'"):
        with_overrides(load_target("ort-fp32"), {key: 1})


def test_targets_of_an_installed_package_are_found(install_package, tmp_path):
    (tmp_path / "board.toml").write_text('runtime = "openvino"\ndevice = "npu"\n')
    install_package(
        "third_party_targets",
        {
            "targets": f"""
                from compressor.profiles.target import Target

                def camera():
                    return Target(runtime="onnxruntime", precision="fp16")

                def wrong():
                    return 3

                board = {str(tmp_path / "board.toml")!r}
            """
        },
        """
        [compressor.targets]
        camera-fp16 = third_party_targets.targets:camera
        board = third_party_targets.targets:board
        wrong = third_party_targets.targets:wrong
        """,
    )
    assert {"camera-fp16", "board"} <= set(target_names())
    assert load_target("camera-fp16").name == "camera-fp16" and load_target("camera-fp16").precision == "fp16"
    assert load_target("board").device == "npu"
    with pytest.raises(RequestError, match="gives a int, not a Target"):
        load_target("wrong")


def test_installed_cpu_engines_build_and_run():
    for name in ("ort-fp32", "ort-fp16", "openvino-fp32", "openvino-fp16", "torch-fp32"):
        found = availability(load_target(name))
        assert found.can_build and found.can_run and not found.reason, name
    assert not load_target("torch-fp32").has_artifact


@NO_GPU
def test_gpu_targets_build_here_and_say_why_they_do_not_run():
    found = availability(load_target("ort-cuda-fp16"))
    assert found.can_build and not found.can_run and "no NVIDIA GPU" in found.reason
    rtx = availability(load_target("trt-rtx-fp16"))
    assert rtx.can_build and not rtx.can_run and rtx.engine == "tensorrt-rtx" and "ahead of time" in rtx.reason


@NO_GPU
def test_tensorrt_target_without_a_gpu_is_built_by_tensorrt_rtx_and_says_so():
    found = availability(load_target("trt-fp16"))
    assert found.engine == engine_for(load_target("trt-fp16")) == "tensorrt-rtx"
    assert found.can_build and "built ahead of time by TensorRT-RTX for compute capability 8.9" in found.reason


def with_machine(monkeypatch: pytest.MonkeyPatch, installed: set[str], gpu: Gpu | None) -> None:
    """Pretend that exactly these modules are installed (besides those for export) and this GPU is here."""
    known = installed | {"torch", "onnx", "onnxscript"}
    monkeypatch.setattr(
        target_module.importlib.util, "find_spec", lambda name: importlib.machinery if name in known else None
    )
    monkeypatch.setattr(target_module, "nvidia_gpu", lambda: gpu)


ADA, HOPPER = Gpu("RTX 4090", "8.9", "13.0"), Gpu("H100", "9.0", "13.0")


@pytest.mark.parametrize(
    ("target", "installed", "gpu", "engine", "can_build", "can_run"),
    [
        ("trt-fp16", {"tensorrt", "tensorrt_rtx_bindings"}, HOPPER, "tensorrt", True, True),
        ("trt-fp16", {"tensorrt", "tensorrt_rtx_bindings"}, None, "tensorrt-rtx", True, False),
        ("trt-fp16", {"tensorrt"}, None, "tensorrt", False, False),
        ("trt-fp16", set(), HOPPER, "tensorrt", False, False),
        ("trt-rtx-fp16", {"tensorrt_rtx"}, ADA, "tensorrt-rtx", True, True),
        ("trt-rtx-fp16", {"tensorrt_rtx"}, HOPPER, "tensorrt-rtx", True, False),
        ("trt-rtx-fp16", {"tensorrt"}, ADA, "tensorrt-rtx", False, False),
        ("ort-fp32", set(), None, "onnxruntime", True, False),
        ("openvino-fp16", set(), None, "openvino", False, False),
    ],
)
def test_engine_follows_what_is_installed_and_which_gpu_is_here(
    monkeypatch, target, installed, gpu, engine, can_build, can_run
):
    with_machine(monkeypatch, installed, gpu)
    found = availability(load_target(target))
    assert (found.engine, found.can_build, found.can_run) == (engine, can_build, can_run)
    assert can_run or found.reason
    assert found.can_build or found.install_hint


def test_targets_are_read_without_torch_or_an_engine():
    code = (
        "import sys; from compressor.profiles.target import *; "
        "[availability(load_target(name)) for name in ('trt-fp16', 'ort-fp32', 'openvino-fp16')]; "
        "heavy = {'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt_rtx_bindings'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_precision_of_a_runtime_is_said_when_another_is_asked_for():
    found = availability(with_overrides(load_target("ort-fp32"), {"precision": "bf16"}))
    assert not found.can_build and "onnxruntime gets no bf16: use fp32 or fp16 or int8" in found.reason


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('runtime = "onnxruntime"\nprecision = "int8"\nrest = "fp16"', 'rest = "fp16" is for int8 and fp8 graphs of'),
        ('runtime = "tensorrt"\n[axes]\nbatch = [1, 2, 3]', "axis batch has its own section"),
        ('runtime = "tensorrt"\n[axes]\nwidth = [8, 4, 16]', "axis width needs 1 <= min <= opt <= max, got 8, 4, 16"),
        (
            'runtime = "tensorrt"\n[calibration]\nmetod = "entropy"',
            "no key 'calibration.metod': did you mean calibration.method",
        ),
    ],
)
def test_keys_of_eight_bits_and_axes_are_checked(tmp_path, text, said):
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(RequestError, match=said):
        load_target(tmp_path / "own.toml")


@NO_GPU
def test_compiled_halves_and_torch_tensorrt_say_that_a_gpu_is_missing():
    for name in ("torch-compile-fp16", "torch-trt-fp16"):
        found = availability(load_target(name))
        assert not found.can_run and found.reason == "no NVIDIA GPU is visible" and not load_target(name).has_artifact
    assert availability(load_target("torch-compile-fp32")).can_run
