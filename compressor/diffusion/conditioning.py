"""Conditions by row: the tables that turn a label (or prompt number) into what a diffusion model reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.data.dataset import DataInfo
from compressor.errors import RequestError
from compressor.models.anatomy.diffusion_nets import DiffusionNet
from compressor.runtimes.runtime import Array

__all__ = ["ConditionTable", "condition_table"]


@dataclass(frozen=True)
class ConditionTable:
    """Condition fields by name, each (K, ...): row r is the condition of label r.

    Attributes:
        null_row: Row of the empty condition, if there is one.
    """

    fields: Mapping[str, Array]
    null_row: int | None

    @property
    def rows(self) -> int:
        """Number of rows; 1 of a model without conditions."""
        return min((len(table) for table in self.fields.values()), default=1)

    def __call__(self, rows: Tensor) -> dict[str, Tensor]:
        """The conditions of a batch of rows (B,)."""
        index = rows.cpu().numpy()
        return {name: torch.from_numpy(table[index]).to(rows.device) for name, table in self.fields.items()}

    def assets(self) -> dict[str, Array]:
        """The tables as the sampler's assets."""
        return {f"condition.{name}": table for name, table in self.fields.items()}


def condition_table(net: DiffusionNet, info: DataInfo, *, text_tokens: int = 2, seed: int = 0) -> ConditionTable:
    """The table for a model and a data set.

    Latents bring their own tables. For a labelled set, a class-conditional model gets the class numbers, a
    text-conditional one a fixed random vector a class and token (unit variance), and zeros for the empty prompt. The
    last class number that a model knows beyond the set's is its empty condition.

    Raises:
        RequestError: The data and the model do not fit.
    """
    wanted = net.condition_fields()
    own = info.extra.get("conditions")
    if own:
        return ConditionTable(_check_own(own, net, info), info.extra.get("null_row"))
    if not info.classes:
        raise RequestError(f"the set {info.name!r} has neither classes nor condition tables for {net.library_class}")
    count = len(info.classes)
    rng = np.random.default_rng(seed)
    fields: dict[str, Array] = {}
    guidable = True
    for name, field in wanted.items():
        if field.optional:
            continue
        if field.embeddings is not None:
            if field.embeddings < count:
                raise RequestError(f"the model knows {field.embeddings} classes, the set {info.name!r} has {count}")
            spare = field.embeddings > count
            guidable = guidable and spare
            fields[name] = np.append(np.arange(count), field.embeddings - 1) if spare else np.arange(count)
        elif field.constant is not None:
            fields[name] = np.tile(np.asarray(field.constant, np.float32), (count + 1, 1))
        else:
            shape = tuple(text_tokens if size == "tokens" else int(size) for size in field.shape)
            rows = rng.standard_normal((count, *shape)).astype(np.float32)
            fields[name] = np.concatenate([rows, np.zeros((1, *shape), np.float32)])
    if not (fields and guidable):  # no conditions, or a class for each embedding: no row is the empty one
        return ConditionTable({name: table[:count] for name, table in fields.items()}, None)
    return ConditionTable(fields, count)


def _check_own(own: Mapping[str, Array], net: DiffusionNet, info: DataInfo) -> dict[str, Array]:
    fields: dict[str, Array] = {}
    for name, field in net.condition_fields().items():
        if name not in own:
            if field.optional:
                continue
            if field.constant is not None:
                rows = min((len(table) for table in own.values()), default=1)
                fields[name] = np.tile(np.asarray(field.constant, np.float32), (rows, 1))
                continue
            raise RequestError(f"{net.library_class} takes the condition `{name}`, which the set {info.name!r} lacks")
        table = np.asarray(own[name])
        wanted = tuple(size for size in field.shape if size != "tokens")
        if field.shape and (table.ndim != len(field.shape) + 1 or table.shape[table.ndim - len(wanted) :] != wanted):
            raise RequestError(
                f"`{name}` of the set {info.name!r} has rows of shape {table.shape[1:]}, the model takes {field.shape}"
            )
        fields[name] = table.astype(np.int64 if field.integer else np.float32)
    return fields
