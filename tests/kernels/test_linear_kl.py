"""Fused linear layers and KL against the same in float64 with whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import RequestError
from compressor.kernels import backend, kl_div_from_logits, linear_kl_div


def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    return {
        "student_hidden": draw(2, 9, 6).requires_grad_(),
        "student_weight": draw(11, 6).requires_grad_(),
        "student_bias": draw(11).requires_grad_(),
        "teacher_hidden": draw(2, 9, 4),
        "teacher_weight": draw(11, 4),
        "teacher_bias": draw(11),
    }


def exact(tensors: dict[str, Tensor], **options) -> Tensor:
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    student = F.linear(wide["student_hidden"], wide["student_weight"], wide["student_bias"])
    teacher = F.linear(wide["teacher_hidden"], wide["teacher_weight"], wide["teacher_bias"])
    with backend("reference"):
        return kl_div_from_logits(student, teacher, **options)


def trained(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in ("student_hidden", "student_weight", "student_bias")]


@pytest.mark.parametrize("mode", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_chunked_loss_and_gradients_equal_whole_logits_in_float64(implementation, device, mode, reduction, dtype):
    tensors = inputs(dtype, device)
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(2, 9, generator=generator) > 0.3).to(device)
    weights = torch.rand(2, 9, generator=generator).to(device)
    options = {"mode": mode, "reduction": reduction, "temperature": 2.0, "mask": mask, "weights": weights}
    value = linear_kl_div(**tensors, chunk_rows=5, **options)
    expected = exact(tensors, **options)
    upstream = torch.rand(expected.shape, generator=generator).to(device) + 1
    gradients = torch.autograd.grad((value * upstream).sum(), trained(tensors))
    wanted = torch.autograd.grad((expected * upstream).sum(), trained(tensors))
    tolerance = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 18, 1000, None])
def test_size_of_the_chunks_does_not_change_the_loss(implementation, device, chunk_rows):
    tensors = inputs(torch.float32, device)
    value = linear_kl_div(**tensors, chunk_rows=chunk_rows)
    torch.testing.assert_close(value.double(), exact(tensors))


def test_only_what_is_trained_gets_a_gradient(implementation, device):
    tensors = inputs(torch.float32, device)
    tensors["student_hidden"].requires_grad_(False)
    tensors["student_bias"].requires_grad_(False)
    linear_kl_div(**tensors).backward()
    assert tensors["student_weight"].grad is not None and tensors["student_hidden"].grad is None
    with torch.no_grad():
        torch.testing.assert_close(linear_kl_div(**tensors).double(), exact(tensors))


def test_logits_are_never_held_whole(device):
    rows, classes = 64, 1000
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    hidden = torch.randn(rows, 8, device=device, requires_grad=True)
    weight = torch.randn(classes, 8, device=device, requires_grad=True)
    with backend("reference"), Watch():
        linear_kl_div(hidden, weight, torch.randn(rows, 8), torch.randn(classes, 8), chunk_rows=4).backward()
    assert largest <= max(4 * classes, 8 * classes)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters_dtype(implementation, device):
    tensors = inputs(torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value = linear_kl_div(**tensors)
    value.backward()
    assert value.dtype == torch.float32 and tensors["student_weight"].grad.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact(tensors), rtol=5e-2, atol=5e-2)


def test_linear_loss_passes_gradcheck_in_float64():
    tensors = inputs(torch.float64, torch.device("cpu"))
    for reduction in ("batchmean", "none"):
        with backend("reference"):
            assert torch.autograd.gradcheck(
                lambda hidden, weight, bias, reduction=reduction: linear_kl_div(
                    hidden,
                    weight,
                    tensors["teacher_hidden"],
                    tensors["teacher_weight"],
                    student_bias=bias,
                    reduction=reduction,
                    chunk_rows=7,
                ),
                trained(tensors),
                fast_mode=True,
            )


def test_unequal_layers_are_refused():
    hidden, weight = torch.zeros(3, 4), torch.zeros(5, 4)
    with pytest.raises(RequestError, match="do not multiply"):
        linear_kl_div(hidden, torch.zeros(5, 3), hidden, weight)
    with pytest.raises(RequestError, match="same rows"):
        linear_kl_div(hidden, weight, hidden, torch.zeros(6, 4))
    with pytest.raises(RequestError, match="bias must have the shape"):
        linear_kl_div(hidden, weight, hidden, weight, student_bias=torch.zeros(4))
    with pytest.raises(RequestError, match="chunk_rows"):
        linear_kl_div(hidden, weight, hidden, weight, chunk_rows=0)
