"""Feature distances against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.errors import RequestError
from compressor.kernels import backend, feature_distance

VECTOR_MODES = ("mse", "normalized_mse", "cosine")


def exact(student: Tensor, teacher: Tensor, mode: str, mask: Tensor | None, dim: int, power: float = 2.0) -> Tensor:
    s, t = student.double().movedim(dim, -1), teacher.double().movedim(dim, -1)
    kept = torch.ones(s.shape[:-1], dtype=torch.bool, device=s.device) if mask is None else mask
    if mode == "attention_transfer":
        maps = [(x.abs().pow(power).sum(-1) * kept).flatten(1) for x in (s, t)]
        maps = [m / m.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12) for m in maps]
        return ((maps[0] - maps[1]).square() * kept.flatten(1)).sum() / kept.sum().clamp(min=1)
    s, t = s[kept], t[kept]
    if mode == "mse":
        return (s - t).square().mean()
    eps = 1e-8 if mode == "cosine" else 1e-12
    s_norm, t_norm = (x.square().sum(-1).sqrt().clamp(min=eps) for x in (s, t))
    if mode == "cosine":
        return (1 - (s * t).sum(-1) / (s_norm * t_norm)).mean()
    return (s / s_norm[:, None] - t / t_norm[:, None]).square().sum(-1).mean()


def draw(shape: tuple[int, ...], device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def check(student: Tensor, teacher: Tensor, mode: str, mask: Tensor | None, dim: int, power: float = 2.0) -> None:
    student = student.detach().requires_grad_()
    value = feature_distance(student, teacher, mode, mask, dim=dim, power=power)
    expected = exact(student, teacher, mode, mask, dim, power)
    (gradient,) = torch.autograd.grad(value * 3, student)
    (wanted,) = torch.autograd.grad(expected * 3, student)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[student.dtype]
    torch.testing.assert_close(
        gradient.double(), wanted.double(), rtol=tolerance, atol=tolerance * wanted.abs().max().item() + 1e-6
    )


@pytest.mark.parametrize("mode", [*VECTOR_MODES, "attention_transfer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim"), [((2, 12, 5, 4), 1), ((2, 7, 40), -1)])
def test_distance_and_gradient_equal_float64_for_maps_and_tokens(implementation, device, mode, dtype, shape, dim):
    check(draw(shape, device, 0, dtype), draw(shape, device, 1, dtype), mode, None, dim)


@pytest.mark.parametrize("mode", [*VECTOR_MODES, "attention_transfer"])
@pytest.mark.parametrize(("shape", "dim"), [((2, 37, 3, 3), 1), ((3, 2, 67), -1)])
def test_distance_equals_float64_when_vectors_are_walked_in_chunks(
    implementation, device, short_tiles, mode, shape, dim
):
    check(draw(shape, device, 0), draw(shape, device, 1), mode, None, dim)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_distance_equals_float64_for_any_shape_axis_and_order_of_memory(implementation, device, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4), label="shape"))
    dim = data.draw(st.integers(0, len(shape) - 1), label="dim")
    mode = data.draw(st.sampled_from(VECTOR_MODES), label="mode")
    order = data.draw(st.permutations(range(len(shape))), label="order")
    student = (
        draw(shape, device, 0).permute(order).contiguous().permute(sorted(range(len(shape)), key=order.__getitem__))
    )
    check(student + 1, draw(shape, device, 1), mode, None, dim)


@pytest.mark.parametrize("mode", [*VECTOR_MODES, "attention_transfer"])
def test_places_outside_the_mask_count_nothing_whatever_they_hold(implementation, device, mode):
    mask = torch.tensor([[[True, False], [True, True]], [[False, False], [True, True]]], device=device)
    student, teacher = draw((2, 5, 2, 2), device, 0), draw((2, 5, 2, 2), device, 1)
    check(student, teacher, mode, mask, 1)
    if mode == "attention_transfer":
        return
    student[0, :, 0, 1] = torch.nan
    student.requires_grad_()
    feature_distance(student, teacher, mode, mask).backward()
    assert student.grad.isfinite().all() and (student.grad[0, :, 0, 1] == 0).all()


@pytest.mark.parametrize("mode", [*VECTOR_MODES, "attention_transfer"])
def test_mask_that_keeps_nothing_gives_zero(implementation, device, mode):
    student = draw((2, 5, 3), device, 0).requires_grad_()
    value = feature_distance(student, draw((2, 5, 3), device, 1), mode, torch.zeros(2, 3, dtype=torch.bool).to(device))
    value.backward()
    assert value.item() == 0 and (student.grad == 0).all()


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_maps_take_any_power_and_unequal_channels(implementation, device, power):
    check(draw((2, 3, 4, 5), device, 0), draw((2, 8, 4, 5), device, 1), "attention_transfer", None, 1, power)


@pytest.mark.parametrize("mode", ["normalized_mse", "cosine"])
@pytest.mark.parametrize("chunked", [False, True])
def test_zero_vectors_have_distance_one_and_no_gradient(implementation, device, request, mode, chunked):
    if chunked:
        request.getfixturevalue("short_tiles")
    student = torch.zeros(2, 20, device=device, requires_grad=True)
    value = feature_distance(student, torch.ones(2, 20, device=device), mode)
    value.backward()
    assert value.item() == pytest.approx(1.0) and (student.grad == 0).all()


@pytest.mark.parametrize("mode", VECTOR_MODES)
def test_two_backward_passes_agree_and_the_teacher_gets_none(implementation, device, mode):
    student, teacher = (draw((3, 5), device, seed).requires_grad_() for seed in (0, 1))
    loss = 2 * feature_distance(student, teacher, mode)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
    loss.backward()
    torch.testing.assert_close(student.grad, first)
    assert teacher.grad is None


@pytest.mark.parametrize("mode", [*VECTOR_MODES, "attention_transfer"])
def test_compiled_distance_equals_the_eager_one(implementation, device, mode):
    student, teacher = draw((2, 5, 6), device, 0).requires_grad_(), draw((2, 5, 6), device, 1)

    def distance(x: Tensor) -> Tensor:
        return 2 * feature_distance(x, teacher, mode)

    expected = torch.autograd.grad(distance(student), student)[0].clone()
    compiled = torch.compile(distance, backend="aot_eager", fullgraph=True)(student)
    torch.testing.assert_close(torch.autograd.grad(compiled, student)[0], expected)


@pytest.mark.parametrize("mode", [*VECTOR_MODES, "attention_transfer"])
def test_distance_passes_gradcheck_in_float64(mode):
    student = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    with backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x: feature_distance(x, teacher, mode, power=4.0), student, fast_mode=True
        )


def test_wrong_features_are_refused():
    with pytest.raises(RequestError, match="did you mean"):
        feature_distance(torch.zeros(2, 3), torch.zeros(2, 3), "cosin")
    with pytest.raises(RequestError, match="project the student first"):
        feature_distance(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))
    with pytest.raises(RequestError, match="same places"):
        feature_distance(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    with pytest.raises(RequestError, match="samples along the first axis"):
        feature_distance(torch.zeros(2, 3), torch.zeros(2, 3), "attention_transfer", dim=0)
