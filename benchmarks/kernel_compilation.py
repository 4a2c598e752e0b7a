"""Compile every kernel for GPUs that need not be here, and report registers, shared memory, spills and instructions.

What is compiled is what would be launched: the launch functions run on tensors without storage, and their kernels are
replaced by recorders. ``python benchmarks/kernels.py --compile-only`` prints the table; the tests use the same
functions. No number here is a time.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compressor.kernels import (
    adaptive_mask_triton,
    block_indices_triton,
    dispatch,
    feature_matching_triton,
    gradient_scale_triton,
    kl_divergence_triton,
    sparse_attention_triton,
)

CAPABILITIES = (80, 86, 89, 90, 100, 120)
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KB that one program can have."""
KERNELS = {
    kl_divergence_triton: ("whole_rows_kernel", "long_rows_kernel"),
    gradient_scale_triton: ("scale_rows_kernel",),
    feature_matching_triton: ("distance_kernel", "power_sum_kernel", "power_gradient_kernel"),
    block_indices_triton: ("fill_lists_kernel",),
    adaptive_mask_triton: ("probe_kernel",),
    sparse_attention_triton: (
        "forward_kernel",
        "delta_kernel",
        "query_gradient_kernel",
        "key_gradient_kernel",
    ),
}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Case:
    """Something to compile: a function that launches kernels on tensors of the "meta" device."""

    name: str
    run: Callable[[], Any]


@dataclass
class Report:
    """What the compiler made of one kernel.

    Attributes:
        case: Which launch.
        kernel: Its kernel.
        capability: Compute capability, 90 for sm_90.
        num_warps: Warps of a program.
        registers: Registers a thread.
        shared_bytes: Shared memory of a program.
        stack_bytes: Local memory of a thread; a frame that nothing loads or stores holds no spilled register.
        spills: Instructions that load or store local memory: spilled registers.
        instructions: SASS instructions by kind, all of them under "all".
        entries_a_program: Entries of a row kernel's tile: its listing takes each of them through once, and through
            every walk where it walks longer rows. 0 for other kernels.
        bytes_an_entry: What must move for each of them: student and teacher read, gradient written.
    """

    case: str
    kernel: str
    capability: int
    num_warps: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int
    instructions: dict[str, int] = field(default_factory=dict)
    entries_a_program: int = 0
    bytes_an_entry: int = 0

    @property
    def programs_per_multiprocessor(self) -> int:
        """How many programs registers and shared memory admit at once (65,536 registers; at most 2,048 threads)."""
        threads = 32 * self.num_warps
        by_registers = 65536 // (max(self.registers, 16) * threads)
        by_shared = SHARED_MEMORY[self.capability] * 1024 // max(self.shared_bytes + 1024, 1)
        most_threads = 2048 if self.capability in (80, 90, 100) else 1536
        return max(0, min(by_registers, by_shared, most_threads // threads))

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"programs_per_multiprocessor": self.programs_per_multiprocessor}


class _Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*positional: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in _OPTIONS if name in named}
            arguments = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
            self.launches.append(Launch(self.kernel, arguments, options))

        return launch


@contextlib.contextmanager
def recording(capability: int) -> Iterator[list[Launch]]:
    """Note what is launched, as a GPU of that compute capability would be launched."""
    launches: list[Launch] = []
    family = dispatch.family_of_capability(capability // 10, capability % 10)
    with contextlib.ExitStack() as stack:
        for module, names in KERNELS.items():
            for name in names:
                stack.enter_context(mock.patch.object(module, name, _Recorder(getattr(module, name), launches)))
            if hasattr(module, "gpu_family"):
                stack.enter_context(mock.patch.object(module, "gpu_family", lambda device: family))
        yield launches


def compile_case(case: Case, capability: int) -> list[Report]:
    """Compile all kernels that a case launches, for one compute capability."""
    with recording(capability) as launches:
        case.run()
    return [_report(case.name, launch, capability) for launch in launches]


def _source(launch: Launch) -> ASTSource:
    """The kernel with its arguments' types, specialised as a launch specialises it."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        divisible = False
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            divisible = True
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _report(case: str, launch: Launch, capability: int) -> Report:
    compiled = triton.compile(_source(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(binaries / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _output(binaries / "nvdisasm", "-c", file.name)
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    counts = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]+)", sass, re.MULTILINE))
    kinds = (
        "LDG",
        "LDGSTS",
        "STG",
        "MUFU",
        "HMMA",
        "HGMMA",
        "UTCHMMA",
        "LDS",
        "LDSM",
        "STS",
        "BAR",
        "FFMA",
        "FMUL",
        "FADD",
    )
    return Report(
        case=case,
        kernel=launch.kernel.__name__,
        capability=capability,
        num_warps=launch.options.get("num_warps", 4),
        registers=int(numbers["REG"]),
        shared_bytes=compiled.metadata.shared,
        stack_bytes=int(numbers["STACK"]),
        spills=counts["LDL"] + counts["STL"],
        instructions={"all": sum(counts.values())} | {kind: counts[kind] for kind in kinds if counts[kind]},
        entries_a_program=_entries(launch),
        bytes_an_entry=3 * launch.arguments["student_ptr"].element_size() if _entries(launch) else 0,
    )


def _entries(launch: Launch) -> int:
    """Entries of the tile of a divergence kernel."""
    arguments, kernel = launch.arguments, launch.kernel.__name__
    if kernel == "whole_rows_kernel":
        return int(arguments["ROWS"] * arguments["columns"])
    return int(arguments["ROWS"] * arguments["BLOCK"]) if kernel == "long_rows_kernel" else 0


def _output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def divergence_case(
    rows: int, columns: int, mode: str, *, labels: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Case:
    """`kl_div_from_logits` or `ce_and_kl` on ``(rows, columns)``, with the gradient."""

    def run() -> None:
        kl_divergence_triton._launch(
            _meta(rows, columns, dtype=dtype),
            _meta(rows, columns, dtype=dtype),
            _meta(rows, dtype=torch.int64) if labels else None,
            _meta(rows, dtype=torch.float32),
            _meta(rows, dtype=torch.float32) if labels else None,
            2.0,
            kl_divergence_triton.MODE_NUMBERS[mode],
            0.5,
            [1],
            1.0,
            1.0,
            True,
        )

    what = "ce_and_kl" if labels else "kl"
    return Case(f"{what} {mode} {rows}x{columns} {_TYPES[dtype]}", run)


def dense_divergence_case(shape: tuple[int, int, int, int], dims: list[int], mode: str) -> Case:
    """`kl_div_from_logits` on a dense map."""

    def run() -> None:
        rows = _meta(*(size for axis, size in enumerate(shape) if axis not in dims), dtype=torch.float32)
        number = kl_divergence_triton.MODE_NUMBERS[mode]
        maps = _meta(*shape), _meta(*shape)
        kl_divergence_triton._launch(*maps, None, rows, None, 4.0, number, 0.5, dims, 1.0, 1.0, True)

    return Case(f"kl {mode} {'x'.join(map(str, shape))} dim={','.join(map(str, dims))} bf16", run)


def feature_cases() -> list[Case]:
    """Distances on maps and on tokens, attention maps, and the scaling of a stored gradient."""

    def distance(mode: str, shape: tuple[int, ...], axis: int) -> Case:
        places = [size for index, size in enumerate(shape) if index != axis]

        def run() -> None:
            feature_matching_triton._launch_distances(
                _meta(*shape), _meta(*shape), _meta(*places, dtype=torch.float32), mode, axis, True
            )

        return Case(f"feature {mode} {'x'.join(map(str, shape))} dim={axis} bf16", run)

    maps = (16, 256, 64, 64)
    return [
        *(distance(mode, (64, 197, 768), 2) for mode in feature_matching_triton.MODE_NUMBERS),
        distance("mse", maps, 1),
        distance("cosine", (8192, 32768), 1),
        Case("attention map 16x256x64x64", lambda: feature_matching_triton._launch_power_sums(_meta(*maps), 2.0, 1)),
        Case(
            "attention map gradient 16x256x64x64",
            lambda: feature_matching_triton._launch_power_gradient(
                _meta(*maps), _meta(16, 64, 64, dtype=torch.float32), 4.0, 1
            ),
        ),
        Case(
            "gradient scale 8192x32000",
            lambda: gradient_scale_triton._scale_in_place(_meta(8192, 32000), _meta(8192, dtype=torch.float32), [1]),
        ),
    ]


def attention_case(
    part: str,
    head_dim: int,
    block_size: int,
    *,
    length: int = 16384,
    causal: bool = False,
    padding: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """`block_sparse_attention` on ``(1, 16, length, head_dim)``: "forward" or "backward"."""

    def run() -> None:
        shape = (1, 16, length, head_dim)
        q, k, v = (_meta(*shape, dtype=dtype) for _ in range(3))
        padded = _meta(1, length, dtype=torch.bool) if padding else None
        lists = [_meta(16 * -(-length // block_size) + 1, dtype=torch.int32), _meta(1000, dtype=torch.int32)]
        options = ([1, 16], block_size, 0.125, causal)
        if part == "forward":
            sparse_attention_triton._forward(q, k, v, padded, *lists, *options)
        else:
            lse = _meta(*shape[:3], dtype=torch.float32)
            sparse_attention_triton._backward(
                q,
                k,
                v,
                padded,
                _meta(*shape, dtype=dtype),
                lse,
                _meta(*shape, dtype=dtype),
                lse,
                *lists,
                *lists,
                *options,
            )

    extras = "".join(
        [" causal" if causal else "", " padding" if padding else "", "" if length % block_size == 0 else " ragged"]
    )
    return Case(f"attention {part} D={head_dim} block={block_size}{extras} {_TYPES[dtype]}", run)


def probe_case(head_dim: int) -> Case:
    """`block_importance` with 32 samples of 128 blocks of 128 tokens."""

    def run() -> None:
        q, tokens = _meta(1, 16, 16384, head_dim), _meta(1, 16, 128, 32, dtype=torch.int64)
        adaptive_mask_triton._largest_weights(q, q, tokens, tokens)

    return Case(f"block importance D={head_dim} bf16", run)


def default_cases() -> list[Case]:
    """Every kernel in the configurations that its defaults choose for usual sizes."""
    cases = [
        divergence_case(8192, columns, mode, labels=labels)
        for columns in (1000, 4096, 16384, 32000, 131072)
        for mode in kl_divergence_triton.MODE_NUMBERS
        for labels in (False, True)
    ]
    cases += [divergence_case(8192, columns, "forward", dtype=torch.float32) for columns in (10, 1000, 50257)]
    cases += [
        dense_divergence_case((8, classes, 128, 128), dims, mode)
        for classes, dims in ((19, [1]), (150, [1]), (1000, [1]), (19, [2, 3]))
        for mode in ("forward", "jsd")
    ]
    cases += feature_cases()
    cases += [
        attention_case(part, head_dim, block_size)
        for part in ("forward", "backward")
        for head_dim in (64, 128)
        for block_size in (64, 128)
    ]
    cases += [
        attention_case(part, head_dim, 128, length=16000, causal=True, padding=True)
        for part in ("forward", "backward")
        for head_dim in (64, 128)
    ]
    cases += [
        attention_case(part, head_dim, 64, dtype=torch.float32)
        for part in ("forward", "backward")
        for head_dim in (64, 128)
    ]
    cases += [probe_case(head_dim) for head_dim in (64, 128)]
    cases.append(
        Case(
            "block lists 16x256x256",
            lambda: block_indices_triton._fill_lists(
                _meta(1, 16, 256, 256, dtype=torch.bool), _meta(16 * 256 + 1, dtype=torch.int32), 1000
            ),
        )
    )
    return cases


HEAD = (
    f"{'case':<53} {'kernel':<22} {'sm':>4} {'warps':>5} "
    f"{'regs':>5} {'shared':>7} {'spills':>6} {'fit':>4} {'instr':>6}"
)


def line(report: Report) -> str:
    """One line of the table under `HEAD`."""
    return (
        f"{report.case:<53} {report.kernel:<22} {report.capability:>4} {report.num_warps:>5} "
        f"{report.registers:>5} {report.shared_bytes:>7} {report.spills:>6} "
        f"{report.programs_per_multiprocessor:>4} {report.instructions['all']:>6}"
    )


def table(reports: list[Report]) -> str:
    """One line a kernel and GPU."""
    return "\n".join([HEAD, "-" * len(HEAD), *map(line, reports)])
