"""Distances between sets of features and their diversity."""

import numpy as np
import pytest
from scipy import linalg

from compressor.errors import RequestError
from compressor.metrics.distributions import frechet_distance, kernel_distance, pairwise_diversity


def features(rows: int, columns: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(columns, columns))
    return shift + scale * generator.normal(size=(rows, columns)) @ mixing


def textbook_frechet(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(linalg.sqrtm(cov_a @ cov_b))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root))


def test_frechet_distance_equals_the_matrix_square_root_form_when_covariances_have_full_rank():
    a, b = features(300, 12, 0), features(200, 12, 1, scale=1.3, shift=0.4)
    assert frechet_distance(a, b) == pytest.approx(textbook_frechet(a, b), rel=1e-8)


def test_frechet_distance_is_exact_when_there_are_fewer_samples_than_features():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(10, 64)), generator.normal(size=(12, 64)) + 1.0
    in_the_span = np.linalg.qr(np.concatenate([a, b]).T)[0]
    ridge = 1e-10 * np.eye(22)
    cov_a, cov_b = (np.cov(x @ in_the_span, rowvar=False) + ridge for x in (a, b))
    root_a = linalg.sqrtm(cov_a)
    overlap = np.sqrt(np.clip(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0, None)).sum()
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b) - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-3)


def test_frechet_distance_of_a_set_to_itself_is_zero_when_its_covariance_is_singular():
    a = np.repeat(features(40, 3, 0), 2, axis=1)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_a_shifted_set_is_the_squared_shift():
    a = features(50, 5, 0)
    assert frechet_distance(a, a + 2.0) == pytest.approx(5 * 4.0, rel=1e-9)


def test_frechet_distance_is_the_same_for_float16_and_for_its_values_in_float64():
    a, b = features(60, 4, 0).astype(np.float16), features(60, 4, 1).astype(np.float16)
    assert frechet_distance(a, b) == frechet_distance(a.astype(np.float64), b.astype(np.float64))


def test_kernel_distance_equals_the_sums_over_pairs():
    a, b = features(7, 3, 0), features(5, 3, 1, shift=1.0)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within_a = np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within_b = np.mean([kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-10)


def test_kernel_distance_is_the_same_when_the_rows_fill_more_than_one_block(monkeypatch):
    a, b = features(33, 4, 0), features(21, 4, 1)
    whole = kernel_distance(a, b)
    monkeypatch.setattr("compressor.metrics.distributions._BLOCK", 8)
    assert kernel_distance(a, b) == pytest.approx(whole, rel=1e-10)


def test_diversity_is_the_mean_distance_of_the_pairs_within_a_class():
    rows = np.array([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0], [10.0, 1.0], [50.0, 50.0]])
    assert pairwise_diversity(rows, np.array([0, 0, 1, 1, 2])) == pytest.approx((5.0 + 1.0) / 2)
    assert pairwise_diversity(rows[:2]) == pytest.approx(5.0)


def test_diversity_is_zero_when_the_generator_repeats_itself_and_nan_when_there_are_no_pairs():
    assert pairwise_diversity(np.ones((4, 1, 8, 8)), np.array([0, 0, 1, 1])) == 0.0
    assert np.isnan(pairwise_diversity(np.ones((2, 3)), np.array([0, 1])))


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (np.ones((3, 2)), np.ones((3, 4)), "of one length"),
        (np.ones((1, 2)), np.ones((3, 2)), "at least 2"),
        (np.array([[0.0, np.nan], [1.0, 2.0]]), np.ones((2, 2)), "first set of features holds NaN"),
    ],
)
@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_distances_say_what_is_wrong_with_their_features(distance, a, b, said):
    with pytest.raises(RequestError, match=said):
        distance(a, b)
