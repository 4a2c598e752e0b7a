"""A loss made of a given gradient."""

from __future__ import annotations

import torch

from compressor.losses.surrogate import gradient_as_loss


def test_gradient_as_loss_has_the_value_and_derivative_of_the_papers_form() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(2, 3, 4, dtype=torch.float64)
    papers_form = 0.5 * (x - (x - gradient).detach()).square().mean()
    (expected,) = torch.autograd.grad(papers_form, x)

    loss = gradient_as_loss(x, gradient)
    (got,) = torch.autograd.grad(loss, x)

    torch.testing.assert_close(loss, papers_form)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got, gradient / x.numel())


def test_gradient_as_loss_keeps_gradients_that_are_tiny_beside_the_sample() -> None:
    x = torch.full((4,), 100.0, requires_grad=True)

    gradient_as_loss(x, torch.full((4,), 1e-7)).backward()

    torch.testing.assert_close(x.grad, torch.full((4,), 0.25e-7))


def test_gradient_as_loss_back_propagates_through_the_sample_only() -> None:
    x, gradient = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)

    gradient_as_loss(x, gradient).backward()

    assert gradient.grad is None


def test_gradient_as_loss_of_bfloat16_samples_is_float32() -> None:
    x = torch.randn(4, dtype=torch.bfloat16, requires_grad=True)

    loss = gradient_as_loss(x, torch.ones(4))
    loss.backward()

    assert loss.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
