"""Fake quantisation: the grids, the gradients through them, ranges, and the plain model that is left without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.errors import ModelError, RequestError
from compressor.models.edits.fake_quantisation import (
    EDIT,
    InputRounding,
    WeightRounding,
    add_fake_quantisation,
    input_grid,
    observed_ranges,
    plain,
    quantised_weights,
)
from compressor.models.edits.sparsity import masked_weights
from compressor.models.model import Model, ModelInfo, load_model, save_model
from compressor.models.spec import load_model_spec

TIMM = "timm:resnet18?layers=[1,1,1,1],channels=[8,8,16,16],num_classes=10,in_chans=1"
INFO = ModelInfo("python", "tests:network", {})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 8), nn.Linear(8, 3))


def image() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


# --- the grids -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.floats(-8, 2), st.floats(0.5, 9), st.booleans(), st.integers(0, 2**31))
def test_input_is_the_nearest_level_of_its_range(
    bits: int, low: float, width: float, symmetric: bool, seed: int
) -> None:
    high = low + width
    values = np.random.default_rng(seed).normal(0, 5, 200).astype(np.float32)
    (rounded,) = InputRounding(low, high, bits, symmetric)(nn.Identity(), (torch.from_numpy(values),))
    start, end = min(low, 0.0), max(high, 0.0)
    if symmetric:
        levels = np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)) * max(-start, end) / (2 ** (bits - 1) - 1)
    else:
        scale = (end - start) / (2**bits - 1)
        levels = (np.arange(2**bits) - np.round(-start / scale)) * scale
    assert 0.0 in levels
    nearest = np.abs(values[:, None] - levels).min(1)
    np.testing.assert_allclose(np.abs(values - rounded.numpy()), nearest, atol=1e-5)
    assert np.abs(rounded.numpy()[:, None] - levels).min(1).max() < 1e-5


def test_range_without_values_has_a_grid() -> None:
    assert input_grid(0.0, 0.0, 8, symmetric=False) == (1.0, 0, 0, 255)
    assert input_grid(0.0, 0.0, 8, symmetric=True) == (1.0, 0, -127, 127)
    assert input_grid(1.0, 2.0, 8, symmetric=False)[:2] == (2.0 / 255, 0)  # an exact zero although none was seen
    assert input_grid(-2.0, -1.0, 8, symmetric=False)[1] == 255


@pytest.mark.parametrize(("bits", "level"), [(8, 127), (7, 64), (4, 8), (2, 2)])
@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 3, 3)])
def test_weight_has_one_symmetric_scale_for_each_output(bits: int, level: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[0]).view(
        -1, *[1] * (len(shape) - 1)
    )
    weight[1] = 0
    rounded = WeightRounding(bits)(weight)
    for before, after in zip(weight.numpy(), rounded.numpy(), strict=True):
        scale = np.abs(before).max() / level or 1.0
        np.testing.assert_allclose(after, np.round(before / scale) * scale, rtol=1e-5)
    assert torch.allclose(WeightRounding(bits)(rounded), rounded, rtol=1e-6)


@pytest.mark.parametrize("bits", [7, 8])
def test_weights_are_rounded_as_the_exporter_rounds_them(tmp_path: Path, bits: int) -> None:
    from onnx import load, numpy_helper

    from compressor.deployable import Graph
    from compressor.exporters.onnx_graph import export_onnx
    from compressor.exporters.quantization import QdqQuantizer, QdqScheme
    from compressor.profiles.target import Calibration

    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3)
    graph = Graph(layer, {"input": image()}, ("out",), {"input": {0: "batch"}})
    export_onnx(graph, tmp_path / "graph.onnx")
    records = [{"input": image().numpy()}]
    scheme = QdqScheme.of("onnxruntime", "cpu")
    quantizer = QdqQuantizer(load(tmp_path / "graph.onnx"), records, Calibration(weight_bits=bits), scheme)
    made = quantizer.quantize(quantizer.choose({})).graph
    arrays = {one.name: numpy_helper.to_array(one) for one in made.initializer}
    name = next(name for name, array in arrays.items() if array.dtype == np.int8 and array.shape == (8, 4, 3, 3))
    scale = arrays[name.replace("_quantized", "_scale")]
    expected = arrays[name] * scale[:, None, None, None]
    np.testing.assert_allclose(WeightRounding(bits)(layer.weight).detach().numpy(), expected, atol=1e-6)


# --- gradients -------------------------------------------------------------------------------------------------------


def test_gradient_passes_inside_the_range_and_stops_outside() -> None:
    values = torch.tensor([-3.0, -0.99, -0.4, 0.0, 0.6, 1.99, 2.5], requires_grad=True)
    (rounded,) = InputRounding(-1.0, 2.0, 8, False)(nn.Identity(), (values,))
    factors = torch.arange(1.0, 8.0)
    (rounded * factors).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]


def test_gradient_of_a_weight_passes_unchanged() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    factors = torch.randn(4, 6)
    (WeightRounding(4)(weight) * factors).sum().backward()
    assert torch.equal(weight.grad, factors)


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_ranges_are_what_the_layers_were_given_over_all_calls() -> None:
    module = network()
    with torch.no_grad(), observed_ranges(module) as ranges:
        module(image())
        module(-3 * image())
    assert list(ranges) == ["0", "3", "4"]
    assert ranges["0"] == (float(min(image().min(), (-3 * image()).min())), float((-3 * image()).max()))
    assert ranges["3"][0] == 0.0 and not module[0]._forward_pre_hooks


def test_percentile_leaves_the_ends_out() -> None:
    module, values = nn.Linear(1000, 1), torch.arange(1000.0).flip(0)[None]
    with observed_ranges(module, 99.0) as ranges:
        module(values)
    assert ranges == {"": (10.0, 989.0)}


def test_values_that_are_not_finite_are_refused() -> None:
    module, given_image = network(), image()
    given_image[0, 0, 0, 0] = torch.nan
    with pytest.raises(RequestError, match="the layer 0 gets values that are not finite"), observed_ranges(module):
        module(given_image)
    assert not module[0]._forward_pre_hooks


# --- in a module -----------------------------------------------------------------------------------------------------


def rounded_network(bits: int = 4) -> Model:
    module = network()
    with torch.no_grad(), observed_ranges(module) as ranges:
        module(image())
    return Model(module, INFO).edit(EDIT, weight_bits=bits, activation_bits=8, ranges=ranges)


def test_module_computes_with_rounded_weights_and_inputs() -> None:
    module, before = rounded_network().module, network()
    hidden = image()
    with torch.no_grad(), observed_ranges(before) as ranges:
        before(image())
        for name, layer in before.named_children():
            if name in ranges:
                (hidden,) = InputRounding(*ranges[name], 8, False)(layer, (hidden,))
                layer.weight.copy_(WeightRounding(4)(layer.weight))
            hidden = layer(hidden)
        assert torch.equal(module(image()), hidden)
        assert not torch.allclose(hidden, network()(image()), atol=1e-3)
    assert [weight.name for weight in quantised_weights(module)] == ["0.weight", "3.weight", "4.weight"]


def test_taking_it_off_leaves_plain_layers_and_the_original_rounded() -> None:
    model = rounded_network()
    before = model.module(image())
    after = plain(model)
    assert [type(layer) for layer in after.module] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear, nn.Linear]
    assert sorted(after.module.state_dict()) == sorted(network().state_dict()) and after.info == INFO
    assert torch.equal(after.module(image()), network()(image()))
    assert torch.equal(model.module(image()), before) and len(quantised_weights(model.module)) == 3


def test_weights_that_are_tied_stay_tied() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    model = Model(module, INFO).edit(EDIT, weight_bits=8, activation_bits=8, ranges={})
    after = plain(model).module
    assert after[0].weight is after[1].weight


def test_masks_hold_under_the_rounding_and_stay_when_it_is_taken_off() -> None:
    model = Model(network(), INFO).edit("sparsity.mask", pattern="2:4", weights=["0.weight", "3.weight"])
    edits = model.info.edits
    zero = model.module[3].weight == 0
    model = model.edit(EDIT, weight_bits=7, activation_bits=8, ranges={"3": [0.0, 1.0]})
    optimizer = torch.optim.SGD(model.module.parameters(), 0.1)
    model.module(image()).square().sum().backward()
    optimizer.step()
    assert not model.module[3].weight[zero].any()
    after = plain(model)
    assert after.info.edits == edits and not quantised_weights(after.module)
    assert [weight.name for weight in masked_weights(after.module)] == ["0.weight", "3.weight"]
    assert not after.module[3].weight[zero].any() and after.module[3].weight[~zero].any()


def test_joint_projection_of_attention_is_rounded() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with observed_ranges(layer) as ranges:
        layer(x)
    add_fake_quantisation(layer, 4, 8, ranges)
    assert "self_attn.in_proj_weight" in [weight.name for weight in quantised_weights(layer)]
    assert all(len(row.unique()) <= 17 for row in layer.self_attn.in_proj_weight)


def test_it_is_recorded_and_replayed_on_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, gray = load_model_spec(TIMM), torch.randn(2, 1, 32, 32)
    model.module.eval()
    with torch.no_grad(), observed_ranges(model.module) as ranges:
        model.module(gray)
    model = model.edit(EDIT, weight_bits=5, activation_bits=6, ranges=ranges, symmetric=True)
    save_model(model, tmp_path / "student")
    loaded = load_model(tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(loaded.module.eval()(gray), model.module(gray))


def test_range_of_no_layer_is_an_error_of_the_model() -> None:
    with pytest.raises(ModelError, match="a range is given for the layer 9, which a Sequential lacks"):
        add_fake_quantisation(network(), 8, 8, {"9": (0.0, 1.0)})
