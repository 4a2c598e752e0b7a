"""Targets without an artifact: the module as PyTorch runs it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from compressor.deployable import Graph
from compressor.errors import TargetError
from compressor.profiles.target import load_target
from compressor.torch_targets import torch_run


def graph() -> Graph:
    torch.manual_seed(0)
    return Graph(nn.Linear(4, 3), {"input": torch.rand(2, 4)}, ("logits",), {"input": {0: "batch"}})


def test_compiled_module_gives_what_the_module_gives_at_any_batch():
    made, target = graph(), load_target("torch-compile-fp32").model_dump()
    run = torch_run(made, target)
    for batch in (1, 5):
        rows = np.random.default_rng(batch).random((batch, 4), dtype=np.float32)
        expected = made.module(torch.from_numpy(rows)).detach().numpy()
        assert np.allclose(run({"input": rows})["logits"], expected, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["torch-compile-fp16", "torch-trt-fp16"])
def test_target_of_a_gpu_says_that_none_is_here(name):
    with pytest.raises(TargetError, match="no NVIDIA GPU"):
        torch_run(graph(), load_target(name).model_dump())
