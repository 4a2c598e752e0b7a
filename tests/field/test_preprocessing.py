"""A model judged with another mean and standard deviation than it was trained with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor

from compressor.data.pictures import pixels_of
from compressor.evaluate import TorchRun
from compressor.models.spec import load_model_spec
from compressor.runtimes.images import to_graph
from compressor.runtimes.load import driver_class
from compressor.runtimes.runtime import Port
from compressor.tasks.classification import Classification

MODELS = {
    "vit_tiny_patch16_224?img_size=32,patch_size=8,depth=2,num_classes=10": (0.5, 0.5, 0.5),
    "test_resnet?num_classes=10": None,
}


@pytest.mark.parametrize("name", MODELS)
def test_normalisation_of_the_model_travels_in_its_settings_and_its_driver_applies_it(name):
    torch.manual_seed(0)
    model = load_model_spec(f"timm:{name}")
    module = model.module.eval()
    deployable = Classification({"train": "scenes:32?channels=3"}, {}).deployable(model)
    own = resolve_model_data_config(module)
    settings = deployable.driver.settings
    assert (tuple(settings["mean"]), tuple(settings["std"])) == (tuple(own["mean"]), tuple(own["std"]))
    assert MODELS[name] is None or tuple(settings["mean"]) == MODELS[name]
    runs = {key: TorchRun(graph.module, graph.outputs) for key, graph in deployable.graphs.items()}
    driver = driver_class(deployable.driver.name)(runs, settings, deployable.assets)
    pixels = np.random.default_rng(0).random((4, 3, 32, 32), np.float32)

    def logits(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
        def channels(values: tuple[float, ...]) -> Tensor:
            return torch.tensor(values).view(3, 1, 1)

        with torch.no_grad():
            return module((torch.from_numpy(pixels) - channels(mean)) / channels(std)).numpy()

    given = driver({"image": pixels})["logits"]
    assert np.allclose(given, logits(own["mean"], own["std"]), atol=1e-5)
    other = logits((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if MODELS[name] else logits((0,) * 3, (1,) * 3)
    assert not np.allclose(given, other, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["gray16.png", "gray32.tiff", "float.tiff", "gray.png", "opacity.png", "palette.gif", "print.jpg", "turned.jpg"],
)
def test_an_app_reads_a_picture_file_as_training_does(name, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / name
    pixels, options = rng.integers(0, 256, (6, 9, 3), np.uint8), {}
    gray16 = Image.fromarray(rng.integers(0, 2**16, (6, 9)).astype(np.uint16))
    gray, colour = Image.fromarray(pixels[..., 0]), Image.fromarray(pixels)
    if name == "turned.jpg":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    {
        "gray16.png": gray16,
        "gray32.tiff": Image.fromarray(np.asarray(gray16, np.int32)),
        "float.tiff": Image.fromarray(np.asarray(gray, np.float32)),
        "gray.png": gray,
        "opacity.png": colour.convert("RGBA"),
        "palette.gif": colour.convert("P"),
        "print.jpg": colour.convert("CMYK"),
        "turned.jpg": colour,
    }[name].save(path, **options)
    for channels in (1, 3):
        port = Port("image", "image", ("batch", channels, "height", "width"), "float32")
        app, _ = to_graph(path, port)
        with Image.open(path) as picture:
            training = pixels_of(picture, channels, app.shape[2:])
        assert np.array_equal(np.rint(app[0] * 255), training)
    assert training.std() > 10  # a clipped picture is white
