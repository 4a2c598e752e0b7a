"""8-bit graphs: what is quantised, what goes back to float, what the manifest says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.data.digits import digits
from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.errors import RequestError
from compressor.exporters.accuracy_restoration import Fit, restore_accuracy
from compressor.exporters.calibration import CalibrationData, check_records
from compressor.exporters.export import export
from compressor.exporters.onnx_graph import export_onnx
from compressor.exporters.quantization import QdqQuantizer, QdqScheme
from compressor.profiles.target import Calibration, load_target, with_overrides
from compressor.runtimes.load import load_graphs
from compressor.runtimes.manifest import read_manifest

CPU_TARGETS = ("ort-int8", "openvino-int8")


class DigitNet(nn.Module):
    """Convolutions with a residual, then two linear layers; ``spread`` makes one channel between those huge."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.hidden, self.last = nn.Linear(256, 32), nn.Linear(32, 10)
        self.register_buffer("spread", torch.ones(32))

    def forward(self, image: Tensor) -> Tensor:
        h = F.relu(self.first(image))
        h = F.max_pool2d(F.relu(self.second(h) + h), 2)
        result: Tensor = self.last(F.relu(self.hidden(h.flatten(1))) * self.spread)
        return result


@pytest.fixture(scope="module")
def trained() -> DigitNet:
    """A network of the digits with more than nine of ten right."""
    torch.manual_seed(0)
    data, net = digits("train").fields, DigitNet()
    images, labels = torch.from_numpy(data["image"]), torch.from_numpy(data["label"])
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(150):
        chosen = torch.arange(64 * step, 64 * step + 64) % len(labels)
        optimizer.zero_grad()
        F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return net.eval()


def with_outlier(net: DigitNet) -> DigitNet:
    """The same function, but one of the values that the last layer reads is 3000 times the others'."""
    changed = DigitNet()
    changed.load_state_dict(net.state_dict())
    changed.spread[5] = 3000.0
    with torch.no_grad():
        changed.last.weight[:, 5] /= 3000.0
    return changed.eval()


def packed(net: nn.Module) -> Deployable:
    example = torch.from_numpy(digits("train").fields["image"][:2])
    graph = Graph(net, {"image": example}, ("logits",), {"image": {0: "batch"}})
    return Deployable({"classifier": graph}, DriverSpec("predict", {"shape": [1, 8, 8], "classes": 10}))


def accuracy(run: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]], split: str) -> float:
    data = digits(split).fields
    found = [run({"image": data["image"][k : k + 16]})["logits"].argmax(1) for k in range(0, len(data["label"]), 16)]
    return float((np.concatenate(found) == data["label"]).mean())


def torch_accuracy(net: nn.Module, split: str) -> float:
    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {"logits": net(torch.from_numpy(inputs["image"])).numpy()}

    return accuracy(run, split)


def calibration(net: nn.Module, judged: bool = True) -> CalibrationData:
    images = digits("train").fields["image"]
    records = {"classifier": [{"image": images[k : k + 16]} for k in range(0, 128, 16)]}
    own = torch_accuracy(net, "val")
    return CalibrationData(records, (lambda graphs: own - accuracy(graphs["classifier"], "val")) if judged else None)


CACHE: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def cache(graphs: Path) -> None:
    CACHE[:] = [graphs]


def exported(net: nn.Module, target: str, folder, judged: bool = True, **changes):
    chosen = with_overrides(load_target(target), changes)
    parity = {"classifier": [{"image": digits("val").fields["image"][:16]}]}
    export(packed(net), chosen, folder / target, records=parity, calibration=calibration(net, judged), cache=CACHE[0])
    manifest = read_manifest(folder / target)
    return manifest, manifest.graphs["classifier"].quantization


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_int8_holds_its_drop_and_is_smaller(trained, tmp_path, target):
    manifest, entry = exported(trained, target, tmp_path)
    assert entry.drop <= 0.01 and entry.samples == 128 and entry.kernels
    assert (
        sum(entry.operators[kind] for kind in entry.operators if kind in ("Conv", "Gemm", "Convolution", "MatMul")) == 4
    )
    run = load_graphs(tmp_path / target, manifest, {"threads": 1})["classifier"]
    own = torch_accuracy(trained, "test")
    assert own > 0.9 and accuracy(run, "test") > own - 0.02
    run.close()
    float32 = sum(p.numel() * 4 for p in trained.parameters())
    weights = tmp_path / target / ("classifier.onnx" if target == "ort-int8" else "classifier.bin")
    assert weights.stat().st_size < 0.6 * float32


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_outlier_that_ruins_blind_int8_sends_its_layer_back_to_float(trained, tmp_path, target):
    net = with_outlier(trained)
    manifest, entry = exported(net, target, tmp_path)
    if target == "ort-int8":  # NNCF moves outliers into the weights by itself
        assert entry.blind_drop > 0.2
        assert ("Gemm", ("last",)) in {(o.operator, o.layers) for o in entry.float_operators if o.reason == "accuracy"}
        assert any("went back to float" in note for note in manifest.notes)
    assert entry.drop <= 0.01
    run = load_graphs(tmp_path / target, manifest, {"threads": 1})["classifier"]
    assert accuracy(run, "test") > torch_accuracy(net, "test") - 0.02
    run.close()


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_excluded_layers_stay_in_float_whatever_they_cost(trained, tmp_path, target):
    manifest, entry = exported(trained, target, tmp_path, **{"calibration.exclude": ["hid*", "first"]})
    excluded = {layer for one in entry.float_operators if one.reason == "excluded" for layer in one.layers}
    assert excluded == {"hidden", "first"}
    products = ("Conv", "Gemm", "Convolution", "MatMul")
    assert sum(entry.operators.get(kind, 0) for kind in products) == 2
    assert any("2 products of graph 'classifier' stay in float" in note for note in manifest.notes)


def test_exclusion_of_a_layer_that_the_model_lacks_is_refused(trained, tmp_path):
    with pytest.raises(RequestError, match=r"calibration.exclude: the model has no layer 'hiden': did you mean hidden"):
        exported(trained, "ort-int8", tmp_path, **{"calibration.exclude": ["hiden"]})
    assert not (tmp_path / "ort-int8").exists()


def test_without_a_figure_the_error_of_the_outputs_decides(trained, tmp_path):
    _, entry = exported(with_outlier(trained), "ort-int8", tmp_path, judged=False)
    assert entry.drop is None and entry.blind_error > 0.1 >= entry.error and entry.limit == 0.1
    _, strict = exported(trained, "ort-int8", tmp_path, judged=False, **{"calibration.max_error": 1e-6})
    assert strict.operators == {} and strict.error < 1e-5


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
@pytest.mark.parametrize("target", CPU_TARGETS)
def test_every_method_gives_ranges_that_hold(trained, tmp_path, target, method):
    _, entry = exported(trained, target, tmp_path, **{"calibration.method": method})
    assert entry.method == method and entry.drop <= 0.01


# --- what is quantised -----------------------------------------------------------------------------------------------


def graph_of(net: nn.Module, folder) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    graph = packed(net).graphs["classifier"]
    images = digits("train").fields["image"]
    return export_onnx(graph, folder / "graph.onnx").load(), [{"image": images[:16]}]


def test_int8_graph_holds_nothing_that_is_not_read(trained, tmp_path):
    exported(trained, "ort-int8", tmp_path)
    graph = onnx.load(tmp_path / "ort-int8" / "classifier.onnx").graph
    read = {name for node in graph.node for name in node.input}
    assert [tensor.name for tensor in graph.initializer if tensor.name not in read] == []  # engines warn of such


def test_residual_between_convolutions_stays_in_eight_bits(trained, tmp_path):
    _, entry = exported(trained, "ort-int8", tmp_path)
    assert (entry.operators["Add"], entry.operators["MaxPool"]) == (1, 1)
    assert (entry.kernels["QLinearConv"], entry.kernels["QLinearAdd"]) == (2, 1), entry.kernels
    assert sum(entry.kernels.get(name, 0) for name in ("QGemm", "MatMulIntegerToFloat")) == 2, entry


def test_norms_softmax_and_products_of_activations_stay_float(models, graphs, tmp_path):
    export(models("vit"), load_target("ort-int8"), tmp_path / "artifact", cache=graphs)
    manifest = read_manifest(tmp_path / "artifact")
    entry = manifest.graphs["classifier"].quantization
    reasons = {operators.operator: operators.reason for operators in entry.float_operators}
    assert {"LayerNormalization", "Softmax", "Gelu"} <= set(reasons) and reasons["MatMul"] in (
        "activations",
        "accuracy",
    )
    assert set(entry.kernels) <= {"QLinearConv", "QGemm", "MatMulIntegerToFloat"}
    made = onnx.load(str(tmp_path / "artifact/classifier.onnx")).graph
    readers = {
        node.op_type for node in made.node if any(name.endswith("DequantizeLinear_Output") for name in node.input)
    }
    assert "LayerNormalization" not in readers and "Add" not in readers, "a residual is rounded"
    assert any("calibrated on 2 samples only" in note for note in manifest.notes)


def test_weights_have_a_scale_for_each_output_channel_unless_told_otherwise(trained, tmp_path):
    model, records = graph_of(trained, tmp_path)
    for per_channel in (True, False):
        quantizer = QdqQuantizer(
            model, records, Calibration(per_channel=per_channel), QdqScheme.of("onnxruntime", "cpu")
        )
        made = quantizer.quantize(quantizer.choose({}))
        scales = {t.name: list(t.dims) for t in made.graph.initializer if t.name == "first.weight_scale"}
        assert scales == {"first.weight_scale": [16] if per_channel else []}


def test_seven_bits_keep_weights_within_64(trained, tmp_path):
    model, records = graph_of(trained, tmp_path)
    largest = {}
    for bits in (7, 8):
        quantizer = QdqQuantizer(model, records, Calibration(weight_bits=bits), QdqScheme.of("onnxruntime", "cpu"))
        made = quantizer.quantize(quantizer.choose({}))
        weights = [onnx.numpy_helper.to_array(t) for t in made.graph.initializer if t.name == "first.weight_quantized"]
        largest[bits] = int(np.abs(weights[0].astype(int)).max())
    assert largest == {7: 64, 8: 127}


# --- calibration data ------------------------------------------------------------------------------------------------

GOOD = np.random.default_rng(0).random((40, 1, 4, 4), dtype=np.float32)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.where(GOOD > 0.99, np.nan, GOOD), "'image' holds NaN or infinity"),
        (
            np.repeat(GOOD.reshape(40, 16)[:, :1], 16, 1).reshape(GOOD.shape),
            "every sample of input 'image' has one value",
        ),
        (np.repeat(GOOD[:1], 40, 0), "all values of input 'image' are the same in all samples"),
    ],
)
def test_useless_calibration_data_are_refused_in_one_line(image, said):
    with pytest.raises(RequestError, match=said) as caught:
        check_records("classifier", [{"image": image.astype(np.float32)}])
    assert "\n" not in str(caught.value)


def test_few_samples_are_warned_of_and_none_are_refused():
    assert check_records("classifier", [{"image": GOOD}]) == (40, ())
    samples, notes = check_records("classifier", [{"image": GOOD[:5]}])
    assert samples == 5 and "5 samples only" in notes[0]
    with pytest.raises(RequestError, match="no calibration data"):
        check_records("classifier", [])


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [(), (3,), (3, 7), (9, 1, 4, 2), tuple(range(10))])
def test_search_gives_back_what_costs_and_no_more(bad):
    operators, wrong = [str(k) for k in range(10)], set(map(str, bad))
    found = restore_accuracy(
        operators,
        lambda back: Fit(None, 0.0, not wrong - set(back)),
        lambda group: sum(10.0 if name in wrong else 0.1 for name in group),
        seconds=10,
    )
    assert set(found.back) == wrong and found.final.holds


def test_search_ends_when_its_time_is_over():
    found = restore_accuracy(
        ["a", "b", "c"], lambda back: Fit(None, 0.0, len(back) == 3), lambda group: 1.0, seconds=0.0
    )
    assert found.ranked < 3 and len(found.back) == 3 and found.final.holds
