"""Sparsity: zero the smallest weights by a pattern, then fine-tune with the zeros held (built in; ``--sparsity``).

The layers between the first and the last get a mask by magnitude: N of M (2:4 is the pattern of sparse tensor cores), a
share, or whole blocks. The other weights then learn to say what the model said before: a classifier's logits on the
data, a diffusion model's prediction on noised data, a few-step generator's prediction on inputs that it made itself.

Trained: the model that the chain hands on, or a copy of the teacher. Exported: the same graphs, with zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from compressor.data.stream import Batch, Stream
from compressor.deployable import Deployable
from compressor.diffusion.denoiser import Denoiser
from compressor.diffusion.noised_data import NoisedData
from compressor.diffusion.rollout import backward_simulation
from compressor.errors import RequestError
from compressor.losses.precision import at_least_float32
from compressor.method import Context, MethodConfig, Needs, Paper
from compressor.models.edits.sparsity import fits_pattern, folded, masked_weights, weights_of
from compressor.models.edits.weights import Weight
from compressor.models.model import Model
from compressor.recipe import parse_sparsity
from compressor.training.phase import Phases, Step, Train, Update
from compressor.training.training_config import TrainingConfig, make_optim, make_stream

__all__ = ["METHOD", "Sparsity", "SparsityConfig", "dense_layers", "describe", "layers_called", "relative_error"]


class SparsityConfig(TrainingConfig):
    """Configuration of the sparsification."""

    pattern: Annotated[str, BeforeValidator(parse_sparsity)] = "2:4"
    """What is zeroed: N:M (2:4), a share (0.8) or block:ROWSxCOLUMNS:SHARE (block:32x32:0.8); what --sparsity gives."""
    exclude: tuple[str, ...] = ()
    """Layers that stay dense beside the first and the last: names as the model has them, with * for any letters."""
    min_weights: int = Field(256, ge=1)
    """Layers of fewer weights stay dense."""
    data_weight: float = Field(0.0, ge=0)
    """Weight of the data's own loss (labels, or the noise's target) beside the match with the dense model."""
    steps: int = Field(300, ge=0)
    """Fine-tuning steps; 0 leaves the masked weights as they are."""
    lr: float = Field(1e-3, gt=0)
    """Highest learning rate."""


def relative_error(guesses: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """``sum |a - b|^2 / sum |b|^2`` of every pair of tensors, mean over the pairs; a scalar, float32 or wider.

    Args:
        guesses: Float tensors of any shapes.
        wanted: As many, of the same shapes; they get no gradient.
    """
    pairs = [(at_least_float32(a), at_least_float32(b.detach())) for a, b in zip(guesses, wanted, strict=True)]
    errors = [(a - b).square().sum() / b.square().sum().clamp(min=1e-12) for a, b in pairs]
    return torch.stack(errors).mean()


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


class Sparsity:
    """The method; see the module's docstring."""

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

    def __init__(self, config: SparsityConfig) -> None:
        self.config = config
        self.notes: list[str] = []
        self._student: Model | None = None

    def phases(self, ctx: Context) -> Phases:
        """Mask, then one fine-tuning against the model as it came."""
        given = _given(ctx)
        given.module.eval()
        before = given.copy()
        before.module.requires_grad_(False)
        self._student, dense = self._mask(ctx, given)
        self.notes = describe(self._student, self.config.pattern, dense)
        generates = ctx.task.name == "image-generation"
        stream, step = (self._predictions if generates else self._outputs)(ctx, self._student, before)
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

    def student(self) -> Model:
        """The sparse model; its masks hold in whatever trains it next."""
        if self._student is None:
            raise RuntimeError("the phases have not run")
        return self._student

    def deployables(self, ctx: Context) -> dict[str, Deployable]:
        """The model as it was exported before, with zeros among its weights."""
        return {"student": ctx.task.deployable(self.student())}

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

    # -- what the dense model says, and on what it is asked --

    def _outputs(self, ctx: Context, student: Model, dense: Model) -> tuple[Stream, Step]:
        """A supervised task's model: all that it returns on a batch of the data."""
        loss = getattr(ctx.task, "loss", None)
        if loss is None:
            raise RequestError(f"sparsity cannot fine-tune for the task {ctx.task.name!r}, which has no loss")

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            batch = batches["train"]
            with torch.no_grad():
                wanted = outputs_of(dense.module, lambda: loss(dense, batch))[1]
            supervised, guesses = outputs_of(student.module, lambda: loss(student, batch))
            # some networks return more in training, auxiliary logits for one, behind what they return in use
            losses = {"match": relative_error(guesses[: len(wanted)], wanted)}
            if self.config.data_weight:
                losses |= {name: self.config.data_weight * value for name, value in supervised.items()}
            yield Update("student", losses)

        return make_stream(ctx, self.config), step

    def _predictions(self, ctx: Context, student: Model, dense: Model) -> tuple[Stream, Step]:
        """A diffusion model's prediction: on noised data, or on what its own few steps feed it."""
        config, sparse, before = self.config, Denoiser(student), Denoiser(dense)
        if config.augment != "auto" or config.views is not None or config.data_seed is not None:
            raise RequestError("sparsity: augment, views and data_seed mean nothing for diffusion; leave them out")
        places = student.info.extra.get("student_timesteps")
        if places and config.data_weight:
            raise RequestError("sparsity: a few-step generator has no target in the data; set data_weight to 0")
        data = NoisedData(ctx, before)

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            noised, level, target, condition = data.sample(batches["train"], i)
            if places:
                noised, level = own_inputs(ctx, sparse, places, noised, condition, i)
            with torch.no_grad():
                wanted = before(noised, level, condition)
            guess = sparse(noised, level, condition)
            losses = {"match": relative_error([guess], [wanted])}
            if config.data_weight:
                losses["data"] = config.data_weight * (guess[:, : sparse.channels] - target).square().mean()
            yield Update("student", losses)

        return data.stream(config.batch), step


def own_inputs(
    ctx: Context, generator: Denoiser, places: Sequence[int], like: Tensor, condition: Mapping[str, Tensor], i: int
) -> tuple[Tensor, Tensor]:
    """What a few-step generator meets at its calls, one drawn for every sample: ``(noised, level)``.

    Args:
        ctx: Gives noise and the calls.
        generator: Rolls out from pure noise.
        places: Training levels of its calls, the noisiest first.
        like: (B, C, H, W), a batch of the same shape and device.
        condition: Condition fields (B, ...).
        i: The step.
    """
    levels = generator.schedule.sampling_level(torch.tensor(places)).to(like.device)
    calls = torch.floor(ctx.uniform(i, len(like), "call") * len(places)).long().to(like.device)
    return backward_simulation(
        generator, levels, calls, condition, lambda number: ctx.normal(i, like.shape, f"call-{number}").to(like.device)
    )


def outputs_of(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What ``run`` returns, and the float tensors that the module returned meanwhile, call by call.

    Raises:
        RequestError: It returned none.
    """
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        result = run()
    finally:
        handle.remove()
    tensors = list(_float_tensors(seen))
    if not tensors:
        raise RequestError(f"the task's loss gets no outputs of the {type(module).__name__} that could be matched")
    return result, tensors


def _float_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _float_tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _float_tensors(part)


def _given(ctx: Context) -> Model:
    """The chain's model, or a copy of the only teacher."""
    try:
        return ctx.student()
    except RequestError:
        return ctx.student(like=ctx.teacher())


METHOD = Sparsity
