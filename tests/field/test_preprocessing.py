"""A model judged with another mean and standard deviation than it was trained with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from compressor.evaluate import TorchRun
from compressor.models.spec import load_model_spec
from compressor.runtimes.load import driver_class
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
