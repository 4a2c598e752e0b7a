"""What benchmarks/kernels.py times: each kernel on real sizes, beside everything that could be used in its place.

A case is one problem with several candidates that solve it, forward and backward; ours is "compressor". Each knows what
must move (bytes) or be multiplied (operations) at least, and how far ours is from float64 on a small problem.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from compressor.kernels import (
    BlockIndices,
    backend,
    block_importance,
    block_sparse_attention,
    ce_and_kl,
    energy_block_mask,
    evenly_spaced_offsets,
    feature_distance,
    kl_div_from_logits,
    linear_kl_div,
)
from compressor.kernels.sparse_attention import dense_mask

__all__ = ["FULL", "QUICK", "SMALL", "SUITES", "Case", "Sizes"]

OURS = "compressor"
MODES = ("forward", "reverse", "jsd")


@dataclass(frozen=True)
class Sizes:
    """How large the problems are.

    Attributes:
        rows: Rows of logits.
        classes: Classes of a row.
        maps: ``(B, C, H, W)`` dense logits.
        linear: ``(rows, student width, teacher width, classes)``.
        tokens: ``(B, N, C)`` features.
        features: ``(B, C, H, W)`` features.
        lengths: Tokens of an attention.
        heads: Its heads.
        widths: Of a head.
        sparsities: Shares of blocks left out.
        block_size: Tokens of a block.
        dtype: Of everything.
        compiled: Whether candidates under torch.compile take part.
    """

    rows: int = 8192
    classes: tuple[int, ...] = (1000, 32_000, 128_000)
    maps: tuple[tuple[int, ...], ...] = ((8, 19, 512, 512), (8, 150, 128, 128))
    linear: tuple[tuple[int, int, int, int], ...] = ((8192, 1024, 2048, 32_000), (8192, 2048, 4096, 128_000))
    tokens: tuple[int, int, int] = (64, 197, 768)
    features: tuple[int, int, int, int] = (16, 256, 64, 64)
    lengths: tuple[int, ...] = (16_384, 32_768)
    heads: int = 16
    widths: tuple[int, ...] = (64, 128)
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    block_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = True


FULL = Sizes()
QUICK = Sizes(
    classes=(1000, 32_000), maps=FULL.maps[:1], linear=FULL.linear[:1], lengths=(16_384,), sparsities=(0.8, 0.95)
)
SMALL = Sizes(
    rows=5,
    classes=(7, 50),
    maps=((1, 5, 4, 4),),
    linear=((6, 8, 4, 11),),
    tokens=(2, 5, 12),
    features=(2, 6, 3, 4),
    lengths=(80,),
    heads=1,
    widths=(16,),
    sparsities=(0.5,),
    block_size=16,
    dtype=torch.float32,
    compiled=False,
)


@dataclass
class Case:
    """One problem.

    Attributes:
        suite: Its group.
        name: Sizes and options.
        candidates: What solves it, by name: functions that run it once, forward and backward.
        floor_bytes: What must move at least.
        floor_operations: Floating-point operations of the matrix products that are needed at least.
        gradient_bytes: Size of the gradients, which are no extra memory.
        input_bytes: Size of what extra memory is compared with: both logits, or the tensors of an attention.
        error: Largest difference of ours from float64, over the largest value, on this problem or a smaller one.
        tolerance: What it may be.
    """

    suite: str
    name: str
    candidates: dict[str, Callable[[], Any]]
    floor_bytes: float = 0.0
    floor_operations: float = 0.0
    gradient_bytes: int = 0
    input_bytes: int = 0
    error: Callable[[], float] = field(default=lambda: 0.0)
    tolerance: float = 2e-2


def _random(shape: tuple[int, ...], sizes: Sizes, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(sizes.dtype)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _both_ways(loss: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
    """Loss and gradients once."""
    return lambda: torch.autograd.grad(loss(*inputs), inputs)


def _compiled(function: Callable[..., Any], sizes: Sizes) -> dict[str, Callable[..., Any]]:
    return {"torch.compile": torch.compile(function)} if sizes.compiled else {}


def _distance(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """Largest difference over all tensors, each relative to its largest value."""
    return max(
        float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1e-30))
        for a, b in zip(got, wanted, strict=True)
    )


def _loss_error(ours: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], float]:
    """Value and gradients of a loss against its reference in float64, whose inputs follow the function's."""

    def error() -> float:
        narrow = [x.detach().requires_grad_() for x in inputs]
        value = ours(*narrow)
        gradients = torch.autograd.grad(value, narrow)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        with backend("reference"):
            expected = ours(*wide)
        return _distance((value, *gradients), (expected, *torch.autograd.grad(expected, wide)))

    return error


# --- losses from logits ----------------------------------------------------------------------------------------------


def _eager_divergence(student: Tensor, teacher: Tensor, mode: str, temperature: float, dim: Any) -> Tensor:
    """What is written by hand: softmaxes in float32, then the sum."""
    dims = (dim,) if isinstance(dim, int) else dim
    flat = [x.float().flatten(-2) if len(dims) > 1 else x.float() for x in (student, teacher)]
    axis = -1 if len(dims) > 1 else dims[0]
    s, t = (F.log_softmax(x / temperature, dim=axis) for x in flat)
    rows = s.numel() // s.shape[axis]
    if mode == "forward":
        value = F.kl_div(s, t, reduction="sum", log_target=True)
    elif mode == "reverse":
        value = F.kl_div(t, s, reduction="sum", log_target=True)
    else:
        m = torch.logaddexp(s, t) - math.log(2)
        parts = [F.kl_div(m, side, reduction="sum", log_target=True) for side in (t, s)]
        value = 0.5 * parts[0] + 0.5 * parts[1]
    return value * temperature**2 / rows


def _liger(mode: str, student: Tensor, teacher: Tensor, temperature: float) -> dict[str, Callable[[], Any]]:
    """Liger's losses, with the softmaxes that they need; nothing where it is not installed or has no such loss."""
    if importlib.util.find_spec("liger_kernel") is None or mode == "reverse" or not student.is_cuda:
        return {}
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    if mode == "jsd":
        measure, log_target = LigerJSD(beta=0.5), True
    else:
        measure, log_target = LigerKLDIVLoss(reduction="batchmean", log_target=False), False

    def loss(student: Tensor) -> Tensor:
        s = F.log_softmax(student.float() / temperature, dim=-1)
        t = (F.log_softmax if log_target else F.softmax)(teacher.float() / temperature, dim=-1)
        return measure(s, t) * temperature**2

    return {"Liger": _both_ways(loss, student)}


def kl_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """`kl_div_from_logits` on rows."""
    for classes in sizes.classes:
        student = _random((sizes.rows, classes), sizes, device, 0).requires_grad_()
        teacher = _random((sizes.rows, classes), sizes, device, 1)
        for mode in MODES:
            yield _divergence_case("kl", student, teacher, mode, -1)


def dense_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """`kl_div_from_logits` on dense maps: over the classes of a pixel, and over the pixels of a class."""
    for shape in sizes.maps:
        student, teacher = (_random(shape, sizes, device, seed) for seed in (0, 1))
        student.requires_grad_()
        for dim in (1, (2, 3)):
            yield _divergence_case("dense", student, teacher, "forward", dim, temperature=4.0)


def _divergence_case(
    suite: str, student: Tensor, teacher: Tensor, mode: Any, dim: Any, temperature: float = 2.0
) -> Case:
    options = {"mode": mode, "temperature": temperature, "dim": dim}

    def ours(student: Tensor) -> Tensor:
        return kl_div_from_logits(student, teacher, **options)

    def eager(student: Tensor) -> Tensor:
        return _eager_divergence(student, teacher, mode, temperature, dim)

    few = slice(0, 4 if suite == "kl" else 1)
    rest = teacher[few]
    candidates = {OURS: _both_ways(ours, student), "eager": _both_ways(eager, student)}
    if student.is_cuda:
        candidates["torch.compile"] = _both_ways(torch.compile(eager), student)
        candidates |= _liger(mode, student, teacher, temperature) if dim == -1 else {}
    return Case(
        suite,
        f"{mode} {'x'.join(map(str, student.shape))} dim={dim}",
        candidates,
        floor_bytes=3 * _bytes(student),
        gradient_bytes=_bytes(student),
        input_bytes=2 * _bytes(student),
        error=_loss_error(
            lambda s: kl_div_from_logits(s, rest.to(torch.promote_types(s.dtype, rest.dtype)), **options),
            (student[few],),
        ),
    )


def objective_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """`ce_and_kl`."""
    for classes in sizes.classes:
        student, teacher = (_random((sizes.rows, classes), sizes, device, seed) for seed in (0, 1))
        student.requires_grad_()
        labels = torch.arange(sizes.rows, device=device) % classes

        def ours(student: Tensor, teacher: Tensor = teacher, labels: Tensor = labels) -> Tensor:
            teacher, labels = teacher[: len(student)].to(student.dtype), labels[: len(student)]
            return ce_and_kl(student, teacher, labels, temperature=2.0, kl_weight=0.9, ce_weight=0.1).total

        def eager(student: Tensor, teacher: Tensor = teacher, labels: Tensor = labels) -> Tensor:
            kl = _eager_divergence(student, teacher, "forward", 2.0, -1)
            return 0.9 * kl + 0.1 * F.cross_entropy(student.float(), labels)

        candidates = {OURS: _both_ways(ours, student), "eager": _both_ways(eager, student)}
        candidates |= {name: _both_ways(made, student) for name, made in _compiled(eager, sizes).items()}
        yield Case(
            "ce_and_kl",
            f"{sizes.rows}x{classes}",
            candidates,
            floor_bytes=3 * _bytes(student),
            gradient_bytes=_bytes(student),
            input_bytes=2 * _bytes(student),
            error=_loss_error(ours, (student[:4],)),
        )


def linear_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """`linear_kl_div`: the floor is its four matrix products at the speed of a large one."""
    for rows, width, teacher_width, classes in sizes.linear:
        hidden = _random((rows, width), sizes, device, 0).requires_grad_()
        weight = (_random((classes, width), sizes, device, 1) * width**-0.5).requires_grad_()
        theirs = _random((rows, teacher_width), sizes, device, 2)
        their_weight = _random((classes, teacher_width), sizes, device, 3) * teacher_width**-0.5

        def ours(h: Tensor, w: Tensor, theirs: Tensor = theirs, their_weight: Tensor = their_weight) -> Tensor:
            return linear_kl_div(h, w, theirs[: len(h)].to(h.dtype), their_weight.to(h.dtype))

        def eager(h: Tensor, w: Tensor, theirs: Tensor = theirs, their_weight: Tensor = their_weight) -> Tensor:
            return _eager_divergence(F.linear(h, w), F.linear(theirs, their_weight), "forward", 1.0, -1)

        candidates = {OURS: _both_ways(ours, hidden, weight), "eager": _both_ways(eager, hidden, weight)}
        candidates |= {name: _both_ways(made, hidden, weight) for name, made in _compiled(eager, sizes).items()}
        yield Case(
            "linear",
            f"{rows} rows, {width} and {teacher_width} to {classes}",
            candidates,
            floor_operations=2.0 * rows * classes * (3 * width + teacher_width),
            gradient_bytes=_bytes(hidden, weight),
            input_bytes=2 * rows * classes * hidden.element_size(),
            error=_loss_error(ours, (hidden[:4], weight)),
            tolerance=4e-2,
        )


# --- features --------------------------------------------------------------------------------------------------------


def _eager_distance(student: Tensor, teacher: Tensor, mode: str, dim: int) -> Tensor:
    s, t = student.float(), teacher.float()
    if mode == "mse":
        return F.mse_loss(s, t)
    if mode == "normalized_mse":
        return (F.normalize(s, dim=dim) - F.normalize(t, dim=dim)).square().sum(dim=dim).mean()
    if mode == "cosine":
        return 1 - F.cosine_similarity(s, t, dim=dim).mean()
    maps = [F.normalize(x.square().sum(dim=dim).flatten(1), dim=1) for x in (s, t)]
    return F.mse_loss(*maps)


def feature_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """`feature_distance` on tokens and on maps."""
    for shape, dim in ((sizes.tokens, -1), (sizes.features, 1)):
        student, teacher = (_random(shape, sizes, device, seed) for seed in (0, 1))
        student.requires_grad_()
        for mode in ("mse", "normalized_mse", "cosine", "attention_transfer"):

            def ours(student: Tensor, mode: Any = mode, dim: int = dim, teacher: Tensor = teacher) -> Tensor:
                return feature_distance(student, teacher[: len(student)].to(student.dtype), mode, dim=dim)

            def eager(student: Tensor, mode: str = mode, dim: int = dim, teacher: Tensor = teacher) -> Tensor:
                return _eager_distance(student, teacher, mode, dim)

            candidates = {OURS: _both_ways(ours, student), "eager": _both_ways(eager, student)}
            candidates |= {name: _both_ways(made, student) for name, made in _compiled(eager, sizes).items()}
            yield Case(
                "features",
                f"{mode} {'x'.join(map(str, shape))} dim={dim}",
                candidates,
                floor_bytes=(4 if mode == "attention_transfer" else 3) * _bytes(student),
                gradient_bytes=_bytes(student),
                input_bytes=2 * _bytes(student),
                error=_loss_error(ours, (student[:1],)),
            )


# --- attention -------------------------------------------------------------------------------------------------------


def random_blocks(heads: int, blocks: int, sparsity: float, device: torch.device) -> Tensor:
    """``(1, heads, blocks, blocks)``: as many blocks in every row, drawn, the diagonal among them."""
    kept = max(1, round(blocks * (1 - sparsity)))
    scores = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(0)).to(device)
    scores.diagonal(dim1=-2, dim2=-1).fill_(2.0)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(kept, dim=-1).indices, True)


def attention_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """`block_sparse_attention`, forward alone and with its backward pass; and BLADE's probe and lists."""
    for length in sizes.lengths:
        for width in sizes.widths:
            q, k, v, upstream = (_random((1, sizes.heads, length, width), sizes, device, seed) for seed in range(4))
            yield _probe_case(q, k, sizes)
            for sparsity in sizes.sparsities:
                mask = random_blocks(sizes.heads, -(-length // sizes.block_size), sparsity, device)
                for backward in (False, True):
                    yield _attention_case(q, k, v, upstream, mask, sparsity, sizes, backward)


def _attention_case(
    q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, mask: Tensor, sparsity: float, sizes: Sizes, backward: bool
) -> Case:
    indices, block = BlockIndices.of(mask), sizes.block_size

    def run(attend: Callable[..., Tensor]) -> Callable[[], Any]:
        if not backward:
            return lambda: attend(q, k, v)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        return lambda: torch.autograd.grad(attend(*inputs), inputs, upstream)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, indices, block_size=block)

    candidates = {OURS: run(ours)}
    if q.is_cuda:
        candidates["dense flash"] = run(_with(SDPBackend.FLASH_ATTENTION))
        candidates["dense cuDNN"] = run(_with(SDPBackend.CUDNN_ATTENTION))
        candidates["FlexAttention"] = run(_flex(mask, q.shape[2], block))
    else:
        seen = dense_mask(mask, q.shape[2], k.shape[2], block)
        candidates["dense with the mask"] = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
    pairs = int(mask.sum())
    return Case(
        "attention",
        f"{'forward+backward' if backward else 'forward'} N={q.shape[2]} D={q.shape[3]} {sparsity:.0%} sparse",
        candidates,
        floor_operations=(14.0 if backward else 4.0) * pairs * block * block * q.shape[3],
        gradient_bytes=_bytes(q, k, v) if backward else _bytes(q),
        input_bytes=_bytes(q, k, v),
        error=lambda: _attention_error(q, k, v, upstream, block),
    )


def _attention_error(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, block: int) -> float:
    """Output and gradients of one head over a few blocks against dense attention in float64."""
    length = min(q.shape[2], 5 * block - 3)
    *narrow, of_output = (x[:, :1, :length].detach() for x in (q, k, v, upstream))
    mask = random_blocks(1, -(-length // block), 0.5, q.device)
    narrow = [x.requires_grad_() for x in narrow]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    output = block_sparse_attention(*narrow, mask, block_size=block)
    expected = F.scaled_dot_product_attention(*wide, attn_mask=dense_mask(mask, length, length, block))
    got = torch.autograd.grad(output, narrow, of_output)
    return _distance((output, *got), (expected, *torch.autograd.grad(expected, wide, of_output.double())))


def _with(kind: SDPBackend) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def _flex(mask: Tensor, length: int, block: int) -> Callable[..., Tensor]:
    """FlexAttention, compiled, with the same blocks, all of them full."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts = mask.sum(dim=-1, dtype=torch.int32)
    order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    none = torch.zeros_like(counts)
    blocks = BlockMask.from_kv_blocks(
        none, order, counts, order, BLOCK_SIZE=block, mask_mod=None, seq_lengths=(length, length)
    )
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


def _probe_case(q: Tensor, k: Tensor, sizes: Sizes) -> Case:
    block = sizes.block_size
    offsets = evenly_spaced_offsets(block, block // 4).to(q.device).expand(*q.shape[:2], -1)

    def ours() -> BlockIndices:
        mask = energy_block_mask(block_importance(q, k, offsets, offsets, block))
        return BlockIndices.of(mask, capacity=mask.numel())

    def error() -> float:
        few = [x[:, :1, : 5 * block] for x in (q, k)]
        got = block_importance(*few, offsets[:, :1], offsets[:, :1], block)
        with backend("reference"):
            expected = block_importance(*(x.double() for x in few), offsets[:, :1], offsets[:, :1], block)
        return _distance((got,), (expected,))

    return Case("attention", f"mask of BLADE N={q.shape[2]} D={q.shape[3]}", {OURS: ours}, error=error)


SUITES: dict[str, Callable[[Sizes, torch.device], Iterator[Case]]] = {
    "kl": kl_cases,
    "dense": dense_cases,
    "ce_and_kl": objective_cases,
    "linear": linear_cases,
    "features": feature_cases,
    "attention": attention_cases,
}
"""Cases by the name of their group, as ``--only`` takes it."""
