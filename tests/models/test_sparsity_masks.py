"""Sparsity masks: which weights stay, that the zeros hold while others learn, and that folding leaves plain layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.errors import ModelError, RequestError
from compressor.models.edits.sparsity import (
    fits_pattern,
    fold,
    folded,
    mask_layers,
    masked_weights,
    sparsity_mask,
    weights_of,
)
from compressor.models.model import Model, load_model, save_model
from compressor.models.spec import load_model_spec
from compressor.training.averaging import Ema

TIMM = "timm:resnet18?layers=[1,1,1,1],channels=[8,8,16,16],num_classes=10,in_chans=1"


def groups(mask: Tensor, size: int) -> Tensor:
    """Groups of neighbouring inputs of one output, at every position of a kernel: (..., size)."""
    return mask.movedim(1, -1).unflatten(-1, (-1, size))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(n + 1, 8))),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([(), (3,), (2, 3)]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_exactly_n_of_m_neighbours_stay_and_they_are_the_largest(
    pattern: tuple[int, int], count: int, outputs: int, kernel: tuple[int, ...], tied: bool, seed: int
) -> None:
    keep, size = pattern
    weight = torch.randn(outputs, count * size, *kernel, generator=torch.Generator().manual_seed(seed))
    weight = weight.round() if tied else weight
    mask = sparsity_mask(weight, f"{keep}:{size}")
    assert mask.dtype == torch.bool and mask.shape == weight.shape
    assert (groups(mask, size).sum(-1) == keep).all()
    sizes, kept = groups(weight.abs(), size), groups(mask, size)
    assert (sizes.masked_fill(~kept, 9e9).amin(-1) >= sizes.masked_fill(kept, 0).amax(-1)).all()


def test_first_of_equal_weights_stay() -> None:
    assert sparsity_mask(torch.ones(2, 8), "2:4").tolist() == [[True, True, False, False] * 2] * 2
    assert sparsity_mask(torch.zeros(1, 4), "0.5").tolist() == [[True, True, False, False]]
    assert sparsity_mask(torch.full((2, 4), -1.0), "block:2x2:0.5").tolist() == [[True, True, False, False]] * 2


def test_kernel_positions_are_grouped_apart() -> None:
    weight = torch.zeros(1, 4, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([1.0, 2, 3, 4])
    weight[0, :, 0, 1] = torch.tensor([4.0, 3, 2, 1])
    assert sparsity_mask(weight, "2:4")[0, :, 0].T.tolist() == [[False, False, True, True], [True, True, False, False]]


@pytest.mark.parametrize(("share", "shape"), [(0.8, (7, 9)), (0.5, (3, 5, 3, 3)), (0.01, (4, 4)), (0.9, (8, 8))])
def test_share_of_smallest_weights_goes_rounded(share: float, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = sparsity_mask(weight, str(share))
    assert int((~mask).sum()) == round(share * weight.numel())
    assert (~mask).sum() == 0 or weight[mask].abs().min() >= weight[~mask].abs().max()


def test_blocks_of_smallest_norm_go_whole() -> None:
    weight = torch.full((4, 6), 0.1)
    weight[0, 0] = 10.0  # one large weight keeps its block
    weight[2:, 4:] = 1.0
    mask = sparsity_mask(weight, "block:2x2:0.66")
    assert mask.view(2, 2, 3, 2).transpose(1, 2).flatten(2).sum(-1).tolist() == [[4, 0, 0], [0, 0, 4]]
    kernel = torch.stack([weight, weight.flip(0, 1)], -1)
    mask = sparsity_mask(kernel, "block:2x2:0.66")  # ranked over all positions of the kernel
    assert mask[..., 0].any() and torch.equal(mask[..., 0], mask[..., 1].flip(0, 1))


@pytest.mark.parametrize(
    ("shape", "pattern", "fits"),
    [
        ((8, 6), "2:4", False),
        ((8, 8), "2:4", True),
        ((8, 1, 3, 3), "2:4", False),
        ((8, 8), "block:3x4:0.5", False),
        ((6, 8), "block:3x4:0.5", True),
        ((7, 5), "0.5", True),
    ],
)
def test_weight_that_does_not_divide_stays_whole(shape: tuple[int, ...], pattern: str, fits: bool) -> None:
    assert fits_pattern(shape, pattern) == fits
    assert bool(sparsity_mask(torch.randn(shape), pattern).all()) == (not fits)


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "1.5", "0", "1.0", "block:0x2:0.5", "block:2:0.5", "half"])
def test_wrong_pattern_is_one_line(pattern: str) -> None:
    with pytest.raises(RequestError) as error:
        sparsity_mask(torch.randn(4, 4), pattern)
    assert repr(pattern) in str(error.value) and "\n" not in str(error.value)


def test_vector_is_refused() -> None:
    with pytest.raises(RequestError, match="two axes or more"):
        sparsity_mask(torch.randn(4), "0.5")


# --- in a module -----------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 8), nn.Linear(8, 3))


def zeros(module: nn.Module) -> dict[str, Tensor]:
    return {weight.name: weight.value.detach() == 0 for weight in weights_of(module)}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_masked_weights_stay_zero_while_the_others_learn(optimizer: type[torch.optim.Optimizer]) -> None:
    module = mask_layers(network(), "2:4", ["0.weight", "3.weight"])
    before, start = zeros(module), {w.name: w.value.detach().clone() for w in weights_of(module)}
    assert before["3.weight"].float().mean() == before["0.weight"].float().mean() == 0.5
    assert not before["4.weight"].any()
    steps = optimizer(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        steps.zero_grad()
        module(torch.randn(5, 4, 8, 8)).square().sum().backward()
        steps.step()
    for name, where in zeros(module).items():
        assert torch.equal(where, before[name]), name
        moved = next(w.value for w in weights_of(module) if w.name == name)
        assert not torch.equal(moved[~where], start[name][~where])


def test_no_gradient_reaches_a_masked_weight() -> None:
    module = mask_layers(network(), "0.5", ["3.weight"])
    module(torch.randn(2, 4, 8, 8)).sum().backward()
    gradient = module[3].parametrizations.weight.original.grad
    assert not gradient[zeros(module)["3.weight"]].any() and gradient.any()


def test_folding_leaves_plain_layers_and_the_original_as_it_was() -> None:
    module = mask_layers(network(), "2:4", ["0.weight", "3.weight"])
    image = torch.randn(2, 4, 8, 8)
    twin, plain = fold(module), fold(module)
    assert [type(layer) for layer in plain] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear, nn.Linear]
    assert sorted(plain.state_dict()) == sorted(network().state_dict())
    assert torch.equal(plain(image), module(image)) and torch.equal(twin(image), module(image))
    assert [weight.name for weight in masked_weights(module)] == ["0.weight", "3.weight"]
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert fold(plain) is plain


def test_joint_projection_of_attention_is_masked_and_folded() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    names = [weight.name for weight in weights_of(layer)]
    assert names == ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    x = torch.randn(2, 5, 16)
    masked = mask_layers(layer, "2:4", names)
    plain = fold(masked)
    with torch.no_grad():
        assert torch.allclose(plain(x), masked(x), atol=1e-6)
    assert (plain.self_attn.in_proj_weight.unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()


def test_second_mask_keeps_the_zeros_of_the_first() -> None:
    module = mask_layers(mask_layers(network(), "0.5", ["3.weight"]), "2:4", ["3.weight"])
    weight = fold(module)[3].weight
    assert (weight == 0).float().mean() >= 0.5
    assert (weight.unflatten(1, (-1, 4)) != 0).sum(-1).le(2).all()


def test_unknown_weight_is_an_error_of_the_model() -> None:
    with pytest.raises(ModelError, match="lies on the weight 9.weight, which a Sequential lacks"):
        mask_layers(network(), "2:4", ["9.weight"])


# --- on disk and in copies -------------------------------------------------------------------------------------------


def sparse_classifier() -> Model:
    torch.manual_seed(0)
    model = load_model_spec(TIMM)
    chosen = [weight.name for weight in weights_of(model.module)][1:-1]
    return model.edit("sparsity.mask", pattern="2:4", weights=chosen)


def test_masks_are_saved_with_the_student_and_loaded_again(tmp_path: Path) -> None:
    model = sparse_classifier()
    save_model(model, tmp_path / "student")
    torch.manual_seed(1)
    loaded = load_model(tmp_path / "student")
    image = torch.randn(2, 1, 32, 32)
    assert loaded.info.edits == model.info.edits
    assert torch.equal(loaded.module.eval()(image), model.module.eval()(image))
    assert [w.name for w in masked_weights(loaded.module)] == [w.name for w in masked_weights(model.module)]
    assert {name: mask.tolist() for name, mask in zeros(loaded.module).items()} == {
        name: mask.tolist() for name, mask in zeros(model.module).items()
    }


def test_folded_model_has_no_edit_and_no_mask_among_its_weights() -> None:
    model = sparse_classifier()
    plain = folded(model)
    assert plain.info.edits == () and model.info.edits
    assert sorted(plain.module.state_dict()) == sorted(load_model_spec(TIMM).module.state_dict())
    assert folded(plain) is plain


def test_copies_and_averages_hold_the_zeros() -> None:
    model = sparse_classifier()
    average, copied = Ema(model.module, 0.5), model.copy()
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(1.0)
    average.update()
    expected = zeros(model.module)
    for module in (average.module, copied.module):
        assert {name: int(mask.sum()) for name, mask in zeros(module).items()} == {
            name: int(mask.sum()) for name, mask in expected.items()
        }
