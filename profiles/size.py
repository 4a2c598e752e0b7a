"""How big a model is: bytes on disk, parameters, multiply-accumulate operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["macs", "parameter_count", "share_of_zeros", "total_bytes"]


def total_bytes(paths: Path | Iterable[Path]) -> int:
    """Bytes of a file, of all regular files below a directory, or of several of these; links are not followed.

    Raises:
        RequestError: A path does not exist.
    """
    total = 0
    for path in [Path(paths)] if isinstance(paths, (str, Path)) else map(Path, paths):
        if not path.exists():
            raise RequestError(f"cannot measure the size of {path}: there is no such file or directory")
        files = path.rglob("*") if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())
    return total


def parameter_count(module: nn.Module) -> int:
    """Number of parameters; shared ones count once. Buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def share_of_zeros(module: nn.Module) -> float:
    """Share of the parameters that are exactly zero, in [0, 1]; 0 for a module without parameters."""
    zeros = sum(int((parameter == 0).sum()) for parameter in module.parameters())
    return zeros / max(parameter_count(module), 1)


def macs(module: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Multiply-accumulate operations of one call ``module(**inputs)``, counted while it runs.

    Counts matrix products, convolutions and attention, which is where the work is; element-wise operations are free.
    Divide by the batch size of the inputs for a figure per sample.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    was_training, fused = module.training, torch.backends.mha.get_fastpath_enabled()
    module.eval()
    counter = FlopCounterMode(display=False)
    try:
        # The counter does not know every fused attention operator; the plain one is made of matrix products.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            module(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        module.train(was_training)
    return counter.get_total_flops() // 2
