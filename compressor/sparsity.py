"""Sparsity: zero the smallest weights by a pattern, then fine-tune with the zeros held (built in; ``--sparsity``).

The layers between the first and the last get a mask by magnitude: N of M (2:4 is the pattern of sparse tensor cores), a
share, or whole blocks. The other weights then learn to say what the model said before: a classifier's logits on the
data, a diffusion model's prediction on noised data, a few-step generator's prediction on inputs that it made itself.

Trained: the model that the chain hands on, or a copy of the teacher. Exported: the same graphs, with zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, Field
from torch import nn

from compressor.errors import RequestError
from compressor.method import Context, MethodConfig, Needs, OneStudent, Paper
from compressor.models.edits.sparsity import fits_pattern, folded, masked_weights, weights_of
from compressor.models.edits.weights import Weight
from compressor.models.model import Model
from compressor.recipe import parse_sparsity
from compressor.training.phase import Phases, Train
from compressor.training.self_distillation import SelfDistillationConfig, fine_tuning, given_model
from compressor.training.training_config import make_optim

__all__ = ["METHOD", "Sparsity", "SparsityConfig", "dense_layers", "describe", "layers_called"]


class SparsityConfig(SelfDistillationConfig):
    """Configuration of the sparsification."""

    pattern: Annotated[str, BeforeValidator(parse_sparsity)] = "2:4"
    """What is zeroed: N:M (2:4), a share (0.8) or block:ROWSxCOLUMNS:SHARE (block:32x32:0.8); what --sparsity gives."""
    exclude: tuple[str, ...] = ()
    """Layers that stay dense beside the first and the last: names as the model has them, with * for any letters."""
    min_weights: int = Field(256, ge=1)
    """Layers of fewer weights stay dense."""


# --- which layers ----------------------------------------------------------------------------------------------------


def layers_called(module: nn.Module, run: Callable[[], object]) -> list[str]:
    """Names of the layers with weights of `weights_of`, in the order in which ``run`` first calls them."""
    called: dict[str, None] = {}
    layers = {weight.layer: weight.owner for weight in weights_of(module)}
    handles = [
        layer.register_forward_pre_hook(lambda _module, _inputs, name=name: called.setdefault(name))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return list(called)


def dense_layers(
    weights: Sequence[Weight], order: Sequence[str], pattern: str, exclude: Sequence[str] = (), min_weights: int = 1
) -> dict[str, str]:
    """The weights that stay dense, with the reason.

    Args:
        weights: All that could be sparse.
        order: Layers in the order of their calls; the first and the last stay dense.
        pattern: Of the sparsity.
        exclude: Layer names with ``*`` for any letters.
        min_weights: Smaller ones stay dense.

    Raises:
        RequestError: An excluded name is no layer's.
    """
    layers = [weight.layer for weight in weights]
    for name in exclude:
        if not any(fnmatchcase(layer, name) for layer in layers):
            raise RequestError(
                f"exclude: no layer is called {name!r}; layers are called like {layers[len(layers) // 2]}"
            )
    dense = {}
    for weight in weights:
        shape = tuple(weight.value.shape)
        if weight.layer in order[:1]:
            dense[weight.name] = "the first layer"
        elif weight.layer in order[-1:]:
            dense[weight.name] = "the last layer"
        elif any(fnmatchcase(weight.layer, name) for name in exclude):
            dense[weight.name] = "excluded"
        elif weight.value.numel() < min_weights:
            dense[weight.name] = f"fewer than {min_weights} weights"
        elif not fits_pattern(shape, pattern):
            dense[weight.name] = f"{shape[0]} outputs and {shape[1]} inputs do not divide into {pattern}"
    return dense


def describe(model: Model, pattern: str, dense: Mapping[str, str]) -> list[str]:
    """What is sparse and what is not, in lines for a report; the shares are counted in the weights themselves."""
    shares: dict[str, list[str]] = {}
    zeros, weights = 0, 0
    with torch.no_grad():
        for weight in masked_weights(model.module):
            value = weight.value
            missing = int((value == 0).sum())
            zeros, weights = zeros + missing, weights + value.numel()
            shares.setdefault(f"{100 * missing / value.numel():.1f} %", []).append(weight.layer)
    total = sum(parameter.numel() for parameter in model.module.parameters())
    lines = [
        f"sparsity {pattern}: {zeros:,} of {weights:,} weights in {sum(map(len, shares.values()))} layers are zero "
        f"({100 * zeros / max(weights, 1):.1f} %), which is {100 * zeros / total:.1f} % of all {total:,} parameters"
    ]
    lines += [f"sparsity: {share} of {_grouped(names)}" for share, names in sorted(shares.items())]
    reasons: dict[str, list[str]] = {}
    for name, reason in dense.items():
        reasons.setdefault(reason, []).append(name.rpartition(".")[0])
    return lines + [f"sparsity: dense ({reason}): {_grouped(names)}" for reason, names in reasons.items()]


def _grouped(names: Sequence[str]) -> str:
    """Layers whose names differ in numbers alone as one: "blocks.*.fc1 (12)"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    return ", ".join(same[0] if len(same) == 1 else f"{group} ({len(same)})" for group, same in groups.items())


# --- the method ------------------------------------------------------------------------------------------------------


class Sparsity(OneStudent[SparsityConfig]):
    """The method; see the module's docstring. The student's masks hold in whatever trains it next."""

    name: ClassVar[str] = "sparsity"
    paper: ClassVar[Paper] = Paper(
        "Accelerating Sparse Deep Neural Networks",
        "Mishra, Albericio Latorre, Pool, Stosic, Stosic, Venkatesh, Yu, Micikevicius",
        "arXiv 2021",
        "https://arxiv.org/abs/2104.08378",
    )
    idea: ClassVar[str] = "Zero the smallest weights by a pattern, and fine-tune the others with the zeros held."
    needs: ClassVar[Needs] = Needs(
        tasks=("image-generation", "classification", "segmentation"),
        teachers={"teacher": "any"},
        students={"student": "copy"},
        data={"train": frozenset({"image"})},
    )
    Config: ClassVar[type[MethodConfig]] = SparsityConfig
    default_recipe: ClassVar[Mapping[str, Any]] = {
        "teachers": {"teacher": "demo:digits-mmdit"},
        "data": {"train": "digits"},
    }

    def phases(self, ctx: Context) -> Phases:
        """Mask, then one fine-tuning against the model as it came."""
        given = given_model(ctx)
        given.module.eval()
        before = given.copy()
        before.module.requires_grad_(False)
        self._student, dense = self._mask(ctx, given)
        self.notes = describe(self._student, self.config.pattern, dense)
        generates = ctx.task.name == "image-generation"
        stream, step = fine_tuning(ctx, self.config, self._student, before, self.name)
        key = [change.arguments for change in self._student.info.edits if change.name == "sparsity.mask"]
        yield Train(
            "distil",
            self.config.steps,
            {"student": make_optim(self.config, [self._student.module])},
            {"train": stream},
            step,
            {"student": self._student.module},
            # in training mode some diffusion classes drop labels at random, which nobody asked for
            modes=[(self._student.module, "eval" if generates else "train"), (before.module, "eval")],
            key=key,
        )

    def _mask(self, ctx: Context, model: Model) -> tuple[Model, dict[str, str]]:
        """The masked model, and which weights stay dense for what reason."""
        config, plain = self.config, folded(model)
        graphs = ctx.task.deployable(plain).graphs.values()
        order = layers_called(plain.module, lambda: [graph.module.eval()(**graph.inputs) for graph in graphs])
        weights = list(weights_of(model.module))
        dense = dense_layers(weights, order, config.pattern, config.exclude, config.min_weights)
        chosen = [weight.name for weight in weights if weight.name not in dense]
        if not chosen:
            raise RequestError(f"sparsity {config.pattern}: no layer can be sparse; lower min_weights, or try a share")
        return model.edit("sparsity.mask", pattern=config.pattern, weights=chosen), dense


METHOD = Sparsity
