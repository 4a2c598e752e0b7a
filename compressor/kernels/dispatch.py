"""Which implementation a call takes: Triton on CUDA tensors, the PyTorch reference elsewhere."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import os
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import RequestError, nearest

__all__ = ["Backend", "backend", "family_of_capability", "gpu_family", "use_triton"]

Backend = Literal["auto", "triton", "reference"]
_BACKENDS = ("auto", "triton", "reference")
_chosen: contextvars.ContextVar[Backend] = contextvars.ContextVar("compressor_kernel_backend", default="auto")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels read and write; they compute in float32. Anything else goes to the references."""


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the implementation within a ``with`` block.

    Args:
        name: "auto" (Triton for CUDA tensors), "triton" (Triton always: on the CPU this needs the environment
            variable ``TRITON_INTERPRET=1``, set before the process first imports triton) or "reference".

    Raises:
        RequestError: There is no such implementation.
    """
    if name not in _BACKENDS:
        raise RequestError(f"no kernel backend is named {name!r}: {nearest(name, _BACKENDS)}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def use_triton(*tensors: Tensor, matrix_products: bool = False) -> bool:
    """Whether a call on these tensors goes to Triton.

    Args:
        tensors: The floating-point inputs of the call.
        matrix_products: Whether the kernel multiplies matrices.

    Returns:
        True where the kernels can take the tensors and are wanted. An export always takes the reference, because a
        graph that leaves torch knows no Triton.

    Raises:
        RequestError: "triton" was chosen for tensors that no kernel here can take.
    """
    chosen = _chosen.get()
    if chosen == "reference" or _exporting():
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if matrix_products and interpreted and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return False  # Triton's interpreter takes the bits of bfloat16 matrices for integers
    on_cuda = all(tensor.is_cuda for tensor in tensors)
    known = all(tensor.dtype in KERNEL_DTYPES for tensor in tensors)
    if chosen == "auto":
        return on_cuda and known and _HAS_TRITON
    if not _HAS_TRITON:
        raise RequestError("the triton backend was chosen but triton is not installed: pip install triton")
    if not known:
        raise RequestError("the triton backend takes float32, float16 and bfloat16 tensors only")
    if not on_cuda and not interpreted:
        raise RequestError("the triton backend needs CUDA tensors, or TRITON_INTERPRET=1 set before triton's import")
    return True


def _exporting() -> bool:
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def gpu_family(device: torch.device) -> str:
    """The name under which the configuration tables know a device.

    Args:
        device: A CUDA device; any other (the interpreter) is served the most modest family.

    Returns:
        "ampere" (sm_80), "ada" (sm_86 and sm_89: 99 KB of shared memory), "hopper" (sm_90), "blackwell" (sm_100,
        sm_103) or "blackwell-consumer" (sm_120). Unknown devices count as "ada", whose needs are smallest.
    """
    if device.type != "cuda":
        return "ada"
    return family_of_capability(*torch.cuda.get_device_capability(device))


def family_of_capability(major: int, minor: int) -> str:
    """`gpu_family` by compute capability."""
    if major >= 12:
        return "blackwell-consumer"
    if major >= 10:
        return "blackwell"
    if major == 9:
        return "hopper"
    return "ampere" if (major, minor) == (8, 0) else "ada"
