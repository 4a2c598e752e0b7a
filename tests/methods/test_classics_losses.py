"""The classical distillation losses: values against plain numpy, and whom their gradients reach."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.errors import RequestError
from compressor.methods.classification import at, crd, dist, dkd, fitnet, kd, rkd

LABELS = torch.tensor([0, 3, 1, 4])


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def numpy_softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def numpy_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(axis=-1)


def numpy_huber(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) <= 1 else abs(difference) - 0.5


# whom the gradients reach

LOSSES_OF_A_PAIR: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "kd-soft": ((4, 5), kd.soft_target_loss),
    "kd": ((4, 5), lambda student, teacher: kd.kd_objective(student, teacher, LABELS)),
    "fitnet": ((4, 3, 2, 2), fitnet.hint_loss),
    "at": ((4, 3, 2, 2), lambda student, teacher: at.at_loss([student], [teacher])),
    "rkd-distance": ((4, 5), rkd.distance_loss),
    "rkd-angle": ((4, 5), rkd.angle_loss),
    "rkd": ((4, 5), rkd.rkd_loss),
    "dkd": ((4, 5), lambda student, teacher: dkd.dkd_loss(student, teacher, LABELS)),
    "dist": ((4, 5), dist.dist_loss),
}


@pytest.mark.parametrize("name", LOSSES_OF_A_PAIR)
def test_loss_gives_the_student_a_gradient_and_the_teacher_none(name: str) -> None:
    shape, loss = LOSSES_OF_A_PAIR[name]
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)

    loss(student, teacher).backward()

    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", [name for name in LOSSES_OF_A_PAIR if name != "kd"])
def test_loss_is_zero_when_the_student_equals_the_teacher(name: str) -> None:
    shape, loss = LOSSES_OF_A_PAIR[name]
    features = torch.randn(shape, dtype=torch.float64)

    assert loss(features, features.clone()).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES_OF_A_PAIR)
def test_loss_of_bfloat16_inputs_is_a_float32_near_the_exact_value(name: str) -> None:
    shape, loss = LOSSES_OF_A_PAIR[name]
    student, teacher = torch.randn(2, *shape).to(torch.bfloat16)

    got = loss(student, teacher)

    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), loss(student.double(), teacher.double()), rtol=1e-4, atol=1e-6)


# KD


def test_soft_target_loss_is_the_scaled_kl_of_the_softened_probabilities() -> None:
    student, teacher = np.random.default_rng(0).normal(size=(2, 6, 5)) * 4
    expected = 3.0**2 * numpy_kl(numpy_softmax(teacher / 3), numpy_softmax(student / 3)).mean()

    got = kd.soft_target_loss(torch.tensor(student), torch.tensor(teacher), temperature=3.0)

    assert got.item() == pytest.approx(expected, rel=1e-9)


def test_soft_target_gradient_nears_the_difference_of_centred_logits_when_the_temperature_is_high() -> None:
    """Hinton et al., eq. 4: in the limit distillation matches zero-mean logits."""
    student, teacher = torch.randn(2, 1, 5, dtype=torch.float64)
    student.requires_grad_()

    kd.soft_target_loss(student, teacher, temperature=1000.0).backward()

    centred = (student - student.mean()) - (teacher - teacher.mean())
    torch.testing.assert_close(student.grad, centred.detach() / 5, rtol=5e-3, atol=1e-4)


def test_kd_objective_weighs_soft_targets_against_labels() -> None:
    student, teacher = torch.randn(2, 4, 5)
    soft = kd.soft_target_loss(student, teacher)
    hard = -student.log_softmax(dim=1)[torch.arange(4), LABELS].mean()

    torch.testing.assert_close(kd.kd_objective(student, teacher, LABELS, soft_weight=0.7), 0.7 * soft + 0.3 * hard)


# FitNet


def test_hint_loss_is_half_the_mean_squared_error() -> None:
    guided, hint = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 2.0]])

    assert fitnet.hint_loss(guided, hint).item() == pytest.approx(0.5 * 9 / 2)


@pytest.mark.parametrize(("guided", "hint"), [((3, 8, 8), (5, 8, 8)), ((3, 8, 6), (5, 6, 6)), ((4, 7, 7), (4, 1, 1))])
def test_hint_regressor_reaches_the_shape_of_the_hint(guided: tuple[int, int, int], hint: tuple[int, int, int]) -> None:
    assert fitnet.hint_regressor(guided, hint)(torch.randn(2, *guided)).shape == (2, *hint)


def test_hint_regressor_refuses_a_guided_layer_that_is_smaller_than_the_hint() -> None:
    with pytest.raises(RequestError, match="earlier guided layer"):
        fitnet.hint_regressor((3, 4, 4), (3, 8, 8))


def test_hint_loss_trains_the_regressor_and_the_student_below_it() -> None:
    student, regressor = nn.Conv2d(1, 3, 3), fitnet.hint_regressor((3, 6, 6), (5, 4, 4))

    fitnet.hint_loss(regressor(student(torch.randn(2, 1, 8, 8))), torch.randn(2, 5, 4, 4)).backward()

    assert student.weight.grad.abs().sum() > 0
    assert regressor.weight.grad.abs().sum() > 0


def test_hint_loss_refuses_features_of_another_shape() -> None:
    with pytest.raises(RequestError, match="regressor"):
        fitnet.hint_loss(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4))


def test_soft_target_weight_falls_linearly_from_four_to_one() -> None:
    weights = [fitnet.soft_target_weight(step, 7) for step in range(9)]

    assert weights == pytest.approx([4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0])


# AT


def test_at_loss_adds_the_mean_squared_differences_of_the_layers() -> None:
    random = np.random.default_rng(0)
    student = [random.normal(size=(2, 3, 4, 4)), random.normal(size=(2, 6, 2, 2))]
    teacher = [random.normal(size=(2, 8, 4, 4)), random.normal(size=(2, 5, 2, 2))]
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        s_map, t_map = ((x**2).sum(axis=1).reshape(2, -1) for x in (s, t))
        s_map, t_map = (x / np.sqrt((x**2).sum(axis=1, keepdims=True)) for x in (s_map, t_map))
        expected += ((s_map - t_map) ** 2).mean()

    loss = at.at_loss([torch.tensor(x) for x in student], [torch.tensor(x) for x in teacher])

    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("student_layers", "teacher_layers"), [(0, 0), (1, 2)])
def test_at_loss_refuses_layers_that_do_not_pair_up(student_layers: int, teacher_layers: int) -> None:
    features = torch.randn(1, 2, 2, 2)

    with pytest.raises(RequestError, match="pairs layers"):
        at.at_loss([features] * student_layers, [features] * teacher_layers)


# RKD


@settings(max_examples=10, deadline=None)
@given(
    samples=st.integers(2, 5),
    dimensions=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    scale=st.sampled_from([1e-2, 1.0, 1e3]),
    seed=st.integers(0),
)
def test_distance_loss_equals_that_of_a_loop(
    samples: int, dimensions: tuple[int, int], scale: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    sides = [random.normal(size=(samples, dimension)) * scale for dimension in dimensions]
    pairs = list(itertools.combinations(range(samples), 2))
    relative = []
    for x in sides:
        distances = [math.dist(x[i], x[j]) for i, j in pairs]
        relative.append([distance * len(pairs) / sum(distances) for distance in distances])
    expected = 2 * sum(numpy_huber(s - t) for s, t in zip(*relative, strict=True)) / samples**2

    loss = rkd.distance_loss(*map(torch.tensor, sides))

    assert loss.item() == pytest.approx(expected, rel=1e-7, abs=1e-12)


@settings(max_examples=10, deadline=None)
@given(samples=st.integers(3, 5), seed=st.integers(0))
def test_angle_loss_equals_that_of_a_loop(samples: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    sides = random.normal(size=(samples, 3)), random.normal(size=(samples, 4))
    total = 0.0
    for i, j, k in itertools.product(range(samples), repeat=3):
        if j in (i, k):
            continue
        cosines = []
        for x in sides:
            a, b = x[i] - x[j], x[k] - x[j]
            cosines.append(a @ b / math.sqrt((a @ a) * (b @ b)))
        total += numpy_huber(cosines[0] - cosines[1])

    loss = rkd.angle_loss(*map(torch.tensor, sides))

    assert loss.item() == pytest.approx(total / samples**3, rel=1e-7, abs=1e-12)


def test_rkd_loss_does_not_see_rotation_scale_or_shift() -> None:
    teacher = torch.randn(6, 4, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))

    assert rkd.rkd_loss(5 * teacher @ rotation + 3, teacher).item() == pytest.approx(0, abs=1e-12)


def test_rkd_loss_stays_finite_when_all_embeddings_coincide() -> None:
    student = torch.ones(4, 3, requires_grad=True)

    loss = rkd.rkd_loss(student, torch.randn(4, 3))
    loss.backward()

    assert loss.isfinite()
    assert student.grad.isfinite().all()


# CRD


def unit_rows(random: np.random.Generator, *shape: int) -> np.ndarray:
    rows = random.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_crd_loss_of_a_first_batch_equals_the_normalised_critics_loss() -> None:
    """Written with probabilities and a loop, as the official criterion is, but for its constant 1e-7."""
    random = np.random.default_rng(0)
    samples, negatives, temperature = 20, 6, 0.5
    memory = crd.ContrastiveMemory(samples, 8, generator=torch.Generator().manual_seed(1)).double()
    student, teacher = unit_rows(random, 3, 8), unit_rows(random, 3, 8)
    candidates = random.integers(samples, size=(3, 1 + negatives))
    expected = 0.0
    for anchors, bank in ((student, memory.teacher_bank.numpy()), (teacher, memory.student_bank.numpy())):
        exponentials = np.exp(np.einsum("bd,bkd->bk", anchors, bank[candidates]) / temperature)
        probabilities = exponentials / (exponentials.mean() * samples)
        posterior = probabilities / (probabilities + negatives / samples)
        expected -= (np.log(posterior[:, 0]) + np.log(1 - posterior[:, 1:]).sum(axis=1)).mean()

    loss = memory(*map(torch.tensor, (student, teacher, candidates)), temperature=temperature)

    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_crd_keeps_the_constants_of_its_first_batch() -> None:
    memory, candidates = crd.ContrastiveMemory(10, 4), torch.arange(6).reshape(2, 3)
    memory(torch.randn(2, 4), torch.randn(2, 4), candidates)
    constants = memory.log_normalizers.clone()

    memory(torch.randn(2, 4), torch.randn(2, 4), candidates)

    assert constants.isfinite().all()
    assert torch.equal(memory.log_normalizers, constants)


def test_crd_trains_the_student_and_both_projections_but_not_the_teacher() -> None:
    student_features, teacher_features = torch.randn(2, 5, requires_grad=True), torch.randn(2, 7, requires_grad=True)
    student_head, teacher_head = crd.ProjectionHead(5, 4), crd.ProjectionHead(7, 4)
    memory = crd.ContrastiveMemory(10, 4)

    loss = memory(
        student_head(student_features), teacher_head(teacher_features.detach()), torch.arange(6).reshape(2, 3)
    )
    loss.backward()

    assert student_features.grad.abs().sum() > 0
    assert student_head.linear.weight.grad.abs().sum() > 0
    assert teacher_head.linear.weight.grad.abs().sum() > 0
    assert teacher_features.grad is None
    assert not any(bank.requires_grad for bank in memory.buffers())


def test_crd_memory_moves_the_rows_of_the_batch_and_keeps_them_unit() -> None:
    memory = crd.ContrastiveMemory(5, 4, momentum=0.25)
    before, indices = memory.student_bank.clone(), torch.tensor([3, 1])
    student, teacher = torch.nn.functional.normalize(torch.randn(2, 2, 4), dim=2)

    memory.update(student, teacher, indices)

    mixed = 0.25 * before[3] + 0.75 * student[0]
    torch.testing.assert_close(memory.student_bank[3], mixed / mixed.norm())
    torch.testing.assert_close(memory.teacher_bank[indices].norm(dim=1), torch.ones(2))
    untouched = torch.tensor([0, 2, 4])
    assert torch.equal(memory.student_bank[untouched], before[untouched])


def test_crd_memory_continues_from_its_state() -> None:
    memory, candidates = crd.ContrastiveMemory(6, 4), torch.arange(6).reshape(2, 3)
    batch = torch.randn(2, 4), torch.randn(2, 4)
    memory(*batch, candidates)
    memory.update(*batch, torch.tensor([0, 3]))
    restored = crd.ContrastiveMemory(6, 4)
    restored.load_state_dict(memory.state_dict())

    assert torch.equal(restored(*batch, candidates), memory(*batch, candidates))


def test_crd_memory_starts_with_rows_of_about_unit_length() -> None:
    memory = crd.ContrastiveMemory(200, 64, generator=torch.Generator().manual_seed(0))

    assert memory.teacher_bank.square().sum(dim=1).mean().item() == pytest.approx(1, abs=0.05)


def test_crd_negatives_are_of_other_classes_and_reach_all_of_them() -> None:
    labels = torch.tensor([2, 0, 1, 2, 0, 7, 2])
    sampler = crd.NegativeSampler(labels)
    indices = torch.tensor([0, 1, 2, 5])

    candidates = sampler(indices, 200, torch.Generator().manual_seed(0))

    assert torch.equal(candidates[:, 0], indices)
    for index, negatives in zip(indices, candidates[:, 1:], strict=True):
        assert set(negatives.tolist()) == set((labels != labels[index]).nonzero().flatten().tolist())


def test_crd_negatives_are_drawn_uniformly() -> None:
    sampler = crd.NegativeSampler(torch.tensor([0, 1, 1, 1, 2]))

    negatives = sampler(torch.tensor([4]), 20_000, torch.Generator().manual_seed(0))[0, 1:]

    shares = negatives.bincount(minlength=5) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]), atol=0.02, rtol=0)


def test_crd_negatives_refuse_a_data_set_of_one_class() -> None:
    with pytest.raises(RequestError, match="two classes"):
        crd.NegativeSampler(torch.zeros(5, dtype=torch.int64))


def test_crd_pulls_the_projections_of_one_sample_together() -> None:
    samples, generator = 8, torch.Generator().manual_seed(0)
    teacher = torch.nn.functional.normalize(torch.randn(samples, 4, generator=generator), dim=1)
    student = torch.randn(samples, 4, generator=generator).requires_grad_()
    memory, sampler = crd.ContrastiveMemory(samples, 4, generator=generator), crd.NegativeSampler(torch.arange(samples))
    memory.update(student.detach(), teacher, torch.arange(samples))
    memory.teacher_bank.copy_(teacher)
    optimizer = torch.optim.Adam([student], lr=0.1)

    for _ in range(100):
        projections = torch.nn.functional.normalize(student, dim=1)
        loss = memory(projections, teacher, sampler(torch.arange(samples), 5, generator), temperature=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    similarities = torch.nn.functional.normalize(student, dim=1) @ teacher.T
    assert torch.equal(similarities.argmax(dim=1), torch.arange(samples))


# DKD


@settings(max_examples=20, deadline=None)
@given(classes=st.integers(2, 8), temperature=st.sampled_from([1.0, 4.0]), seed=st.integers(0))
def test_dkd_terms_put_the_kd_loss_together_again(classes: int, temperature: float, seed: int) -> None:
    """``KL = TCKD + (1 - p_t) NCKD``, the paper's reformulation, with KL from plain numpy."""
    random = np.random.default_rng(seed)
    student, teacher = random.normal(size=(2, 4, classes)) * 3
    labels = random.integers(classes, size=4)
    p, q = numpy_softmax(teacher / temperature), numpy_softmax(student / temperature)

    target, non_target = dkd.decoupled_divergences(
        *map(torch.tensor, (student, teacher, labels)), temperature=temperature
    )

    doubt = 1 - p[np.arange(4), labels]
    np.testing.assert_allclose(target + torch.tensor(doubt) * non_target, numpy_kl(p, q), rtol=1e-8, atol=1e-12)


def test_dkd_loss_equals_the_weighted_divergences_of_the_renormalised_probabilities() -> None:
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 3, 4)) * 2
    expected = []
    for row, label in enumerate([2, 0, 3]):
        p, q = numpy_softmax(teacher[row] / 4), numpy_softmax(student[row] / 4)
        binary = numpy_kl(*(np.array([x[label], 1 - x[label]]) for x in (p, q)))
        others = numpy_kl(*(np.delete(x, label) / (1 - x[label]) for x in (p, q)))
        expected.append(16 * (1.5 * binary + 6 * others))

    loss = dkd.dkd_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor([2, 0, 3]), alpha=1.5, beta=6.0)

    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-9)


def test_dkd_loss_stays_finite_when_the_teacher_is_certain() -> None:
    student = torch.randn(1, 3, requires_grad=True)

    loss = dkd.dkd_loss(student, torch.tensor([[1000.0, 0.0, -1000.0]]), torch.tensor([0]))
    loss.backward()

    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_dkd_warm_up_rises_linearly_and_can_be_turned_off() -> None:
    assert [dkd.warm_up_weight(epoch) for epoch in (0, 5, 20, 100)] == [0, 0.25, 1, 1]
    assert dkd.warm_up_weight(0, warm_up_epochs=0) == 1


# DIST


@settings(max_examples=10, deadline=None)
@given(samples=st.integers(3, 6), classes=st.integers(3, 6), seed=st.integers(0))
def test_dist_loss_equals_that_of_numpys_correlations(samples: int, classes: int, seed: int) -> None:
    student, teacher = np.random.default_rng(seed).normal(size=(2, samples, classes))
    p, q = numpy_softmax(student / 2), numpy_softmax(teacher / 2)
    inter = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])

    loss = dist.dist_loss(torch.tensor(student), torch.tensor(teacher), beta=2.0, gamma=0.5, temperature=2.0)

    assert loss.item() == pytest.approx(4 * (2 * inter + 0.5 * intra), rel=1e-6, abs=1e-9)


def test_dist_inter_class_loss_does_not_see_scale_or_shift_of_the_predictions() -> None:
    teacher = torch.rand(4, 5, dtype=torch.float64)

    assert dist.inter_class_loss(0.3 * teacher + 0.1, teacher).item() == pytest.approx(0, abs=1e-12)
    assert dist.intra_class_loss(0.3 * teacher + 0.1, teacher).item() == pytest.approx(0, abs=1e-12)


def test_dist_loss_has_a_finite_gradient_when_the_student_starts_with_equal_logits() -> None:
    student = torch.zeros(4, 5, requires_grad=True)

    loss = dist.dist_loss(student, torch.randn(4, 5))
    loss.backward()

    assert loss.item() == pytest.approx(2)
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1
