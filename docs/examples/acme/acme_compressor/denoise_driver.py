"""The driver of the denoising task: what an app calls. numpy alone, no torch: it runs on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compressor.runtimes.runtime import Array, Port, Run

__all__ = ["DRIVER", "Denoise"]


class Denoise:
    """One call of the graph ``network``.

    Settings:
        shape: (C, H, W) of an image.

    Inputs:
        image: (B, C, H, W), float in [0, 1] with noise, or uint8.

    Outputs:
        image: (B, C, H, W) float32 in [0, 1].
    """

    def __init__(
        self, graphs: Mapping[str, Run], settings: Mapping[str, Any], assets: Mapping[str, Array | str]
    ) -> None:
        self.network = graphs["network"]
        port = Port("image", "image", ("batch", *settings["shape"]), "float32")
        self.inputs, self.outputs = (port,), (port,)

    def __call__(self, inputs: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
        image = np.asarray(inputs["image"])
        pixels = image / np.float32(255) if image.dtype == np.uint8 else image.astype(np.float32)
        return {"image": np.clip(self.network({"image": pixels})["clean"].astype(np.float32), 0, 1)}


DRIVER = Denoise
