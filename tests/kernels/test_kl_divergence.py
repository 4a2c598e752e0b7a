"""KL losses from logits against float64, whatever the strides, the dtype and the extremes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import RequestError
from compressor.kernels import backend, ce_and_kl, kl_div_from_logits

MODES = ("forward", "reverse", "jsd")


def exact_rows(student: Tensor, teacher: Tensor, mode: str, temperature: float, beta: float, dims: list[int]) -> Tensor:
    """The definition, in float64."""
    rest = [axis for axis in range(student.ndim) if axis not in dims]
    shape = [student.shape[axis] for axis in rest]

    def log_probabilities(logits: Tensor) -> Tensor:
        rows = logits.permute(*rest, *dims).reshape(*shape, -1)
        return F.log_softmax(rows.double() / temperature, dim=-1)

    s, t = log_probabilities(student), log_probabilities(teacher)

    def kl(left: Tensor, right: Tensor) -> Tensor:
        p = left.exp()
        return torch.where(p > 0, p * (left.clamp(min=-1e300) - right.clamp(min=-1e300)), 0.0).sum(dim=-1)

    if mode == "forward":
        return kl(t, s) * temperature**2
    if mode == "reverse":
        return kl(s, t) * temperature**2
    m = torch.logaddexp(t + math.log(beta), s + math.log(1 - beta))
    return (beta * kl(t, m) + (1 - beta) * kl(s, m)) * temperature**2


def random_logits(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int, scale: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)


def check(
    student: Tensor,
    teacher: Tensor,
    *,
    mode: str = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
    dim: int | tuple[int, ...] = -1,
) -> None:
    """Value and gradient of the sum, with an upstream gradient that is not 1, against float64."""
    dims = [axis % student.ndim for axis in ([dim] if isinstance(dim, int) else dim)]
    student = student.detach().requires_grad_()
    exact = exact_rows(student, teacher, mode, temperature, beta, dims)
    (exact_gradient,) = torch.autograd.grad(exact.sum() * 3, student)
    options = {"mode": mode, "temperature": temperature, "beta": beta, "dim": dim}
    rows = kl_div_from_logits(student, teacher, reduction="none", **options)
    torch.testing.assert_close(rows.double(), exact, rtol=2e-5, atol=2e-5 * temperature**2)
    total = kl_div_from_logits(student, teacher, reduction="sum", **options)
    (gradient,) = torch.autograd.grad(total * 3, student)
    assert gradient.dtype == student.dtype and gradient.shape == student.shape
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[student.dtype]
    largest = max(temperature, exact[exact.isfinite()].abs().max().item() * 1e-2)
    torch.testing.assert_close(gradient.double(), exact_gradient.double(), rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [2, 100, 1000])
def test_divergence_equals_float64_for_every_dtype(implementation, device, mode, dtype, columns):
    student, teacher = (random_logits((3, columns), dtype, device, seed) for seed in (0, 1))
    check(student, teacher, mode=mode, temperature=2.0, beta=0.3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_divergence_equals_float64_for_every_temperature(implementation, device, mode, temperature):
    check(
        random_logits((4, 33), torch.float32, device, 0),
        random_logits((4, 33), torch.float32, device, 1),
        mode=mode,
        temperature=temperature,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("columns", [5, 16, 67])
def test_divergence_equals_float64_when_rows_are_walked_in_chunks(implementation, device, short_tiles, mode, columns):
    check(
        random_logits((3, columns), torch.float32, device, 0, scale=6.0),
        random_logits((3, columns), torch.float32, device, 1, scale=6.0),
        mode=mode,
        temperature=1.5,
    )


@pytest.mark.parametrize("mode", MODES)
def test_divergence_equals_float64_for_a_row_longer_than_the_registers(implementation, device, mode):
    check(
        random_logits((1, 20_011), torch.bfloat16, device, 0),
        random_logits((1, 20_011), torch.bfloat16, device, 1),
        mode=mode,
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_divergence_equals_float64_for_any_shape_axis_and_order_of_memory(implementation, device, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4), label="shape"))
    dims = tuple(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=2), label="dim"))
    orders = [data.draw(st.permutations(range(len(shape))), label="order") for _ in range(2)]
    mode = data.draw(st.sampled_from(MODES), label="mode")

    def laid_out(order: list[int], seed: int) -> Tensor:
        logits = random_logits(shape, torch.float32, device, seed)
        back = sorted(range(len(shape)), key=order.__getitem__)
        return logits.permute(order).contiguous().permute(back)

    check(laid_out(orders[0], 0), laid_out(orders[1], 1), mode=mode, dim=tuple(sorted(dims)), temperature=1.3)


@pytest.mark.parametrize("dim", [1, (2, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dense_maps_equal_float64_over_classes_and_over_positions(implementation, device, dim, memory_format):
    student = random_logits((2, 19, 6, 5), torch.float32, device, 0).to(memory_format=memory_format)
    check(student, random_logits((2, 19, 6, 5), torch.float32, device, 1), dim=dim, temperature=4.0)


def test_dense_maps_equal_float64_when_columns_are_walked_in_chunks(implementation, device, short_tiles):
    student, teacher = (random_logits((2, 37, 3, 5), torch.float32, device, seed) for seed in (0, 1))
    for mode in MODES:
        check(student, teacher, dim=1, mode=mode)


def test_strided_rows_and_columns_need_no_copy(implementation, device):
    wide = random_logits((6, 80), torch.float32, device, 0)
    teacher = random_logits((1, 32), torch.float32, device, 1).expand(6, 32)
    check(wide[:, :32], teacher)
    check(wide[::2, 5:37], teacher[::2])
    check(wide[:, :64:2], teacher)
    check(wide.t()[:6, :6], wide[:, 40:46])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunked", [False, True])
def test_extreme_logits_give_finite_values_and_gradients(implementation, device, request, mode, chunked):
    if chunked:
        request.getfixturevalue("short_tiles")
    student = torch.full((4, 40), -1e4, device=device)
    teacher = torch.full((4, 40), -1e4, device=device)
    student[0, 3] = teacher[0, 20] = 1e4
    student[1] = 1e4
    student[2, :20], teacher[2, 20:] = 1e4, 1e4
    student[3] = torch.linspace(9990, 10000, 40, device=device)
    teacher[3] = torch.linspace(-9990, -10000, 40, device=device)
    for temperature in (1.0, 3.0):
        check(student, teacher, mode=mode, temperature=temperature)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunked", [False, True])
def test_excluded_classes_count_nothing_and_never_give_nan(implementation, device, request, mode, chunked):
    if chunked:
        request.getfixturevalue("short_tiles")
    student, teacher = (random_logits((3, 40), torch.float32, device, seed) for seed in (0, 1))
    kept = torch.arange(40, device=device) % 3 != 0
    kept[:18] = False
    few = kl_div_from_logits(student[:, kept], teacher[:, kept], mode=mode)
    masked = student.masked_fill(~kept, -math.inf).requires_grad_()
    all_classes = kl_div_from_logits(masked, teacher.masked_fill(~kept, -math.inf), mode=mode)
    (gradient,) = torch.autograd.grad(all_classes, masked)
    torch.testing.assert_close(all_classes, few)
    assert gradient.isfinite().all() and (gradient[:, ~kept] == 0).all()


def test_forward_kl_is_infinite_when_the_student_excludes_what_the_teacher_wants(implementation, device):
    student = torch.tensor([[0.0, -math.inf, 1.0]], device=device)
    assert kl_div_from_logits(student, torch.zeros(1, 3, device=device)).item() == math.inf
    assert kl_div_from_logits(student, torch.zeros(1, 3, device=device), mode="reverse").isfinite()


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_any_finite_logit_count_as_zero(implementation, device, mode):
    student, teacher = (random_logits((3, 12), torch.float32, device, seed) for seed in (0, 1))
    student[0], teacher[1] = -math.inf, -math.inf
    student.requires_grad_()
    rows = kl_div_from_logits(student, teacher, mode=mode, reduction="none")
    rows.sum().backward()
    assert rows[0] == 0 and rows[1] == 0 and rows[2] > 0
    assert (student.grad[:2] == 0).all() and student.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_rows_outside_the_mask_count_nothing_whatever_they_hold(implementation, device, reduction):
    student, teacher = (random_logits((2, 3, 20), torch.float32, device, seed) for seed in (0, 1))
    mask = torch.tensor([[True, False, True], [False, True, True]], device=device)
    weights = torch.tensor([[1.0, math.nan, 2.0], [7.0, 0.5, 0.0]], device=device)
    clean = exact_rows(student, teacher, "forward", 1.0, 0.5, [2])
    student[0, 1], teacher[1, 0] = math.nan, math.inf
    student.requires_grad_()
    value = kl_div_from_logits(student, teacher, mask=mask, weights=weights, reduction=reduction)
    value.sum().backward()
    rows = torch.where(mask, clean * weights, 0.0)
    expected = {"none": rows, "sum": rows.sum(), "batchmean": rows.sum() / 4}[reduction]
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert student.grad.isfinite().all()
    assert (student.grad[~mask] == 0).all() and (student.grad[0, 0] != 0).any()


def test_mask_that_keeps_nothing_gives_zero_with_a_zero_gradient(implementation, device):
    student = random_logits((3, 5), torch.float32, device, 0).requires_grad_()
    nothing = torch.zeros(3, dtype=torch.bool, device=device)
    value = kl_div_from_logits(student, torch.zeros_like(student), mask=nothing)
    value.backward()
    assert value.item() == 0 and (student.grad == 0).all()


def test_upstream_gradient_of_each_row_multiplies_its_gradient(implementation, device):
    student = random_logits((4, 9), torch.float32, device, 0).requires_grad_()
    teacher = random_logits((4, 9), torch.float32, device, 1)
    upstream = torch.tensor([1.0, -2.0, 0.0, 5.0], device=device)
    (gradient,) = torch.autograd.grad(
        kl_div_from_logits(student, teacher, reduction="none"), student, grad_outputs=upstream
    )
    exact = exact_rows(student, teacher, "forward", 1.0, 0.5, [1])
    (expected,) = torch.autograd.grad(exact, student, grad_outputs=upstream.double())
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_two_backward_passes_give_the_same_gradient_when_the_graph_is_kept(implementation, device):
    student = random_logits((4, 9), torch.float32, device, 0).requires_grad_()
    loss = 5 * kl_div_from_logits(student, random_logits((4, 9), torch.float32, device, 1))
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(first, second)


def test_teacher_gets_no_gradient(implementation, device):
    student, teacher = (random_logits((2, 5), torch.float32, device, seed).requires_grad_() for seed in (0, 1))
    kl_div_from_logits(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None


def test_float16_gradients_survive_a_mean_over_many_rows_when_the_loss_is_scaled(implementation, device):
    student = random_logits((4096, 4), torch.float16, device, 0, scale=0.01).requires_grad_()
    teacher = random_logits((4096, 4), torch.float16, device, 1, scale=0.01)
    (kl_div_from_logits(student, teacher) * 65536).backward()
    exact = exact_rows(student, teacher, "forward", 1.0, 0.5, [1]).sum() / 4096 * 65536
    (expected,) = torch.autograd.grad(exact, student)
    torch.testing.assert_close(student.grad.double(), expected.double(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_passes_gradcheck_in_float64(mode):
    student, teacher = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    with backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x: kl_div_from_logits(x, teacher, mode=mode, temperature=2.0, mask=mask), student.requires_grad_()
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_objective_is_cross_entropy_plus_divergence(implementation, device, request, mode, chunked, temperature):
    if chunked:
        request.getfixturevalue("short_tiles")
    student = random_logits((5, 37), torch.float32, device, 0).requires_grad_()
    teacher = random_logits((5, 37), torch.float32, device, 1)
    labels = torch.tensor([0, 36, -100, 5, 17], device=device)
    mask = torch.tensor([True, True, True, False, True], device=device)
    result = ce_and_kl(
        student, teacher, labels, ce_weight=0.3, kl_weight=0.7, temperature=temperature, mode=mode, mask=mask
    )
    kl = exact_rows(student, teacher, mode, temperature, 0.5, [1])[mask].sum() / 4
    cross_entropy = F.cross_entropy(student.double()[[0, 1, 4]], labels[[0, 1, 4]])
    torch.testing.assert_close(result.kl_divergence.double(), kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.cross_entropy.double(), cross_entropy, rtol=1e-5, atol=1e-5)
    assert not result.kl_divergence.requires_grad and not result.cross_entropy.requires_grad
    torch.testing.assert_close(result.total.double(), 0.3 * cross_entropy + 0.7 * kl, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(2 * result.total, student)
    (expected,) = torch.autograd.grad(0.6 * cross_entropy + 1.4 * kl, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_objective_of_each_pixel_equals_torch_on_a_dense_map(implementation, device):
    student, teacher = (random_logits((2, 5, 3, 4), torch.float32, device, seed) for seed in (0, 1))
    labels = torch.randint(0, 5, (2, 3, 4), generator=torch.Generator().manual_seed(0)).to(device)
    result = ce_and_kl(student, teacher, labels, dim=1, reduction="none")
    torch.testing.assert_close(result.cross_entropy, F.cross_entropy(student, labels, reduction="none"))
    assert result.total.shape == labels.shape


def test_compiled_loss_equals_the_eager_one(implementation, device):
    student = random_logits((4, 24), torch.float32, device, 0).requires_grad_()
    teacher = random_logits((4, 24), torch.float32, device, 1)

    def loss(x: Tensor) -> Tensor:
        return 3 * kl_div_from_logits(x, teacher, temperature=2.0, mode="jsd")

    (expected,) = torch.autograd.grad(loss(student), student)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(student)
    (gradient,) = torch.autograd.grad(compiled, student)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"mode": "backward"}, "did you mean"),
        ({"mode": "jsd", "beta": 1.0}, "beta must lie between 0 and 1"),
        ({"reduction": "mean"}, "no reduction is named 'mean'"),
        ({"mask": torch.ones(3)}, "mask must be bool of shape"),
        ({"weights": torch.ones(2)}, "weights must have the shape"),
        ({"dim": 5}, "dim must name axes"),
        ({"dim": (1, -1)}, "dim names an axis twice"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, words):
    with pytest.raises(RequestError, match=words) as caught:
        kl_div_from_logits(torch.zeros(3, 4), torch.zeros(3, 4), **options)
    assert "\n" not in str(caught.value)


def test_unequal_logits_and_labels_are_refused():
    with pytest.raises(RequestError, match="same classes"):
        kl_div_from_logits(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(RequestError, match="labels must be integers of shape"):
        ce_and_kl(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4, dtype=torch.long))


def test_no_rows_give_zero(implementation, device):
    assert kl_div_from_logits(torch.zeros(0, 4, device=device), torch.zeros(0, 4, device=device)).item() == 0
