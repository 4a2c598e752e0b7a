"""Generated images judged by a network: handwritten digits, a linear judge."""

from collections.abc import Mapping

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from compressor.data.dataset import ArrayDataset, DataInfo
from compressor.errors import RequestError
from compressor.evaluate import Feed, evaluate
from compressor.metrics.generated_images import GeneratedImages, judge_features
from compressor.runtimes.runtime import Array, Port


@pytest.fixture(scope="module")
def digits() -> tuple[Array, Array]:
    data = load_digits()
    return (data.images[:, None] / 8.0 - 1.0).astype(np.float32), data.target


@pytest.fixture(scope="module")
def judge(digits):
    images, labels = digits
    model = LogisticRegression(max_iter=300).fit(images.reshape(len(images), -1), labels)

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = inputs["image"].reshape(len(inputs["image"]), -1)
        return {"logits": model.decision_function(rows), "features": rows[:, ::4]}

    return run


def samples_of(labels: Array) -> list[dict]:
    return [{"label": label} for label in labels]


def measured(judge, digits, generated: Array, asked: Array) -> dict[str, float]:
    metric = GeneratedImages(judge, 10, reference=judge_features(judge, digits[0]))
    metric.update("test", {"image": generated}, samples_of(asked))
    return metric.compute()


def test_real_images_score_well_against_themselves(judge, digits):
    images, labels = digits
    figures = measured(judge, digits, images, labels)
    assert figures["accuracy"] > 0.97
    assert figures["frechet_distance"] == pytest.approx(0.0, abs=1e-6)
    assert figures["precision_min"] > 0.9 and figures["recall_min"] > 0.9
    assert figures["pixel_std"] == pytest.approx(float(images.astype(np.float64).std()))
    assert set(figures) == set(GeneratedImages.better)


def test_a_generator_that_makes_one_image_a_class_has_no_diversity_and_a_large_distance(judge, digits):
    images, labels = digits
    means = np.stack([images[labels == digit].mean(axis=0) for digit in range(10)])
    asked = np.arange(100) % 10
    figures = measured(judge, digits, means[asked], asked)
    assert figures["accuracy"] == 1.0
    assert figures["diversity"] == pytest.approx(0.0, abs=1e-6)
    assert figures["frechet_distance"] > 0.5
    assert figures["pixel_std"] < 0.9 * images.std()


def test_the_worst_class_shows_when_one_class_is_never_drawn(judge, digits):
    images, labels = digits
    wrong = images.copy()
    wrong[labels == 7] = images[labels == 1][0]
    metric = GeneratedImages(judge, [f"digit {k}" for k in range(10)])
    metric.update("test", {"image": wrong}, samples_of(labels))
    figures, table = metric.compute(), metric.per_class()
    assert figures["recall_min"] == 0.0 and table[7].recall == 0.0 and table[7].name == "digit 7"
    assert figures["accuracy"] > 0.85


def test_frechet_distance_is_nan_when_no_real_image_was_given(judge, digits):
    metric = GeneratedImages(judge, 10)
    metric.update("test", {"image": digits[0][:20]}, samples_of(digits[1][:20]))
    assert np.isnan(metric.compute()["frechet_distance"])


def test_one_broken_image_counts_as_wrong_and_leaves_the_others_judged(judge, digits):
    images, labels = digits[0][:100].copy(), digits[1][:100]
    images[0] = np.nan
    figures = measured(judge, digits, images, labels)
    assert 0.9 < figures["accuracy"] < 1.0
    assert np.isfinite(figures["frechet_distance"]) and np.isnan(figures["pixel_std"])


def test_evaluate_feeds_it_with_a_driver_and_real_images(judge, digits):
    images, labels = digits

    class Echo:
        inputs = (Port("label", "label", ("batch",), "int64"),)
        outputs = (Port("image", "image", ("batch", 1, 8, 8), "float32"),)

        def __call__(self, inputs: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
            return {"image": np.stack([images[labels == label][seed] for label in inputs["label"]])}

    def subset(rows: slice) -> ArrayDataset:
        return ArrayDataset(DataInfo("digits", "0"), {"image": images[rows], "label": labels[rows]})

    feeds = {"test": Feed(subset(slice(0, 64)), batch=16), "reference": Feed(subset(slice(500, 900)), 50, run=False)}
    figures = evaluate(Echo(), feeds, [GeneratedImages(judge, 10)])
    assert figures["accuracy"] > 0.9 and 0 < figures["frechet_distance"] < 20


def test_another_feed_or_a_driver_without_images_is_refused(judge):
    metric = GeneratedImages(judge, 10)
    with pytest.raises(RequestError, match="not 'gallery'"):
        metric.update("gallery", {}, [])
    with pytest.raises(RequestError, match="output 'image'"):
        metric.update("test", {"scores": np.zeros((1, 10))}, [{"label": 0}])
