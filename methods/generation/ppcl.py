"""PPCL: pluggable pruning with contiguous layer distillation for diffusion transformers (Ma et al., CVPR 2026).

Redundancy in a deep diffusion transformer comes in runs of neighbouring blocks. Linear probes, chained, show by the fall
of their CKA where a run ends; every run is replaced by one block that reads the *teacher's* state before the run and
imitates the teacher's state behind it. No replacement reads another, so any subset of them is a working model.

Trained: one block a run (independently), optionally linear maps in place of text streams and feed-forwards, then the
whole assembled network briefly. Exported: its denoiser, with the sampler around it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.deployable import Deployable
from compressor.diffusion.conditioning import ConditionTable
from compressor.diffusion.denoiser import Denoiser, noised_batch
from compressor.method import Context, MethodConfig, Needs, Paper
from compressor.models.anatomy.blocks import Anchor, BlockStack, State
from compressor.models.edits.blocks import (
    BlockPlan,
    PrunedJointBlock,
    PrunedSingleBlock,
    ResidualMap,
    after_attention,
    can_prune_ffn,
    can_prune_text,
    text_tokens,
)
from compressor.models.model import Model
from compressor.training.curves import cosine
from compressor.training.phase import Compute, Optim, Phases, Train, Update

__all__ = [
    "METHOD",
    "LeastSquares",
    "PPCL",
    "Slot",
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


class LeastSquares:
    """The same fit over many batches: adds up ``[x, 1]^T [x, 1]`` and ``[x, 1]^T (y - x)`` in float64."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take a batch of rows (..., d)."""
        width = inputs.shape[-1]
        x = inputs.detach().reshape(-1, width).double()
        design = torch.cat([x, x.new_ones(len(x), 1)], 1)
        gram, cross = design.T @ design, design.T @ (outputs.detach().reshape(-1, width).double() - x)
        self.gram = gram if self.gram is None else self.gram + gram
        self.cross = cross if self.cross is None else self.cross + cross

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight (d, d) and bias (d,) in float32, minimum-norm."""
        if self.gram is None or self.cross is None:
            raise ValueError("no rows were added")
        # the Gram matrix squares the condition number: directions below the cut are noise
        solution = (torch.linalg.pinv(self.gram, hermitian=True, rtol=1e-10) @ self.cross).float()
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
    s, t = student.float(), teacher.detach().float()
    difference = s / s.norm(dim=-1, keepdim=True) - t / t.norm(dim=-1, keepdim=True)
    distance = difference.square() if kind == "l2" else difference.abs()
    return distance.sum(-1).mean()


def align(student: State, teacher: State) -> Tensor:
    """Alignment of both streams, weight 1 each; padded text tokens are left out."""
    loss = normalized_alignment_loss(student.image, teacher.image)
    if student.text is not None and teacher.text is not None:
        mask = teacher.context.get("encoder_hidden_states_mask")
        keep = slice(None) if mask is None else mask
        loss = loss + normalized_alignment_loss(student.text[keep], teacher.text[keep])
    return loss


# --- Stage 2: width --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """One block of the pruned network: it stands for the teacher's blocks first..last.

    Attributes:
        first: Teacher block whose input it reads.
        last: Teacher block whose output it imitates.
        source: Teacher block whose structure it has.
        plug: Whether it is a trained replacement of a run.
        ffn: Whether its feed-forward is a linear map.
        text: Its role in a text run.
    """

    first: int
    last: int
    source: int
    plug: bool = False
    ffn: bool = False
    text: Literal["whole", "anchor", "inside", "last"] = "whole"

    @property
    def key(self) -> str:
        return f"{self.first}-{self.last}"

    @property
    def plan(self) -> BlockPlan:
        return {"source": self.source, "ffn": self.ffn, "text": self.text}


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


class Config(MethodConfig):
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
    """Feed-forwards to replace by linear maps: how many, which blocks, or "auto": as few as `keep` needs beyond depth."""
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


class PPCL:
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
    )
    Config: ClassVar[type[MethodConfig]] = Config
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

    def __init__(self, config: Config) -> None:
        self.config = config
        self.notes: list[str] = []
        self._student: Model | None = None

    # -- phases --

    def phases(self, ctx: Context) -> Phases:
        """Probe, cut, distil the plugs, survey the width, choose, assemble, fine-tune."""
        config, teacher = self.config, Denoiser(ctx.teacher())
        self._draw = _Draw(ctx, teacher, ctx.task.conditions(teacher.model))  # type: ignore[attr-defined]
        count = len(teacher.stack.blocks)
        scores: Mapping[str, Tensor] = {}
        if config.intervals is None:
            scores = yield Compute("probes", lambda: self._probe(teacher), key=config.calibration)  # type: ignore[misc]
            scores = yield Compute("cka", lambda: self._chain(teacher, scores), key=[config.reference, config.cka_streams])  # type: ignore[misc]
            # the first and the last block are never pruned
            runs = find_redundant_intervals(scores["cka"], 1, count - 2, config.min_similarity).tolist()
        else:
            runs = check_intervals(config.intervals, count)
        plugs = self._plugs(teacher, runs)
        if runs:
            yield self._depth(ctx, teacher, plugs)
        survey = yield Compute("survey", lambda: self._survey(teacher, plugs), key=[config.ffn != 0, config.calibration])
        assert survey is not None
        slots = self._layout(teacher, plugs, scores, survey)
        maps = yield Compute("maps", lambda: self._fit_maps(teacher, plugs, slots), key=_layout_key(slots))
        assert maps is not None
        self._student = student = self._assemble(ctx.student(like=teacher.model), plugs, slots, maps)
        yield from self._refine(ctx, teacher, Denoiser(student), plugs, slots)

    def student(self) -> Model:
        """The assembled network."""
        if self._student is None:
            raise RuntimeError("the phases have not run")
        return self._student

    def deployables(self, ctx: Context) -> dict[str, Deployable]:
        """The student's denoiser with the sampler around it."""
        return {"student": ctx.task.deployable(self.student())}

    # -- stage 1 --

    @torch.no_grad()
    def _probe(self, teacher: Denoiser) -> dict[str, Tensor]:
        """One closed-form probe a block and stream, all from the same teacher passes."""
        fits: dict[tuple[int, str], LeastSquares] = {}
        for state in self._draw.calibration(0, self.config.calibration):
            for k, (before, after) in enumerate(walk(teacher.stack, state)):
                for stream, inputs in before.streams().items():
                    if stream in after.streams():
                        fits.setdefault((k, stream), LeastSquares()).add(inputs, after.streams()[stream])
        return {f"{k}.{s}.{p}": v for (k, s), fit in fits.items() for p, v in zip("wb", fit.solve(), strict=True)}

    @torch.no_grad()
    def _chain(self, teacher: Denoiser, probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CKA of chained probes on samples that no probe has seen."""
        outputs: dict[str, list[list[Tensor]]] = {}
        for state in self._draw.calibration(1, self.config.calibration):
            for k, (_, after) in enumerate(walk(teacher.stack, state)):
                for stream, tokens in after.streams().items():
                    layers = outputs.setdefault(stream, [])
                    layers.extend([[]] * 0 if len(layers) > k else [[]])
                    layers[k].append(tokens)
        wanted = ["image"] if self.config.cka_streams == "image" else list(outputs)
        chains = []
        for stream in wanted:
            layers = [torch.cat(parts) for parts in outputs[stream]]
            fitted = [(probes[f"{k}.{stream}.w"], probes[f"{k}.{stream}.b"]) for k in range(len(layers))]
            fitted = [(w.to(layers[0]), b.to(layers[0])) for w, b in fitted]
            chains.append(chain_cka(layers, fitted, reference=self.config.reference))
        return {"cka": torch.stack([c[: len(chains[-1]), : len(chains[-1])] for c in chains]).mean(0)}

    def _plugs(self, teacher: Denoiser, runs: Iterable[Sequence[int]]) -> nn.ModuleDict:
        """A replacement a run, by its key "first-last", made of a copy of one of the run's own blocks."""
        blocks, plugs = teacher.stack.blocks, nn.ModuleDict()
        for first, last in runs:
            source = self._source(first, last)
            plugs[f"{first}-{last}"] = copy.deepcopy(blocks[source]).requires_grad_(True)
        return plugs

    def _source(self, first: int, last: int) -> int:
        return first if self.config.init == "first" else (first + last) // 2

    def _depth(self, ctx: Context, teacher: Denoiser, plugs: nn.ModuleDict) -> Train:
        """Non-sequential distillation: every plug reads the teacher's state and owns one loss."""
        stage, stack = self.config.depth, teacher.stack
        starts, ends = _borders(plugs)
        final = max(ends)

        def step(batches: dict[str, Any], i: int) -> Any:
            with torch.no_grad():
                state, _ = self._draw.begin(batches["train"], i)
            losses, guesses = {}, {}
            for k, block in enumerate(stack.blocks[: final + 1]):
                if k in starts:
                    guesses[starts[k]] = stack.run(plugs[starts[k]], state)
                with torch.no_grad():
                    state = stack.run(block, state)
                if k in ends:
                    losses[ends[k]] = align(guesses[ends[k]], state)
            yield Update("plugs", losses)

        optimizer, key = {"plugs": _adamw(plugs.parameters(), stage)}, [list(plugs), self.config.init]
        return Train("depth", stage.steps, optimizer, self._draw.stream(stage.batch), step, {"plugs": plugs}, key=key)

    # -- stage 2 --

    @torch.no_grad()
    def _survey(self, teacher: Denoiser, plugs: nn.ModuleDict) -> dict[str, Tensor]:
        """What every possible block would cost: alignment error of each plug, relative error of each FFN map."""
        stack, candidates = teacher.stack, self._candidates(teacher, plugs)
        errors: dict[str, list[Tensor]] = {key: [] for key in plugs}
        for state in self._draw.calibration(1, self.config.calibration):
            states = [state, *(after for _, after in walk(stack, state))]
            for slot in candidates:
                if slot.plug:
                    guess = stack.run(plugs[slot.key], states[slot.first])
                    errors[slot.key].append(align(guess, states[slot.last + 1]))
        result = {f"error.{key}": torch.stack(values).mean() for key, values in errors.items()}
        if self.config.ffn == 0:
            return result
        maps = self._fit_ffn(teacher, plugs, candidates)
        return result | self._ffn_errors(teacher, plugs, candidates, maps)

    def _candidates(self, teacher: Denoiser, plugs: nn.ModuleDict) -> list[Slot]:
        whole = [Slot(k, k, k) for k in range(len(teacher.stack.blocks))]
        return whole + [_plug_slot(key, self._source) for key in plugs]

    def _block(self, teacher: Denoiser, plugs: nn.ModuleDict, slot: Slot) -> nn.Module:
        return plugs[slot.key] if slot.plug else teacher.stack.blocks[slot.first]

    def _fit_ffn(
        self, teacher: Denoiser, plugs: nn.ModuleDict, slots: Sequence[Slot]
    ) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        """Closed-form maps from the state after attention to the teacher's state behind the slot."""
        fits: dict[tuple[str, str], LeastSquares] = {}
        chosen = [slot for slot in slots if can_prune_ffn(self._block(teacher, plugs, slot))]
        for state in self._draw.calibration(0, self.config.calibration):
            states = [state, *(after for _, after in walk(teacher.stack, state))]
            for slot in chosen:
                inner = after_attention(self._block(teacher, plugs, slot), states[slot.first])
                for stream, target in states[slot.last + 1].streams().items():
                    fits.setdefault((slot.key, stream), LeastSquares()).add(inner[stream], target)
        return {key: fit.solve() for key, fit in fits.items()}

    def _ffn_errors(
        self,
        teacher: Denoiser,
        plugs: nn.ModuleDict,
        slots: Sequence[Slot],
        maps: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        """``sum |g + l(g) - T|^2 / sum |T - g|^2`` on held-out tokens, mean of the streams."""
        sums: dict[tuple[str, str], Tensor] = {}
        for state in self._draw.calibration(1, self.config.calibration):
            states = [state, *(after for _, after in walk(teacher.stack, state))]
            for slot in slots:
                if (slot.key, "image") not in maps:
                    continue
                inner = after_attention(self._block(teacher, plugs, slot), states[slot.first])
                for stream, target in states[slot.last + 1].streams().items():
                    g, (weight, bias) = inner[stream], maps[slot.key, stream]
                    miss, size = (g + g @ weight.T + bias - target).square().sum(), (target - g).square().sum()
                    pair = torch.stack([miss, size])
                    sums[slot.key, stream] = sums.get((slot.key, stream), 0) + pair
        ratios: dict[str, list[Tensor]] = {}
        for (key, _), pair in sums.items():
            ratios.setdefault(key, []).append(pair[0] / pair[1])
        return {f"ffn.{key}": torch.stack(values).mean() for key, values in ratios.items()}

    @torch.no_grad()
    def _text_similarity(self, teacher: Denoiser, plugs: nn.ModuleDict, slots: Sequence[Slot]) -> Tensor:
        """CKA of the text tokens that every pair of slots attends with."""
        blocks = [self._block(teacher, plugs, slot) for slot in slots]
        tokens: list[list[Tensor]] = [[] for _ in slots]
        for state in self._draw.calibration(1, self.config.calibration):
            states = [state, *(after for _, after in walk(teacher.stack, state))]
            for place, (slot, block) in enumerate(zip(slots, blocks, strict=True)):
                if can_prune_text(block):
                    tokens[place].append(text_tokens(block, states[slot.first]))
        similarity = torch.eye(len(slots))
        joined = [torch.cat(parts) if parts else None for parts in tokens]
        for a, left in enumerate(joined):
            for b, right in enumerate(joined):
                if left is not None and right is not None and a != b:
                    similarity[a, b] = linear_cka(left, right)
        return similarity

    def _layout(
        self, teacher: Denoiser, plugs: nn.ModuleDict, scores: Mapping[str, Tensor], survey: Mapping[str, Tensor]
    ) -> list[Slot]:
        """Choose active plugs, text runs and feed-forwards for the parameter budget."""
        config, total = self.config, _size(teacher.stack.blocks)
        order = _ranking(plugs, scores, survey, config.rank)
        if config.active is not None:
            chosen = check_active(config.active, plugs)
            return self._narrow(teacher, plugs, self._slots(teacher, chosen), survey)
        slots: list[Slot] = []
        for number in range(len(order) + 1):
            slots = self._narrow(
                teacher, plugs, self._slots(teacher, order[:number]), survey, last=number == len(order)
            )
            if self._kept(teacher, slots) <= config.keep * total:
                return slots
        share = self._kept(teacher, slots) / total
        self.notes.append(
            f"keep={config.keep:g} cannot be met: the smallest layout keeps {share:.2f}; lower "
            "min_similarity, or allow ffn and text_similarity to prune the width"
        )
        return slots

    def _slots(self, teacher: Denoiser, active: Iterable[str]) -> list[Slot]:
        """Blocks in order: at the first block of an active run its plug, the run's other blocks left out."""
        plugs = [_plug_slot(key, self._source) for key in active]
        covered = {k for slot in plugs for k in range(slot.first, slot.last + 1)}
        whole = [Slot(k, k, k) for k in range(len(teacher.stack.blocks)) if k not in covered]
        return sorted([*plugs, *whole], key=lambda slot: slot.first)

    def _narrow(
        self,
        teacher: Denoiser,
        plugs: nn.ModuleDict,
        slots: list[Slot],
        survey: Mapping[str, Tensor],
        *,
        last: bool = True,
    ) -> list[Slot]:
        """Mark text runs and feed-forwards; "auto" feed-forwards only once every plug is on."""
        slots = self._mark_text(teacher, plugs, slots)
        ffn = self.config.ffn
        ranked = sorted(
            (slot for slot in slots if f"ffn.{slot.key}" in survey), key=lambda s: float(survey[f"ffn.{s.key}"])
        )
        if isinstance(ffn, list):
            return [replace(slot, ffn=slot.first in ffn) for slot in slots]
        if ffn == "auto":
            budget = self.config.keep * _size(teacher.stack.blocks)
            for slot in ranked if last else ():
                if self._kept(teacher, slots) <= budget:
                    break
                slots = [replace(s, ffn=s.ffn or s.first == slot.first) for s in slots]
            return slots
        firsts = {slot.first for slot in ranked[:ffn]}
        return [replace(slot, ffn=slot.first in firsts) for slot in slots]

    def _mark_text(self, teacher: Denoiser, plugs: nn.ModuleDict, slots: list[Slot]) -> list[Slot]:
        allowed = [can_prune_text(self._block(teacher, plugs, slot)) for slot in slots]
        if self.config.text is not None:
            runs = [_text_run(run, slots, allowed) for run in self.config.text]
        elif self.config.text_similarity is not None and any(allowed):
            similarity = self._text_similarity(teacher, plugs, slots)
            runs = choose_text_runs(similarity, allowed, self.config.text_similarity)
        else:
            return slots
        marked = list(slots)
        for a, b in runs:
            for place in range(a, b + 1):
                # the text state behind the run matters only where a later block reads it
                role: Any = "anchor" if place == a else "last" if place == b and b + 1 < len(slots) else "inside"
                marked[place] = replace(marked[place], text=role)
        return marked

    def _kept(self, teacher: Denoiser, slots: Sequence[Slot]) -> int:
        """Parameters of the blocks of a layout."""
        return sum(_slot_size(teacher.stack.blocks[slot.source], slot) for slot in slots)

    @torch.no_grad()
    def _fit_maps(self, teacher: Denoiser, plugs: nn.ModuleDict, slots: Sequence[Slot]) -> dict[str, Tensor]:
        """All linear maps of a layout in closed form, from teacher passes."""
        fits: dict[str, LeastSquares] = {}
        blocks = [self._block(teacher, plugs, slot) for slot in slots]
        if all(slot.text == "whole" and not slot.ffn for slot in slots):
            return {}
        for state in self._draw.calibration(0, self.config.calibration):
            states = [state, *(after for _, after in walk(teacher.stack, state))]
            anchor, anchor_text = None, None
            for slot, block in zip(slots, blocks, strict=True):
                before, after = states[slot.first], states[slot.last + 1]
                if slot.text == "anchor":
                    anchor, anchor_text = text_tokens(block, before), after.text
                for name, inputs, target in self._map_pairs(slot, block, before, after, anchor, anchor_text):
                    fits.setdefault(f"{slot.key}.{name}", LeastSquares()).add(inputs, target)
        solved = {name: fit.solve() for name, fit in fits.items()}
        return {
            f"{name}.{part}": value for name, pair in solved.items() for part, value in zip("wb", pair, strict=True)
        }

    @staticmethod
    def _map_pairs(
        slot: Slot, block: nn.Module, before: State, after: State, anchor: Tensor | None, anchor_text: Tensor | None
    ) -> Iterable[tuple[str, Tensor, Tensor]]:
        """(map, inputs, target) of every map that a slot needs."""
        if slot.ffn:
            inner, whole = after_attention(block, before), slot.text in ("whole", "anchor")
            for stream, target in after.streams().items():
                if stream == "image" or whole:
                    yield stream, inner[stream], target
        if slot.text in ("inside", "last") and anchor is not None:
            yield "tokens", anchor, text_tokens(block, before)
        if slot.text == "last" and anchor_text is not None and after.text is not None:
            yield "state", anchor_text, after.text

    def _assemble(self, base: Model, plugs: nn.ModuleDict, slots: Sequence[Slot], maps: Mapping[str, Tensor]) -> Model:
        """Materialise a layout: a plain library model where no width was pruned, else one with a recorded edit."""
        from compressor.models.anatomy.blocks import block_stack

        blocks = block_stack(base.module).blocks
        for slot in slots:
            if slot.plug:
                blocks[slot.source].load_state_dict(plugs[slot.key].state_dict())
        student = base.edit("blocks.assemble", plan=[slot.plan for slot in slots])
        for slot, block in zip(slots, block_stack(student.module).blocks, strict=True):
            for name, part in _map_modules(block).items():
                part.set(maps[f"{slot.key}.{name}.w"], maps[f"{slot.key}.{name}.b"])
        if not base.info.edits and all(slot.text == "whole" and not slot.ffn for slot in slots):
            config = {key: value for key, value in dict(student.module.config).items() if not key.startswith("_")}  # type: ignore[arg-type]
            return Model(student.module, replace(base.info, config=config))
        return student

    # -- stages 2 (trained) and 3 --

    def _refine(
        self, ctx: Context, teacher: Denoiser, student: Denoiser, plugs: nn.ModuleDict, slots: Sequence[Slot]
    ) -> Phases:
        config = self.config
        if config.width.steps and any(slot.ffn or slot.text in ("inside", "last") for slot in slots):
            yield self._train_width(teacher, student, plugs, slots)
        step = self._finetune_step(teacher, student)
        optimizer = {"student": _adamw(student.parameters(), config.finetune)}
        yield Train(
            "finetune",
            config.finetune.steps,
            optimizer,
            self._draw.stream(config.finetune.batch),
            step,
            {"student": student.module},
            key=_layout_key(slots),
        )

    def _train_width(self, teacher: Denoiser, student: Denoiser, plugs: nn.ModuleDict, slots: Sequence[Slot]) -> Train:
        """``sum_j A(S_j(T_{j-1}), T_j) + L_lin`` over the width-pruned blocks, inputs always the teacher's."""
        touched = list(zip(slots, student.stack.blocks, strict=True))
        wholes = [self._block(teacher, plugs, slot) for slot in slots]
        parameters = [p for slot, block in touched if slot.ffn or slot.text != "whole" for p in block.parameters()]

        def step(batches: dict[str, Any], i: int) -> Any:
            with torch.no_grad():
                state, _ = self._draw.begin(batches["train"], i)
                states = [state, *(after for _, after in walk(teacher.stack, state))]
            losses, anchor, anchor_text = {}, None, None
            for (slot, block), whole in zip(touched, wholes, strict=True):
                before, after = states[slot.first], states[slot.last + 1]
                if slot.text == "anchor":
                    with torch.no_grad():
                        anchor, anchor_text = text_tokens(whole, before), after.text
                if not isinstance(block, (PrunedJointBlock, PrunedSingleBlock)):
                    continue
                known = replace(before, anchor=None if anchor is None else Anchor(anchor))
                losses[f"{slot.key}.alignment"] = align(block.step(known), after)
                modules = _map_modules(block)
                with torch.no_grad():
                    pairs = list(self._map_pairs(slot, whole, before, after, anchor, anchor_text))
                for name, inputs, target in pairs:
                    losses[f"{slot.key}.{name}"] = (modules[name](inputs) - target).square().sum(-1).mean()
            yield Update("width", losses)

        stage = self.config.width
        optimizer = {"width": _adamw(parameters, stage)}
        streams, left = self._draw.stream(stage.batch), {"student": student.module}
        return Train("width", stage.steps, optimizer, streams, step, left, key=_layout_key(slots))

    def _finetune_step(self, teacher: Denoiser, student: Denoiser) -> Callable[..., Any]:
        """``mean |v_S - v_T|^2 + mean |v_S - target|^2``, the teacher without guidance."""

        def step(batches: dict[str, Any], i: int) -> Any:
            noised, level, target, condition = self._draw.sample(batches["train"], i)
            with torch.no_grad():
                wanted = teacher(noised, level, condition)
            guess = student(noised, level, condition)
            data = (guess[:, : student.channels] - target).square().mean()
            yield Update("student", {"teacher": (guess - wanted).square().mean(), "data": data})

        return step


class _Draw:
    """Noised batches of a run's data, as states of the teacher's stack or as samples."""

    def __init__(self, ctx: Context, teacher: Denoiser, table: ConditionTable) -> None:
        self.ctx, self.teacher, self.table = ctx, teacher, table

    def stream(self, size: int) -> dict[str, Any]:
        return {"train": self.ctx.stream("train", size, view=self.ctx.task.view)}  # type: ignore[attr-defined]

    def sample(self, batch: Mapping[str, Tensor], i: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """(noised, level, target, condition) of step i."""
        clean = batch["image"]
        noise = self.ctx.normal(i, clean.shape, "noise").to(clean.device)
        uniform = self.ctx.uniform(i, len(clean), "level").to(clean.device)
        noised, level, target = noised_batch(self.teacher, clean, noise, uniform)
        return noised, level, target, self.table(batch["label"])

    def begin(self, batch: Mapping[str, Tensor], i: int) -> tuple[State, Tensor]:
        """The teacher's embedded state of step i, and the target."""
        noised, level, target, condition = self.sample(batch, i)
        return self.teacher.stack.begin(noised, self.teacher.schedule.timestep(level), condition), target

    def calibration(self, draw: int, samples: int) -> Iterable[State]:
        """Embedded states of calibration samples; different draws share none of the noise, nor of the order."""
        size = min(64, samples)
        stream = self.ctx.stream("train", size, view=self.ctx.task.view, tag=f"calibration{draw}")  # type: ignore[attr-defined]
        whole = replace(stream, shard=(0, 1))
        for i in range(-(-samples // size)):
            batch = whole[i]
            clean = batch["image"]
            generator = self.ctx.rng(i, f"calibration{draw}", shared=True)
            noise = torch.randn(clean.shape, generator=generator).to(clean.device)
            uniform = torch.rand(len(clean), generator=generator).to(clean.device)
            with torch.no_grad():
                noised, level, _ = noised_batch(self.teacher, clean, noise, uniform)
                timestep = self.teacher.schedule.timestep(level)
                yield self.teacher.stack.begin(noised, timestep, self.table(batch["label"]))


def walk(stack: BlockStack, state: State) -> Iterable[tuple[State, State]]:
    """(before, after) of every block, from an embedded state."""
    for block in stack.blocks:
        before, state = state, stack.run(block, state)
        yield before, state


def check_intervals(intervals: Sequence[tuple[int, int]], count: int) -> list[list[int]]:
    """Validate explicit runs: at least two blocks each, ascending, disjoint, without the first and the last block."""
    from compressor.errors import RequestError

    covered = 0
    for first, last in intervals:
        if not (covered < first < last < count - 1):
            raise RequestError(
                f"intervals: [{first}, {last}] must have two or more blocks between 1 and {count - 2}, "
                "behind the run before it"
            )
        covered = last
    return [list(run) for run in intervals]


def check_active(active: Sequence[int], plugs: nn.ModuleDict) -> list[str]:
    """The keys of the runs that start at the given blocks."""
    from compressor.errors import RequestError

    known = {int(key.split("-")[0]): key for key in plugs}
    for first in active:
        if first not in known:
            raise RequestError(
                f"active: no run starts at block {first}; runs start at {', '.join(map(str, sorted(known)))}"
            )
    return [known[first] for first in active]


def _text_run(run: tuple[int, int], slots: Sequence[Slot], allowed: Sequence[bool]) -> tuple[int, int]:
    from compressor.errors import RequestError

    places = [k for k, slot in enumerate(slots) if run[0] <= slot.first and slot.last <= run[1]]
    if len(places) < 2 or not all(allowed[k] for k in places):
        raise RequestError(f"text: [{run[0]}, {run[1]}] must span at least two blocks with a text stream of their own")
    return places[0], places[-1]


def _borders(plugs: nn.ModuleDict) -> tuple[dict[int, str], dict[int, str]]:
    """Keys of the runs by their first and by their last block."""
    pairs = [(key, *map(int, key.split("-"))) for key in plugs]
    return {first: key for key, first, _ in pairs}, {last: key for key, _, last in pairs}


def _plug_slot(key: str, source: Callable[[int, int], int]) -> Slot:
    first, last = map(int, key.split("-"))
    return Slot(first, last, source(first, last), plug=True)


def _ranking(plugs: nn.ModuleDict, scores: Mapping[str, Tensor], survey: Mapping[str, Tensor], rank: str) -> list[str]:
    """Runs, best first."""
    if rank == "similarity" and "cka" in scores:
        return sorted(plugs, key=lambda key: -float(scores["cka"][tuple(map(int, key.split("-")))]))
    return sorted(plugs, key=lambda key: float(survey[f"error.{key}"]))


def _layout_key(slots: Sequence[Slot]) -> list[dict[str, Any]]:
    return [{**slot.plan, "first": slot.first, "plug": slot.plug} for slot in slots]


def _size(blocks: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())


def _slot_size(block: nn.Module, slot: Slot) -> int:
    """Parameters of a slot once it is materialised."""
    from compressor.models.edits.blocks import shape_block

    return _size([shape_block(copy.deepcopy(block), slot.ffn, slot.text)])


def _map_modules(block: nn.Module) -> dict[str, ResidualMap]:
    """The linear maps of a pruned block by name."""
    if isinstance(block, PrunedSingleBlock):
        return {"image": block.map}
    if not isinstance(block, PrunedJointBlock):
        return {}
    found = {"image": block.image.map, "text": block.text.map if block.text is not None else None}
    found |= {"tokens": block.tokens_map, "state": block.text_map}
    return {name: module for name, module in found.items() if module is not None}


def _adamw(parameters: Iterable[nn.Parameter], stage: Stage) -> Optim:
    schedule = cosine(max(stage.steps, 1), warmup=min(stage.warmup, stage.steps // 2))
    options = {"betas": stage.betas, "weight_decay": stage.weight_decay}
    return Optim(list(parameters), lr=stage.lr, schedule=schedule, options=options)


METHOD = PPCL
