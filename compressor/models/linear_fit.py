"""Least squares for residual affine maps, over as many batches as it takes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LeastSquares", "LinearMap"]

LinearMap = tuple[Tensor, Tensor]
"""Weight (d, d) and bias (d,) of ``x -> x + W x + b``."""


class LeastSquares:
    """Fits ``y ~ x + W x + b``: adds up ``[x, 1]^T [x, 1]`` and ``[x, 1]^T (y - x)`` in float64."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take a batch of rows, both (..., d)."""
        width = inputs.shape[-1]
        x = inputs.detach().reshape(-1, width).double()
        design = torch.cat([x, x.new_ones(len(x), 1)], 1)
        gram, cross = design.T @ design, design.T @ (outputs.detach().reshape(-1, width).double() - x)
        self.gram = gram if self.gram is None else self.gram + gram
        self.cross = cross if self.cross is None else self.cross + cross

    def solve(self) -> LinearMap:
        """The minimum-norm solution in float32.

        Raises:
            ValueError: No rows were added.
        """
        if self.gram is None or self.cross is None:
            raise ValueError("no rows were added")
        # the Gram matrix squares the condition number: directions below the cut are noise
        solution = (torch.linalg.pinv(self.gram, hermitian=True, rtol=1e-10) @ self.cross).float()
        return solution[:-1].T.contiguous(), solution[-1].contiguous()
