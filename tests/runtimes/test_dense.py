"""The driver of dense tasks: whole images, tiles, seams, odd sizes, batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import RequestError
from compressor.runtimes.drivers.dense import Dense
from compressor.runtimes.tiling import run_tiled, tile_places, tile_window

Array = np.ndarray[Any, Any]
WEIGHTS = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)


def pointwise(image: Array) -> Array:
    return np.einsum("kc,bchw->bkhw", WEIGHTS, image)


def driver(graph: Callable[[Array], Array] = pointwise, **changes: Any) -> tuple[Dense, list[tuple[int, ...]]]:
    shapes: list[tuple[int, ...]] = []

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        shapes.append(inputs["image"].shape)
        return {"logits": graph(inputs["image"])}

    usual = {"tile": [8, 12], "channels": 3, "classes": 5, "mean": [0.5] * 3, "std": [0.25] * 3}
    return Dense({"segmenter": run}, usual | changes, {}), shapes


def images(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).random(shape, np.float32)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    overlap=st.floats(0, 0.9),
    window=st.sampled_from(["hann", "linear", "flat"]),
    tiles=st.integers(1, 5),
    batch=st.integers(1, 3),
)
def test_tiled_equals_untiled_for_a_pointwise_graph_at_any_size(
    size: tuple[int, int], overlap: float, window: str, tiles: int, batch: int
) -> None:
    given_images = images(batch, 3, *size)
    made, shapes = driver(overlap=overlap, window=window, tiles=tiles)
    outputs = made({"image": given_images})
    expected = pointwise((given_images - 0.5) / 0.25)
    assert outputs["logits"].shape == (batch, 5, *size)
    assert np.allclose(outputs["logits"], expected, atol=1e-4)
    assert (outputs["classes"] == outputs["logits"].argmax(axis=1)).all()
    assert {shape[-2:] for shape in shapes} == {(8, 12)}
    assert size == (8, 12) or max(shape[0] for shape in shapes) <= tiles


def test_an_image_of_the_tiles_size_runs_whole_with_its_batch() -> None:
    made, shapes = driver()
    made({"image": images(20, 3, 8, 12)})
    assert shapes == [(20, 3, 8, 12)]


def test_larger_images_run_whole_where_the_graph_takes_them() -> None:
    made, shapes = driver(largest=[16, 24])
    for size in ((16, 24), (9, 23), (8, 12)):
        made({"image": images(1, 3, *size)})
    assert [shape[-2:] for shape in shapes] == [(16, 24), (9, 23), (8, 12)]
    made({"image": images(1, 3, 17, 24)})
    assert shapes[-1][-2:] == (8, 12)


def test_blending_leaves_no_seam_where_tiles_disagree_at_their_edges() -> None:
    def uncertain(image: Array) -> Array:
        """Right in the middle of a tile, wrong at its edge, as networks are that see no surroundings."""
        logits = pointwise(image)
        logits[..., 0] += 5
        logits[..., -1] -= 5
        return logits

    image = np.full((1, 3, 8, 60), 0.75, np.float32)
    jumps = {
        window: np.abs(np.diff(driver(uncertain, window=window, overlap=0.5)[0]({"image": image})["logits"])).max()
        for window in ("hann", "flat")
    }
    inner = driver(uncertain, overlap=0.5)[0]({"image": image})["logits"][..., 6:-6]
    assert np.abs(np.diff(inner)).max() < 0.3
    assert jumps["flat"] > 2


def test_the_borders_of_an_image_keep_what_its_outermost_tile_says() -> None:
    output = run_tiled(lambda x: np.ones((len(x), 1, 4, 4), np.float32), np.zeros((1, 1, 9, 4), np.float32), (4, 4))
    assert np.allclose(output, 1)


@given(length=st.integers(1, 200), tile=st.integers(1, 50), overlap=st.floats(0, 0.95))
def test_tiles_cover_an_axis_and_overlap_by_at_least_the_share(length: int, tile: int, overlap: float) -> None:
    length = max(length, tile)
    places = tile_places(length, tile, overlap)
    assert places[0] == 0
    assert places[-1] == length - tile
    steps = np.diff(places)
    assert (steps > 0).all()
    assert (steps <= max(1, int(tile * (1 - overlap)))).all()


def test_no_weight_of_a_window_is_zero() -> None:
    for shape in ("hann", "linear", "flat"):
        window = tile_window(7, 5, shape)
        assert window.shape == (7, 5)
        assert window.min() > 0
        assert np.allclose(window, window[::-1, ::-1])


def test_bytes_are_pixels_and_an_answer_that_is_not_finite_is_none() -> None:
    given_bytes = (images(1, 3, 8, 12) * 255).astype(np.uint8)
    made, _ = driver()
    assert np.allclose(
        made({"image": given_bytes})["logits"], made({"image": given_bytes.astype(np.float32) / 255})["logits"]
    )
    broken, _ = driver(lambda image: np.where(image[:, :1] > 0, np.nan, pointwise(image)))
    classes = broken({"image": given_bytes})["classes"]
    assert (classes[given_bytes[:, 0] > 128] == -1).all()


def test_scores_can_be_left_out_and_ports_say_what_comes() -> None:
    made, _ = driver(scores=False)
    assert set(made({"image": images(1, 3, 8, 12)})) == {"classes"} == {port.name for port in made.outputs}
    assert {port.name for port in driver()[0].outputs} == {"classes", "logits"}


@pytest.mark.parametrize(
    ("changes", "message"), [({"window": "round"}, "window is hann"), ({"overlap": 1.0}, "overlap by a share")]
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        driver(**changes)


def test_what_is_no_batch_of_images_is_refused() -> None:
    with pytest.raises(RequestError, match="batch, channels, height, width"):
        driver()[0]({"image": images(3, 8, 12)})
