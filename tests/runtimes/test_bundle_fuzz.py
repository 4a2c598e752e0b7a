"""The fuzzing script runs, tries every kind of damage, and finds nothing in the time that a test has."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SECONDS = 4


def test_fuzzing_finds_nothing_in_a_few_seconds(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)  # another every time; the result names it
    script = ROOT / "benchmarks" / "fuzz_bundles.py"
    command = [sys.executable, script, "--seconds", str(SECONDS), "--seed", str(seed), "--out", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    result = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == 0 and result["findings"] == [], result
    assert set(result["outcomes"]) == {"bytes", "fields", "names", "manifest", "arrays", "graph"}
    assert all(found.get("refused", 0) > 0 for found in result["outcomes"].values()), result["outcomes"]
    assert result["cases"] > 20 and str(seed) in result["command"]
