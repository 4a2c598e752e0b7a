"""Latents and text embeddings that the user computed once: what distilling one's own diffusion transformer reads.

A directory with ``train.safetensors`` and, optionally, ``val.safetensors`` and ``test.safetensors`` (otherwise 10 % and
20 % of the samples are held out). Tensors:

- ``latents`` (N, C, H, W) float: the data, scaled as the model expects them;
- ``label`` (N,) integer, optional: the row of the condition tables (default: sample i has row i);
- condition tables (K, ...): ``encoder_hidden_states`` (K, T, D), ``pooled_projections`` (K, P),
  ``encoder_attention_mask`` (K, T), ``class_labels`` (K,), ``time_ids`` (K, 6) of SDXL; they may stand in
  ``train.safetensors`` alone.

The file's metadata may name ``null_row``: the row of the empty prompt, for guidance.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from compressor.data.dataset import ArrayDataset, DataInfo
from compressor.data.digits import SHARES
from compressor.errors import RequestError

__all__ = ["CONDITION_FIELDS", "latents"]

CONDITION_FIELDS = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "class_labels", "time_ids")


def latents(directory: Path, split: str = "train") -> ArrayDataset:
    """One split of a directory of latents (see above): samples with ``image`` (C, H, W) float32 and ``label``.

    Raises:
        RequestError: A file is missing, damaged or inconsistent.
    """
    directory = Path(directory)
    train, facts = _read(directory / "train.safetensors")
    own = directory / f"{split}.safetensors"
    held_out = not own.exists() and split != "train"
    arrays = _read(own)[0] if split != "train" and not held_out else train
    fields = _samples(arrays, own if own.exists() else directory / "train.safetensors")
    count = len(fields["image"])
    if held_out or (split == "train" and not (directory / "test.safetensors").exists()):
        if count < 10:
            raise RequestError(f"{directory} has {count} samples: give at least 10, or val and test files of their own")
        first, last = (round(share * count) for share in SHARES[split])
        chosen = np.random.default_rng(0).permutation(count)[first:last]
        fields = {name: values[chosen] for name, values in fields.items()}
    tables = {name: train[name] for name in CONDITION_FIELDS if name in train}
    rows = {len(table) for table in tables.values()}
    if len(rows) > 1 or (rows and fields["label"].max(initial=0) >= min(rows)):
        raise RequestError(
            f"{directory}: the condition tables have {sorted(rows)} rows and labels up to "
            f"{fields['label'].max()}; every label needs a row in each"
        )
    key = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in (*fields.values(), *tables.values())))
    extra = {"conditions": tables, "null_row": int(facts["null_row"]) if "null_row" in facts else None}
    info = DataInfo(f"{directory.name}/{split}", key.hexdigest()[:16], (), fields["image"].shape[1:], None, extra)
    return ArrayDataset(info, fields)


def _read(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise RequestError(f"{path.parent} holds no {path.name}: a latents directory needs it (see docs/data.md)")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path} is damaged or no safetensors file: {error}") from error


def _samples(arrays: dict[str, np.ndarray[Any, Any]], path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if "latents" not in arrays or arrays["latents"].ndim != 4:
        raise RequestError(f"{path} needs a tensor `latents` of shape (N, C, H, W)")
    images = arrays["latents"].astype(np.float32)
    labels = arrays.get("label", np.arange(len(images))).astype(np.int64).reshape(-1)
    if len(labels) != len(images):
        raise RequestError(f"{path} has {len(images)} latents and {len(labels)} labels")
    if not np.isfinite(images).all():
        raise RequestError(f"{path}: `latents` holds NaN or infinity")
    return {"image": images, "label": labels}
