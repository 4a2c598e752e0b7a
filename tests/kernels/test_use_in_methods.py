"""The methods' losses go through the kernels, and give the references' values there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.kernels import backend
from compressor.losses.divergence import cross_entropy_and_kl, kl_divergence
from compressor.losses.features import attention_transfer_loss
from compressor.methods.generation.ppcl import normalized_alignment_loss
from compressor.methods.segmentation.cnn_vit_collab import pixel_bsd_loss, region_bsd_loss

REGIONS = torch.tensor([[[True, False], [True, True]]]).expand(2, 2, 2)
LABELS = torch.arange(32).reshape(2, 4, 4) % 5


class Called(TorchDispatchMode):
    """Notes the names of our own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "compressor":
            self.names.add(function.name().removeprefix("compressor::"))
        return function(*args, **(kwargs or {}))


def logits_and_teacher(device: torch.device) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, 2, 5, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    return student, teacher


LOSSES: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "kl": ("divergence_rows", lambda s, t: kl_divergence(s, t, temperature=3.0, dim=1)),
    "kl of rows": ("divergence_rows", lambda s, t: kl_divergence(s, t, reduction="none").square().sum()),
    "labels and kl": (
        "divergence_rows",
        lambda s, t: cross_entropy_and_kl(
            s.flatten(1), t.flatten(1), LABELS[:, 0, 0].to(s.device), temperature=4.0, kl_weight=0.9, ce_weight=0.1
        ),
    ),
    "pixels": ("divergence_rows", lambda s, t: sum(pixel_bsd_loss(s, t, LABELS.to(s.device)))),
    "regions": (
        "feature_distances",
        lambda s, t: sum(region_bsd_loss(s, t, REGIONS.to(s.device), REGIONS.to(s.device) | True)),
    ),
    "attention maps": ("power_sums", attention_transfer_loss),
    "directions": ("feature_distances", normalized_alignment_loss),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_a_method_calls_its_kernel_and_equals_the_reference(implementation, device, name):
    operator, loss = LOSSES[name]
    student, teacher = logits_and_teacher(device)
    student.requires_grad_()
    with backend("reference"):
        expected = loss(student, teacher)
        (wanted,) = torch.autograd.grad(expected, student)
    with Called() as called:
        value = loss(student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert (operator in called.names) == (implementation == "triton")


def test_second_derivatives_are_refused_where_only_the_first_is_computed(implementation, device):
    student, teacher = logits_and_teacher(device)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kl_divergence(student, teacher), student, create_graph=True)
    if implementation == "reference":
        assert torch.autograd.grad(gradient.square().sum(), student)[0].abs().sum() > 0
        return
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(gradient.square().sum(), student)
