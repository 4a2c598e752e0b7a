"""`--help` and a mistyped name pay for imports that only work needs."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["run", "--method", "ppcll"], 2)])
def test_answer_without_work_imports_no_framework(arguments, code):
    script = (
        "import sys; from compressor.cli.app import execute\n"
        f"code = execute({arguments!r})\n"
        "bad = {'torch', 'diffusers', 'transformers', 'timm', 'onnxruntime', 'openvino'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
