"""PPCL: pluggable pruning with contiguous layer distillation for diffusion transformers (Ma et al., CVPR 2026).

Redundancy in a deep diffusion transformer comes in runs of neighbouring blocks. Linear probes, chained, show by the
fall of their CKA where a run ends; every run is replaced by one block that reads the *teacher's* state before the run
and imitates the teacher's state behind it. No replacement reads another, so any subset of them is a working model.

Trained: one block a run (independently), optionally linear maps in place of text streams and feed-forwards, then the
whole assembled network briefly. Exported: its denoiser, with the sampler around it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.diffusion.denoiser import Denoiser
from compressor.diffusion.noised_data import NoisedData, walk
from compressor.diffusion.student_attention import AttentionConfig, with_attention
from compressor.errors import RequestError
from compressor.kernels import feature_distance
from compressor.method import Context, MethodConfig, Needs, OneStudent, Paper
from compressor.models.anatomy.blocks import Anchor, OwnBlock, State, block_stack
from compressor.models.edits.blocks import can_prune_ffn, can_prune_text
from compressor.models.edits.layout import (
    Slot,
    layout_key,
    mark_text_runs,
    parameters_of,
    parameters_of_layout,
    slots_of,
)
from compressor.models.edits.linear_maps import (
    ffn_errors,
    fit_maps,
    map_modules,
    map_pairs,
    set_maps,
    text_token_similarity,
    with_anchors,
)
from compressor.models.linear_fit import LeastSquares
from compressor.models.model import Model
from compressor.training.curves import cosine
from compressor.training.phase import Compute, Optim, Phases, Train, Update

__all__ = [
    "METHOD",
    "PPCL",
    "PPCLConfig",
    "chain_cka",
    "choose_text_runs",
    "find_redundant_intervals",
    "fit_linear_probe",
    "linear_cka",
    "normalized_alignment_loss",
]


# --- Stage 1.1: linear probes ----------------------------------------------------------------------------------------


def fit_linear_probe(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the residual affine map of one block in closed form (paper eq. 1, with a bias).

    Args:
        inputs: (..., d) what enters the block; leading axes are flattened.
        outputs: (..., d) what leaves it.

    Returns:
        ``(weight (d, d), bias (d,))`` with ``inputs + inputs @ weight.T + bias ~ outputs``; the minimum-norm solution
        where the inputs are rank-deficient. Solved in float64, returned in the inputs' dtype.
    """
    width = inputs.shape[-1]
    # gelsd gives the minimum-norm solution and exists on the CPU alone
    x = inputs.detach().reshape(-1, width).double().cpu()
    y = outputs.detach().reshape(-1, width).double().cpu()
    design = torch.cat([x, x.new_ones(len(x), 1)], 1)
    solution = torch.linalg.lstsq(design, y - x, driver="gelsd").solution.to(inputs)
    return solution[:-1].T.contiguous(), solution[-1].contiguous()


# --- Stage 1.2: contiguous intervals ---------------------------------------------------------------------------------


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment ``||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` (paper eq. 3).

    Args:
        x: (..., d1); leading axes are flattened to n rows.
        y: (..., d2) with as many rows.

    Returns:
        A float32 scalar in [0, 1], computed in float64; 0 where a side has no variance.
    """
    a, b = (side.detach().reshape(-1, side.shape[-1]).double() for side in (x, y))
    a, b = a - a.mean(0), b - b.mean(0)
    scale = (a.T @ a).norm() * (b.T @ b).norm()
    if scale <= 0:
        return torch.zeros((), device=x.device)
    return ((a.T @ b).square().sum() / scale).clamp(0, 1).float()


def chain_cka(
    states: Sequence[Tensor], probes: Sequence[tuple[Tensor, Tensor]], *, reference: Literal["block", "start"] = "block"
) -> Tensor:
    """``cka[u, k]``: blocks u+1..k replaced by their probes, against the teacher (paper eq. 3).

    Args:
        states: Outputs of the L blocks, each (n, N, d), on samples that the probes were not fitted on.
        probes: (weight, bias) of each block.
        reference: Compare ``Z(u, k)`` with the output of block k, or of block u as eq. 3 is printed.

    Returns:
        (L, L) float32; ones on the diagonal, zeros below it.
    """
    count = len(states)
    cka = torch.eye(count)
    for u in range(count):
        z = states[u]
        for k in range(u + 1, count):
            weight, bias = probes[k]
            z = z + z @ weight.T + bias
            cka[u, k] = linear_cka(states[k] if reference == "block" else states[u], z)
    return cka


def find_redundant_intervals(
    cka: Tensor, start: int = 0, end: int | None = None, min_similarity: float | None = None
) -> Tensor:
    """Cut the stack into redundant runs where the fall of the CKA accelerates (paper eqs. 4 and 5).

    Args:
        cka: (L, L); ``cka[u, k]`` for k >= u is read.
        start: First block that may belong to a run.
        end: Last such block, inclusive; the last of all by default.
        min_similarity: Drop a run [u, v] with ``cka[u, v]`` below it, keep block u and search on from u + 1.

    Returns:
        (n, 2) int64 rows [u, v], inclusive, ascending; every run has at least two blocks.
    """
    values = cka.double()
    last = len(cka) - 1 if end is None else end
    runs: list[list[int]] = []
    u = start
    while u < last:
        drops = -(values[u, u + 1 : last + 1] - values[u, u:last])  # drops[j] belongs to block u + 1 + j
        grows = (drops[1:] > drops[:-1]).nonzero().flatten()
        v = u + 1 + int(grows[0]) if len(grows) else last
        if min_similarity is not None and values[u, v] < min_similarity:
            u += 1
            continue
        runs.append([u, v])
        u = v + 1
    return torch.tensor(runs, dtype=torch.long).reshape(-1, 2)


# --- Stage 1.3: depth distillation -----------------------------------------------------------------------------------


def normalized_alignment_loss(student: Tensor, teacher: Tensor, kind: str = "l2") -> Tensor:
    """Distance of directions: ``mean over tokens of || s/||s|| - t/||t|| ||``, squared or absolute.

    Args:
        student: (..., d).
        teacher: (..., d); detached.
        kind: "l2" sums squared differences over d (it is 2 - 2 cos), "l1" absolute ones.

    Returns:
        A float32 scalar. Magnitudes are free by design.
    """
    if kind == "l2":
        return feature_distance(student, teacher, "normalized_mse", dim=-1)
    s, t = student.float(), teacher.detach().float()
    difference = s / s.norm(dim=-1, keepdim=True) - t / t.norm(dim=-1, keepdim=True)
    return difference.abs().sum(-1).mean()


def align(student: State, teacher: State) -> Tensor:
    """Alignment of both streams, weight 1 each; padded text tokens are left out."""
    loss = normalized_alignment_loss(student.image, teacher.image)
    if student.text is not None and teacher.text is not None:
        mask = teacher.context.get("encoder_hidden_states_mask")
        keep = slice(None) if mask is None else mask
        loss = loss + normalized_alignment_loss(student.text[keep], teacher.text[keep])
    return loss


# --- Stage 2: width --------------------------------------------------------------------------------------------------


def choose_text_runs(similarity: Tensor, allowed: Sequence[bool], threshold: float) -> list[tuple[int, int]]:
    """Runs of slots [a, b] whose text tokens all resemble the anchor's: ``similarity[a, j] >= threshold``.

    Args:
        similarity: (S, S) CKA of text tokens between slots.
        allowed: Whether a slot has a text stream that can be pruned.
        threshold: In [0, 1].

    Returns:
        Disjoint runs, longest first.
    """
    runs = []
    for a in range(len(allowed)):
        b = a
        while b + 1 < len(allowed) and allowed[a] and allowed[b + 1] and similarity[a, b + 1] >= threshold:
            b += 1
        if b > a:
            runs.append((a, b))
    chosen: list[tuple[int, int]] = []
    for a, b in sorted(runs, key=lambda run: (run[0] - run[1], run[0])):
        if all(b < c or a > d for c, d in chosen):
            chosen.append((a, b))
    return chosen


# --- The method ------------------------------------------------------------------------------------------------------


class Stage(MethodConfig):
    """A stage of gradient steps."""

    steps: int = Field(ge=0)
    """Optimiser steps; 0 leaves the stage out."""
    lr: float = Field(gt=0)
    """Peak learning rate of AdamW; cosine decay after the warm-up."""
    batch: int = Field(64, ge=1)
    """Samples a step and process."""
    warmup: int = Field(16, ge=0)
    """Linear warm-up steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging coefficients."""
    weight_decay: float = Field(0.02, ge=0)
    """AdamW's decoupled weight decay."""


class PPCLConfig(AttentionConfig):
    """Configuration of PPCL."""

    keep: float = Field(0.5, gt=0, le=1)
    """Share of the teacher's block parameters that may remain; plugs are switched on, best first, until it is met."""
    active: list[int] | None = None
    """First blocks of the runs to switch on, instead of the choice by `keep`."""
    intervals: list[tuple[int, int]] | None = None
    """Runs [first, last] to replace, instead of the search by probes."""
    reference: Literal["block", "start"] = "block"
    """What a chain of probes is compared with: the output of its last block, or of the block it starts at (eq. 3)."""
    min_similarity: float | None = Field(None, ge=0, le=1)
    """Runs whose chained CKA is lower are left alone."""
    cka_streams: Literal["image", "both"] = "image"
    """Streams whose tokens are compared; "both" takes the mean of the two CKAs."""
    init: Literal["middle", "first"] = "middle"
    """Which block of a run its replacement starts as: "middle" (released code) or "first" (paper)."""
    rank: Literal["similarity", "error"] = "error"
    """Which runs are plugged first: the highest chained CKA, or the lowest alignment error after training."""
    ffn: int | list[int] | Literal["auto"] = 0
    """Feed-forwards to replace by linear maps: how many, which blocks, or "auto": what `keep` needs beyond depth."""
    text: list[tuple[int, int]] | None = None
    """Text runs [anchor, last] in teacher blocks, instead of the choice by `text_similarity`."""
    text_similarity: float | None = Field(None, gt=0, le=1)
    """CKA to the anchor from which on blocks lose their text stream; None leaves all text streams."""
    calibration: int = Field(1024, ge=64)
    """Samples for the closed-form fits, and as many others for CKA and held-out errors."""
    depth: Stage = Stage(steps=300, lr=5e-4)
    """Distillation of the replacements."""
    width: Stage = Stage(steps=0, lr=5e-4)
    """Training of the width-pruned blocks after their closed-form initialisation."""
    finetune: Stage = Stage(steps=300, lr=5e-4)
    """Fine-tuning of the assembled network."""


class PPCL(OneStudent[PPCLConfig]):
    """The method; see the module's docstring."""

    name: ClassVar[str] = "ppcl"
    paper: ClassVar[Paper] = Paper(
        "Pluggable Pruning with Contiguous Layer Distillation for Diffusion Transformers",
        "Ma, Peng, Zhu, Xie, Chen, Lu",
        "CVPR 2026",
        "https://arxiv.org/abs/2511.16156",
    )
    idea: ClassVar[str] = "Replace runs of redundant transformer blocks by single blocks, each a plug of its own."
    needs: ClassVar[Needs] = Needs(
        tasks=("image-generation",),
        teachers={"teacher": "one"},
        students={"student": "copy"},
        data={"train": frozenset({"image", "label"})},
        anatomy="blocks",
        first="its blocks are copies of the teacher's own",
    )
    Config: ClassVar[type[MethodConfig]] = PPCLConfig
    default_recipe: ClassVar[Mapping[str, Any]] = {
        "teachers": {"teacher": "demo:digits-mmdit"},
        "data": {"train": "digits"},
        "config": {"ffn": "auto", "text_similarity": 0.95},
    }
    free: ClassVar[frozenset[str]] = frozenset({"keep", "active", "ffn", "text", "text_similarity"})
    """Configuration keys that another student of the same training may change."""

    @staticmethod
    def without_training(config: Mapping[str, Any]) -> dict[str, Any]:
        """What to change so that a student of the same plugs needs no gradient step: it is no longer fine-tuned."""
        return {stage: {**config[stage], "steps": 0} for stage in ("width", "finetune")}

    def phases(self, ctx: Context) -> Phases:
        """Probe, cut, distil the plugs, survey, choose a layout, fit its maps, assemble, fine-tune."""
        task: Any = ctx.task
        config, teacher = self.config, Denoiser(ctx.teacher())
        self._data, self._teacher = NoisedData(ctx, teacher), teacher
        count = len(teacher.stack.blocks)
        scores: Mapping[str, Tensor] = {}
        if config.intervals is None:
            probes = yield Compute("probes", self._probe, key=config.calibration)
            key = [config.reference, config.cka_streams]
            scores = (yield Compute("cka", lambda: self._chain(probes or {}), key=key)) or {}
            # the first and the last block are never pruned
            runs = find_redundant_intervals(scores["cka"], 1, count - 2, config.min_similarity).tolist()
        else:
            runs = check_intervals(config.intervals, count)
        self._plugs = nn.ModuleDict({f"{u}-{v}": self._plug(u, v) for u, v in runs}).to(ctx.device)
        check_active(config.active or [], self._plugs)  # before any training
        if runs:
            yield self._depth()
        survey = (yield Compute("survey", self._survey, key=[config.ffn != 0, config.calibration])) or {}
        slots = self._layout(scores, survey)
        maps = (yield Compute("maps", lambda: self._fit_maps(slots), key=layout_key(slots))) or {}
        student = self._assemble(ctx.student(like=teacher.model), slots, maps)
        self._student = student = with_attention(student, config, task.info.shape)
        if config.width.steps and any(slot.narrow for slot in slots):
            yield self._train_width(Denoiser(student), slots)
        yield self._finetune(Denoiser(student), slots)

    # -- stage 1 --

    def _calibration(self, draw: int) -> Iterable[State]:
        """Teacher states: draw 0 to fit on, draw 1 to judge on."""
        return self._data.calibration(draw, self.config.calibration, self.config.depth.batch)

    @torch.no_grad()
    def _probe(self) -> dict[str, Tensor]:
        """One closed-form probe a block and stream, all from the same teacher passes."""
        fits: dict[str, LeastSquares] = {}
        for begun in self._calibration(0):
            states = list(walk(self._teacher.stack, begun))
            for k, (before, after) in enumerate(itertools.pairwise(states)):
                outputs = after.streams()
                for stream, inputs in before.streams().items():
                    if stream in outputs:
                        fits.setdefault(f"{stream}.{k}", LeastSquares()).add(inputs, outputs[stream])
        return _flat({name: fit.solve() for name, fit in fits.items()})

    @torch.no_grad()
    def _chain(self, probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CKA of chained probes on samples that no probe has seen."""
        fitted, stack = _pairs(probes), self._teacher.stack
        outputs: list[list[State]] = [[] for _ in stack.blocks]
        for begun in self._calibration(1):
            for layer, state in zip(outputs, list(walk(stack, begun))[1:], strict=True):
                layer.append(state)
        chains = []
        for stream in ("image", "text") if self.config.cka_streams == "both" else ("image",):
            # a last block may drop its text: the text's chain is then one block shorter, and that block is not pruned
            layers = [layer for layer in outputs if stream in layer[0].streams()]
            states = [torch.cat([state.streams()[stream] for state in layer]) for layer in layers]
            maps = [tuple(part.to(states[0]) for part in fitted[f"{stream}.{k}"]) for k in range(len(states))]
            if states:
                chain = chain_cka(states, maps, reference=self.config.reference)  # type: ignore[arg-type]
                chains.append(nn.functional.pad(chain, (0, len(outputs) - len(states)) * 2))
        return {"cka": torch.stack(chains).mean(0)}

    def _source(self, first: int, last: int) -> int:
        return first if self.config.init == "first" else (first + last) // 2

    def _plug(self, first: int, last: int) -> nn.Module:
        """The replacement of a run as it starts: a copy of one of the run's own blocks."""
        return copy.deepcopy(self._teacher.stack.blocks[self._source(first, last)]).requires_grad_(True)

    def _depth(self) -> Train:
        """Non-sequential distillation: every plug reads the teacher's state and owns one loss."""
        stage, stack, plugs = self.config.depth, self._teacher.stack, self._plugs
        starts = {int(key.split("-")[0]): key for key in plugs}
        ends = {int(key.split("-")[1]): key for key in plugs}

        def step(batches: dict[str, Any], i: int) -> Any:
            losses, guesses = {}, {}
            with torch.no_grad():
                state = self._data.begin(batches["train"], i)
            for k, block in enumerate(stack.blocks[: max(ends) + 1]):
                if k in starts:
                    guesses[starts[k]] = stack.run(plugs[starts[k]], state)
                with torch.no_grad():
                    state = stack.run(block, state)
                if k in ends:
                    losses[ends[k]] = align(guesses[ends[k]], state)
            yield Update("plugs", losses)

        optimizer = {"plugs": _adamw(plugs.parameters(), stage)}
        streams, key = {"train": self._data.stream(stage.batch)}, [list(plugs), self.config.init]
        return Train("depth", stage.steps, optimizer, streams, step, {"plugs": plugs}, key=key)

    # -- the layout --

    def _block(self, slot: Slot) -> nn.Module:
        """The whole block of a slot."""
        block: nn.Module = self._plugs[slot.key] if slot.plug else self._teacher.stack.blocks[slot.first]
        return block

    def _plug_slots(self, keys: Iterable[str]) -> list[Slot]:
        borders = [tuple(map(int, key.split("-"))) for key in keys]
        return [Slot(first, last, self._source(first, last), plug=True) for first, last in borders]

    @torch.no_grad()
    def _survey(self) -> dict[str, Tensor]:
        """On held-out samples: the alignment error of every plug and the relative error of every FFN map."""
        stack, plugs = self._teacher.stack, self._plug_slots(self._plugs)
        errors: dict[str, list[Tensor]] = {slot.key: [] for slot in plugs}
        for begun in self._calibration(1):
            states = list(walk(stack, begun))
            for slot in plugs:
                guess = stack.run(self._block(slot), states[slot.first])
                errors[slot.key].append(align(guess, states[slot.last + 1]))
        result = {f"error.{key}": torch.stack(values).mean() for key, values in errors.items()}
        if self.config.ffn == 0:
            return result
        whole = [*slots_of(len(stack.blocks)), *plugs]
        able = [replace(slot, ffn=True) for slot in whole if can_prune_ffn(self._block(slot))]
        maps = fit_maps(stack, able, self._block, self._calibration(0))
        held_out = self._calibration(1)
        ratios = ffn_errors(stack, able, self._block, maps, held_out)
        return result | {f"ffn.{key}": value for key, value in ratios.items()}

    def _layout(self, scores: Mapping[str, Tensor], survey: Mapping[str, Tensor]) -> list[Slot]:
        """Choose active plugs, text runs and feed-forwards for the parameter budget."""
        config, blocks = self.config, self._teacher.stack.blocks
        if config.active is not None:
            active = check_active(config.active, self._plugs)
            return self._narrow(slots_of(len(blocks), self._plug_slots(active)), survey, every_plug=True)
        order, total = self._ranking(scores, survey), parameters_of(blocks)
        slots: list[Slot] = []
        for number in range(len(order) + 1):
            slots = slots_of(len(blocks), self._plug_slots(order[:number]))
            slots = self._narrow(slots, survey, every_plug=number == len(order))
            if parameters_of_layout(blocks, slots) <= config.keep * total:
                return slots
        share = parameters_of_layout(blocks, slots) / total
        self.notes.append(
            f"keep={config.keep:g} cannot be met: the smallest layout keeps {share:.2f}; lower min_similarity, or let "
            "ffn and text_similarity prune the width"
        )
        return slots

    def _ranking(self, scores: Mapping[str, Tensor], survey: Mapping[str, Tensor]) -> list[str]:
        """Runs, best first."""
        if self.config.rank == "similarity" and "cka" in scores:
            return sorted(self._plugs, key=lambda key: -float(scores["cka"][tuple(map(int, key.split("-")))]))
        return sorted(self._plugs, key=lambda key: float(survey[f"error.{key}"]))

    def _narrow(self, slots: list[Slot], survey: Mapping[str, Tensor], *, every_plug: bool) -> list[Slot]:
        """Mark text runs and feed-forwards; "auto" takes feed-forwards only once every plug is on."""
        slots, ffn, blocks = self._mark_text(slots), self.config.ffn, self._teacher.stack.blocks
        if isinstance(ffn, list):
            return [replace(slot, ffn=slot.first in check_ffn(ffn, slots, self._block)) for slot in slots]
        able = [slot for slot in slots if f"ffn.{slot.key}" in survey]
        ranked = [slot.first for slot in sorted(able, key=lambda slot: float(survey[f"ffn.{slot.key}"]))]
        if isinstance(ffn, int):
            return [replace(slot, ffn=slot.first in ranked[:ffn]) for slot in slots]
        budget = self.config.keep * parameters_of(blocks)
        for number in range(len(ranked) + 1 if every_plug else 1):
            marked = [replace(slot, ffn=slot.first in ranked[:number]) for slot in slots]
            if parameters_of_layout(blocks, marked) <= budget:
                break
        return marked

    def _mark_text(self, slots: list[Slot]) -> list[Slot]:
        allowed = [can_prune_text(self._block(slot)) for slot in slots]
        if self.config.text is not None:
            return mark_text_runs(slots, [check_text_run(run, slots, allowed) for run in self.config.text])
        if self.config.text_similarity is None or not any(allowed):
            return slots
        held_out = self._calibration(1)
        similarity = text_token_similarity(self._teacher.stack, slots, self._block, held_out, linear_cka)
        return mark_text_runs(slots, choose_text_runs(similarity, allowed, self.config.text_similarity))

    # -- stage 2 --

    def _fit_maps(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        data = self._calibration(0)
        return _flat(fit_maps(self._teacher.stack, slots, self._block, data))

    def _assemble(self, base: Model, slots: Sequence[Slot], maps: Mapping[str, Tensor]) -> Model:
        """Materialise a layout: a plain library model where no width was pruned, else one with a recorded edit."""
        blocks = block_stack(base.module).blocks
        for slot in slots:
            if slot.plug:
                blocks[slot.source].load_state_dict(self._plugs[slot.key].state_dict())
        student = base.edit("blocks.assemble", plan=[slot.plan for slot in slots])
        student.module.to(self._data.ctx.device)
        set_maps(slots, block_stack(student.module).blocks, _pairs(maps))
        if not base.info.edits and not any(slot.narrow for slot in slots):
            config: Mapping[str, Any] = dict(student.module.config)  # type: ignore[arg-type]
            plain = {key: value for key, value in config.items() if not key.startswith("_")}
            return Model(student.module, replace(base.info, config=plain))
        return student

    def _train_width(self, student: Denoiser, slots: Sequence[Slot]) -> Train:
        """``sum_j A(S_j(T_{j-1}), T_j) + L_lin`` over the width-pruned blocks, inputs always the teacher's."""
        stage, stack = self.config.width, self._teacher.stack
        narrow = {slot.key: block for slot, block in zip(slots, student.stack.blocks, strict=True) if slot.narrow}
        wholes = [self._block(slot) for slot in slots]

        def step(batches: dict[str, Any], i: int) -> Any:
            losses: dict[str, Tensor] = {}
            with torch.no_grad():
                states = list(walk(stack, self._data.begin(batches["train"], i)))
            for slot, whole, before, after, anchor in with_anchors(slots, wholes, states):
                block = narrow.get(slot.key)
                if not isinstance(block, OwnBlock):
                    continue
                known = replace(before, anchor=None if anchor is None else Anchor(anchor.tokens))
                losses[f"{slot.key}.alignment"] = align(block.step(known), after)
                with torch.no_grad():
                    pairs = map_pairs(slot, whole, before, after, anchor)
                for name, inputs, target in pairs:
                    mapped = map_modules(block)[name](inputs)
                    losses[f"{slot.key}.{name}"] = (mapped - target).square().sum(-1).mean()
            yield Update("width", losses)

        parameters = [parameter for block in narrow.values() for parameter in block.parameters()]
        optimizer, streams = {"width": _adamw(parameters, stage)}, {"train": self._data.stream(stage.batch)}
        left = {"student": student.module}
        return Train("width", stage.steps, optimizer, streams, step, left, key=layout_key(slots))

    # -- stage 3 --

    def _finetune(self, student: Denoiser, slots: Sequence[Slot]) -> Train:
        """``mean |v_S - v_T|^2 + mean |v_S - target|^2`` over all weights, the teacher without guidance."""
        stage = self.config.finetune

        def step(batches: dict[str, Any], i: int) -> Any:
            noised, level, target, condition = self._data.sample(batches["train"], i)
            with torch.no_grad():
                wanted = self._teacher(noised, level, condition)
            guess = student(noised, level, condition)
            data = (guess[:, : student.channels] - target).square().mean()
            yield Update("student", {"teacher": (guess - wanted).square().mean(), "data": data})

        optimizer = {"student": _adamw(student.parameters(), stage)}
        streams, left = {"train": self._data.stream(stage.batch)}, {"student": student.module}
        return Train("finetune", stage.steps, optimizer, streams, step, left, key=layout_key(slots))


# --- checks of what the user names -----------------------------------------------------------------------------------


def check_intervals(intervals: Sequence[tuple[int, int]], count: int) -> list[list[int]]:
    """Validate explicit runs: at least two blocks each, ascending, disjoint, without the first and the last block."""
    covered = 0
    for first, last in intervals:
        if not covered < first < last < count - 1:
            raise RequestError(
                f"intervals: [{first}, {last}] must have two or more blocks between 1 and {count - 2}, behind the run "
                "before it"
            )
        covered = last
    return [list(run) for run in intervals]


def check_active(active: Sequence[int], plugs: Iterable[str]) -> list[str]:
    """The keys of the runs that start at the given blocks."""
    known = {int(key.split("-")[0]): key for key in plugs}
    for first in active:
        if first not in known:
            starts = ", ".join(map(str, sorted(known))) or "no block"
            raise RequestError(f"active: no run starts at block {first}; runs start at {starts}")
    return [known[first] for first in active]


def check_text_run(run: tuple[int, int], slots: Sequence[Slot], allowed: Sequence[bool]) -> tuple[int, int]:
    """Places in the layout of a text run given in teacher blocks."""
    places = [k for k, slot in enumerate(slots) if run[0] <= slot.first and slot.last <= run[1]]
    if len(places) < 2 or not all(allowed[k] for k in places):
        raise RequestError(f"text: [{run[0]}, {run[1]}] must span at least two blocks with a text stream of their own")
    return places[0], places[-1]


def check_ffn(blocks: Sequence[int], slots: Sequence[Slot], block_of: Callable[[Slot], nn.Module]) -> list[int]:
    """The given first blocks, if each names a slot with a feed-forward of its own."""
    able = [slot.first for slot in slots if can_prune_ffn(block_of(slot))]
    for first in blocks:
        if first not in able:
            names = ", ".join(map(str, able)) or "none"
            raise RequestError(
                f"ffn: block {first} is not kept or has no feed-forward after its attention; can be: {names}"
            )
    return list(blocks)


# --- storage ---------------------------------------------------------------------------------------------------------


def _flat(maps: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Maps as named tensors."""
    return {f"{name}.{part}": value for name, pair in maps.items() for part, value in zip("wb", pair, strict=True)}


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The reverse of `_flat`."""
    names = [name.removesuffix(".w") for name in tensors if name.endswith(".w")]
    return {name: (tensors[f"{name}.w"], tensors[f"{name}.b"]) for name in names}


def _adamw(parameters: Iterable[nn.Parameter], stage: Stage) -> Optim:
    schedule = cosine(max(stage.steps, 1), warmup=min(stage.warmup, stage.steps // 2))
    options = {"betas": stage.betas, "weight_decay": stage.weight_decay}
    return Optim(list(parameters), lr=stage.lr, schedule=schedule, options=options)


METHOD = PPCL
