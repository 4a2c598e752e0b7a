"""What importing `compressor.kernels` gives and costs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compressor.kernels
from compressor.errors import RequestError
from compressor.kernels import dispatch


def test_importing_the_package_imports_neither_torch_nor_triton():
    code = "import sys, compressor.kernels; print({'torch', 'triton'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_every_public_name_can_be_had():
    for name in compressor.kernels.__all__:
        assert getattr(compressor.kernels, name) is not None
    with pytest.raises(AttributeError):
        _ = compressor.kernels.no_such_kernel


def test_the_kernels_page_names_every_function_and_its_snippet_runs():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "kernels.md").read_text(encoding="utf-8")
    for name in ("kl_div_from_logits", "ce_and_kl", "linear_kl_div", "feature_distance", "block_sparse_attention"):
        assert f"`{name}`" in page
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(snippet, names)
    assert names["student"].grad.abs().sum() > 0
    program = (root / "benchmarks" / "kernels.py").read_text(encoding="utf-8")
    commands = re.findall(r"^python benchmarks/kernels.py(.*?)(?:#|$)", page, re.MULTILINE)
    assert len(commands) == 4
    for option in " ".join(commands).split():
        assert f'"{option}"' in program, option


def test_unknown_backend_is_refused_with_the_nearest_name():
    with pytest.raises(RequestError, match="did you mean triton"), dispatch.backend("tritn"):
        pass


def test_cpu_tensors_take_the_reference_and_float64_is_never_given_to_a_kernel():
    assert not dispatch.use_triton(torch.zeros(1))
    with dispatch.backend("triton"), pytest.raises(RequestError, match="float32, float16 and bfloat16"):
        dispatch.use_triton(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        ((8, 0), "ampere"),
        ((8, 6), "ada"),
        ((8, 9), "ada"),
        ((9, 0), "hopper"),
        ((10, 0), "blackwell"),
        ((10, 3), "blackwell"),
        ((12, 0), "blackwell-consumer"),
    ],
)
def test_capabilities_belong_to_families(capability, family):
    assert dispatch.family_of_capability(*capability) == family
