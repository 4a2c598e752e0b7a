"""Models of the hub: a pipeline's repository as it lies in the cache, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from diffusers import DDIMScheduler

from tests.tiny_transformers import tiny


def test_a_pipeline_of_the_hub_is_loaded_with_its_scheduler(tmp_path: Path) -> None:
    repository, revision = tmp_path / "models--own--pipeline", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    tiny("DiTTransformer2DModel").module.save_pretrained(snapshot / "transformer")
    DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(snapshot / "scheduler")
    code = (
        "from compressor.models.spec import load_model_spec\n"
        "info = load_model_spec('diffusers:own/pipeline').info\n"
        "print(info.architecture, info.extra['scheduler']['beta_schedule'])\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["DiTTransformer2DModel", "scaled_linear"], done.stderr
