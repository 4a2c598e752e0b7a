"""OpenVINO's sparse weights: what can be kept sparse, when it is used, and what a crash of the engine costs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compressor.exporters.openvino
from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.errors import TargetError
from compressor.exporters.export import export
from compressor.exporters.sparse_decompression import SPARSE_RATE, Trial, cpu_can, rates_to_try, try_sparse, zero_shares
from compressor.models.edits.sparsity import sparsity_mask
from compressor.profiles.latency import Ratio
from compressor.profiles.target import load_target, with_overrides
from compressor.runtimes.load import load_graphs

CRASHING_ENGINE = f"""
import os, signal
import openvino

compile_model = openvino.Core.compile_model

def crash_with_sparse_weights(core, model, device, properties):
    if {SPARSE_RATE!r} in properties:
        os.kill(os.getpid(), signal.SIGSEGV)
    return compile_model(core, model, device, properties)

openvino.Core.compile_model = crash_with_sparse_weights
"""


class Layers(nn.Module):
    """Two sparse layers whose sizes are multiples of 64, and one that is too small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 16)
        with torch.no_grad():
            for layer, pattern in ((self.first, "2:4"), (self.second, "0.9"), (self.third, "0.9")):
                layer.weight *= sparsity_mask(layer.weight, pattern)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.third(self.second(self.first(image).relu()).relu())
        return logits


def packed() -> Deployable:
    torch.manual_seed(1)
    graph = Graph(Layers(), {"image": torch.randn(40, 64)}, ("logits",), {"image": {0: "batch"}})
    return Deployable({"classifier": graph}, DriverSpec("predict", {"classes": 16}))


def exported(tmp_path: Path, sparse_weights: str):
    target = with_overrides(load_target("openvino-int8"), {"options.sparse_weights": sparse_weights})
    return export(packed(), target, tmp_path / "artifact", cache=tmp_path / "graphs")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A quantised model, exported once: its .xml file."""
    folder = tmp_path_factory.mktemp("built")
    exported(folder, "off")
    return folder / "artifact" / "classifier.xml"


@pytest.fixture
def matrix_instructions(monkeypatch):
    """What is tried on CPUs with AMX is tried here, too: without AMX the engine then reads the weights as ever."""
    monkeypatch.setattr(compressor.exporters.openvino, "cpu_can", lambda: True)


@pytest.fixture
def crashing_engine(tmp_path, monkeypatch):
    """New processes get an engine that ends in a segmentation fault where it is told to keep weights sparse."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CRASHING_ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


def test_zeros_are_counted_where_the_engine_could_keep_weights_sparse(built):
    import openvino

    shares = sorted(zero_shares(openvino.Core().read_model(str(built))))
    assert len(shares) == 2
    assert 0.5 <= shares[0] < 0.6 and 0.9 <= shares[1] < 1.0, "rounding makes a few more zeros"


@pytest.mark.parametrize(
    ("shares", "rates"), [([], []), ([0.1, 0.3], []), ([0.5], [0.4]), ([0.9, 0.95], [0.8]), ([0.5, 0.9], [0.4, 0.8])]
)
def test_every_choice_of_layers_is_tried_once(shares, rates):
    assert rates_to_try(shares) == rates


@pytest.mark.parametrize(
    ("trial", "used", "said"),
    [
        (Trial(0.4, Ratio(1.31, 1.2, 1.4)), True, "1.31 times as fast (1.20 to 1.40), used"),
        (Trial(0.4, Ratio(1.31, 0.9, 1.6)), False, "1.31 times as fast (0.90 to 1.60), not used"),
        (Trial(0.4, Ratio(1.01, 1.001, 1.02)), False, "1.01 times as fast (1.00 to 1.02), not used"),
        (Trial(0.4, Ratio(0.97, 0.96, 0.98)), False, "0.97 times as fast (0.96 to 0.98), not used"),
        (Trial(0.4, Ratio(2.0, 1.9, 2.1), error=0.2), False, "the outputs differ by 2.0e-01 of their size, not used"),
        (Trial(0.4, Ratio(2.0, 1.9, 2.1), error=math.nan), False, "not used"),
        (Trial(0.4, fault="the engine crashed (SIGSEGV)"), False, "the engine crashed (SIGSEGV), not used"),
    ],
)
def test_sparse_weights_are_used_where_they_are_right_and_faster_beyond_the_noise(trial, used, said):
    assert trial.used == used
    assert trial.said(trial.used).endswith(said)


def test_trial_compares_and_times_the_engine_with_itself(built):
    records = [{"image": np.random.default_rng(0).random((batch, 64), np.float32)} for batch in (1, 5)]
    trial = try_sparse(built, {"inference_precision": "f32"}, records, 0.4)
    if trial.fault:
        assert cpu_can() and trial.fault.startswith("the engine crashed")
        return
    assert trial.error < 0.01
    assert trial.gain is not None and 0 < trial.gain.low <= trial.gain.value <= trial.gain.high


def test_trial_that_fails_or_takes_too_long_says_so(built):
    record = {"image": np.zeros((1, 64), np.float32)}
    assert try_sparse(built, {}, [record], 0.4, timeout=0.01).fault == "it took longer than 0.01 s"
    assert "cannot load" in try_sparse(built, {"properties": {"NO_SUCH": "1"}}, [record], 0.4).fault


def test_artifact_has_the_property_where_the_trial_won_and_its_note_says_so(tmp_path, matrix_instructions):
    manifest = exported(tmp_path, "auto")
    (note,) = [note for note in manifest.notes if "sparse decompression tried" in note]
    tried = note.partition("tried: ")[2].rstrip(".").split("; ")
    assert [one.partition(" zeros")[0] for one in tried] == ["from 40%", "from 80%"]
    used = [one for one in tried if one.endswith(", used")]
    assert len(used) <= 1
    assert len(used) == len(manifest.target["options"]["properties"])
    load_graphs(tmp_path / "artifact", manifest)["classifier"].close()


def test_crash_of_the_engine_costs_nothing_but_the_trial(tmp_path, matrix_instructions, crashing_engine):
    manifest = exported(tmp_path, "auto")
    assert manifest.target["options"]["properties"] == {}
    assert any("from 40% zeros the engine crashed (SIGSEGV), not used" in note for note in manifest.notes)
    assert manifest.graphs["classifier"].parity[0].judged_by.startswith("openvino on cpu")


def test_crash_with_what_was_asked_for_is_one_line(tmp_path, crashing_engine):
    with pytest.raises(TargetError, match=r'"on": the engine crashed \(SIGSEGV\); set it to "auto" or "off"') as caught:
        exported(tmp_path, "on")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "artifact").exists()


def test_property_that_is_asked_for_reaches_the_artifact_unless_the_engine_crashes_here(tmp_path):
    try:
        manifest = exported(tmp_path, "on")
    except TargetError as error:
        assert cpu_can() and "the engine crashed" in str(error)
    else:
        assert manifest.target["options"]["properties"] == {SPARSE_RATE: "0.4"}
        load_graphs(tmp_path / "artifact", manifest)["classifier"].close()


def test_nothing_is_tried_where_nothing_could_be_gained(tmp_path, monkeypatch):
    monkeypatch.setattr(compressor.exporters.openvino, "cpu_can", lambda: False)
    monkeypatch.setattr(compressor.exporters.openvino, "try_sparse", None)
    assert any("lacks the matrix instructions (AMX)" in note for note in exported(tmp_path, "auto").notes)
    manifest = export(packed(), load_target("openvino-fp32"), tmp_path / "plain", cache=tmp_path / "graphs")
    assert any("in eight bits alone" in note for note in manifest.notes)


def test_cpu_is_known_by_its_flags(tmp_path):
    (tmp_path / "old").write_text("flags : sse4_2 avx2 avx512f avx512_vnni\n")
    (tmp_path / "new").write_text("flags : avx512f amx_bf16 amx_tile amx_int8\n")
    found = [cpu_can(tmp_path / name) for name in ("old", "new", "none")]
    assert found == [False, True, True], "where nothing tells, it is tried"
