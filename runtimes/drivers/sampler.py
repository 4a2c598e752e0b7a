"""The sampler loop of diffusion models, in numpy: noise, the denoiser's steps, guidance.

Graph ``denoiser``: inputs ``sample`` (B, C, H, W), ``timestep`` (B,) and the condition fields; output ``prediction``
(B, C, H, W). Assets: the schedule (``timesteps`` and ``levels`` or ``signal``) and one table per condition field,
``condition.FIELD`` (K, ...), whose rows are the conditions; the last row may be the empty condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compressor.errors import RequestError
from compressor.runtimes.runtime import Array, Port, Run

__all__ = ["DRIVER", "Sampler"]


class Sampler:
    """Draws samples for condition rows.

    Settings:
        rule: ``euler`` (rectified flow), ``ddim`` (deterministic DDPM) or ``renoise`` (few-step students: estimate the
            clean sample, noise it again to the next level).
        prediction_type: What the network predicts: ``flow``, ``epsilon``, ``v_prediction`` or ``sample``.
        shape: (C, H, W) of a sample.
        guidance_scale: Classifier-free guidance; 1 means none (one call a step).
        null_row: Row of the empty condition, needed for guidance.
        initial_scale: Standard deviation of the first noise.
        clip: Limit of the absolute value of the final sample, or None.
        labels: Names of the first condition rows, for apps.

    Inputs:
        label: (B,) integer rows of the condition tables. Instead of it, the condition fields themselves may be given.
        noise: (B, C, H, W), optional: the first noise; drawn from the seed otherwise.

    Outputs:
        image: (B, C, H, W) float32.

    Raises:
        RequestError: Rows out of range, missing condition fields, or guidance without an empty condition.
    """

    def __init__(
        self, graphs: Mapping[str, Run], settings: Mapping[str, Any], assets: Mapping[str, Array | str]
    ) -> None:
        self.denoiser = graphs["denoiser"]
        self.settings = dict(settings)
        self.shape = tuple(int(size) for size in settings["shape"])
        arrays = {name: value for name, value in assets.items() if isinstance(value, np.ndarray)}
        self.tables = {n.removeprefix("condition."): v for n, v in arrays.items() if n.startswith("condition.")}
        self.timesteps = arrays["timesteps"]
        # amplitudes of signal and noise before every step, and behind the last
        if "levels" in arrays:
            self.sigma = arrays["levels"].astype(np.float64)
            self.signal = 1 - self.sigma
        else:
            kept = arrays["signal"].astype(np.float64)
            self.signal, self.sigma = kept**0.5, (1 - kept) ** 0.5
        self.guidance = float(settings.get("guidance_scale", 1.0))
        self.inputs = (Port("label", "label", ("batch",), "int64"),)
        limit = settings.get("clip")
        pixels = None if limit is None else (-float(limit), float(limit))
        self.outputs = (Port("image", "image", ("batch", *self.shape), "float32", value_range=pixels),)

    def __call__(self, inputs: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
        condition, empty = self._conditions(inputs)
        batch = len(next(iter(condition.values()), inputs.get("label", inputs.get("noise", ()))))
        rng = np.random.default_rng(seed)
        sample = inputs.get("noise")
        if sample is None:
            sample = rng.standard_normal((batch, *self.shape)).astype(np.float32)
        sample = np.asarray(sample, np.float32) * np.float32(self.settings.get("initial_scale", 1.0))
        for step in range(len(self.timesteps)):
            prediction = self._predict(sample, step, condition, empty)
            sample = self._advance(sample, prediction, step, rng)
        limit = self.settings.get("clip")
        if limit is not None:
            sample = np.clip(sample, -limit, limit)
        return {"image": sample.astype(np.float32)}

    def _conditions(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """The condition of every sample, and the empty one where guidance needs it."""
        if "label" in inputs:
            rows = np.asarray(inputs["label"]).reshape(-1)
            # a model without conditions takes any rows: they say how many samples are asked for
            count = min((len(table) for table in self.tables.values()), default=int(rows.max(initial=0)) + 1)
            if rows.size and (rows.min() < 0 or rows.max() >= count):
                raise RequestError(f"condition rows must lie in [0, {count}), got {rows.min()} to {rows.max()}")
            condition = {name: table[rows] for name, table in self.tables.items()}
        else:
            if any(name not in inputs for name in self.tables):
                raise RequestError(f"give `label` rows or the condition fields {', '.join(self.tables)}")
            condition = {name: np.asarray(inputs[name]) for name in self.tables}
        if self.guidance == 1.0:
            return condition, {}
        row = self.settings.get("null_row")
        if row is None:
            raise RequestError("guidance needs the empty condition: the model was exported without one")
        empty = {name: table[row][None] for name, table in self.tables.items()}
        return condition, {name: np.repeat(value, len(condition[name]), 0) for name, value in empty.items()}

    def _predict(self, sample: Array, step: int, condition: Mapping[str, Array], empty: Mapping[str, Array]) -> Array:
        timestep = np.full(len(sample), self.timesteps[step], self.timesteps.dtype)
        if self.timesteps.dtype.kind == "f":
            timestep = timestep.astype(np.float32)
        guess = self.denoiser({"sample": sample, "timestep": timestep, **condition})["prediction"].astype(np.float32)
        if not empty:
            return guess
        base = self.denoiser({"sample": sample, "timestep": timestep, **empty})["prediction"].astype(np.float32)
        return base + np.float32(self.guidance) * (guess - base)

    def _advance(self, sample: Array, prediction: Array, step: int, rng: np.random.Generator) -> Array:
        rule = self.settings["rule"]
        if rule == "euler":
            return sample + np.float32(self.sigma[step + 1] - self.sigma[step]) * prediction
        clean, noise = self._split(sample, prediction, self.signal[step], self.sigma[step])
        if rule == "renoise" and step + 1 < len(self.timesteps):
            noise = np.asarray(rng.standard_normal(sample.shape))
        return np.asarray(self.signal[step + 1] * clean + self.sigma[step + 1] * noise, np.float32)

    def _split(self, sample: Array, prediction: Array, signal: float, sigma: float) -> tuple[Array, Array]:
        """Clean sample and noise that a prediction implies, in float64: the signal is small at the noisy end."""
        wide: Array = sample.astype(np.float64)
        guess: Array = prediction.astype(np.float64)
        kind = self.settings.get("prediction_type", "flow")
        if kind == "flow":
            return wide - sigma * guess, wide + signal * guess
        if kind == "epsilon":
            return (wide - sigma * guess) / signal, guess
        if kind == "v_prediction":
            return signal * wide - sigma * guess, sigma * wide + signal * guess
        return guess, (wide - signal * guess) / sigma


DRIVER = Sampler
