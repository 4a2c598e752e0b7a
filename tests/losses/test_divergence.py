"""KL divergence and soft cross-entropy: values against plain numpy, what gets a gradient, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import RequestError
from compressor.losses.divergence import cross_entropy_and_kl, kl_divergence, soft_cross_entropy


def numpy_softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6), classes=st.integers(2, 9), temperature=st.sampled_from([0.5, 1.0, 4.0]), seed=st.integers(0)
)
def test_kl_divergence_equals_its_definition(rows: int, classes: int, temperature: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    student, teacher = random.normal(size=(2, rows, classes)) * 3
    p, q = numpy_softmax(teacher / temperature), numpy_softmax(student / temperature)
    expected = (p * np.log(p / q)).sum(axis=-1)

    got = kl_divergence(torch.tensor(student), torch.tensor(teacher), temperature=temperature, reduction="none")

    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_kl_divergence_reads_the_classes_along_the_named_axis() -> None:
    student, teacher = torch.randn(2, 2, 5, 3, 4)

    dense = kl_divergence(student, teacher, dim=1, reduction="none")

    assert dense.shape == (2, 3, 4)
    torch.testing.assert_close(dense, kl_divergence(student.movedim(1, -1), teacher.movedim(1, -1), reduction="none"))


def test_kl_divergence_averages_over_the_selected_rows_only() -> None:
    student, teacher = torch.randn(2, 6, 5)
    mask = torch.tensor([True, False, True, False, False, True])

    masked = kl_divergence(student, teacher, mask=mask)

    torch.testing.assert_close(masked, kl_divergence(student[mask], teacher[mask]))


def test_kl_divergence_is_a_differentiable_zero_when_no_row_is_selected() -> None:
    student = torch.randn(4, 5, requires_grad=True)

    loss = kl_divergence(student, torch.randn(4, 5), mask=torch.zeros(4, dtype=torch.bool))
    loss.backward()

    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(4, 5))


def test_kl_divergence_gives_the_teacher_no_gradient() -> None:
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)

    kl_divergence(student, teacher).backward()

    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_kl_divergence_of_half_precision_logits_is_computed_in_float32() -> None:
    student, teacher = (torch.randn(2, 8, 100) * 5).to(torch.bfloat16)

    loss = kl_divergence(student, teacher)

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kl_divergence(student.double(), teacher.double()).float(), rtol=1e-5, atol=1e-6)


def test_kl_divergence_stays_finite_when_logits_are_huge() -> None:
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)

    loss = kl_divergence(student, torch.tensor([[-1e4, 1e4]]))
    loss.backward()

    assert loss.item() == pytest.approx(2e4)
    assert student.grad.isfinite().all()


def test_kl_divergence_refuses_networks_of_different_classes() -> None:
    with pytest.raises(RequestError, match="same classes"):
        kl_divergence(torch.randn(4, 5), torch.randn(4, 6))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_kl_divergence_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(RequestError, match="temperature"):
        kl_divergence(torch.randn(4, 5), torch.randn(4, 5), temperature=temperature)


def test_cross_entropy_and_kl_is_the_weighted_sum_of_its_terms() -> None:
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, -100, 2, 4])

    objective = cross_entropy_and_kl(student, teacher, labels, temperature=3.0, kl_weight=0.7, ce_weight=0.3)

    cross_entropy = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(
        objective, 0.7 * 9 * kl_divergence(student, teacher, temperature=3.0) + 0.3 * cross_entropy
    )


def test_soft_cross_entropy_of_certain_labels_is_the_cross_entropy() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])

    soft = soft_cross_entropy(logits, torch.eye(4)[labels])

    torch.testing.assert_close(soft, torch.nn.functional.cross_entropy(logits, labels))


def test_soft_cross_entropy_exceeds_the_kl_divergence_by_the_entropy_of_the_labels() -> None:
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    labels = teacher.softmax(dim=1)
    entropy = torch.distributions.Categorical(labels).entropy().mean()

    torch.testing.assert_close(soft_cross_entropy(student, labels), kl_divergence(student, teacher) + entropy)


def test_soft_cross_entropy_refuses_labels_of_other_classes() -> None:
    with pytest.raises(RequestError, match="own classes"):
        soft_cross_entropy(torch.randn(4, 5), torch.full((4, 6), 1 / 6))
