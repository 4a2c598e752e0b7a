"""How long the command line takes to answer: wall time of whole processes, medians.

python benchmarks/startup.py prints JSON: {"compress --help": {"median_s": ..., "min_s": ..., "max_s": ...}, ...}
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import compressor": ["-c", "import compressor"],
    "compress --help": ["-m", "compressor", "--help"],
    "compress run --help": ["-m", "compressor", "run", "--help"],
    "compress methods": ["-m", "compressor", "methods"],
    "compress targets --help": ["-m", "compressor", "targets", "--help"],
}


def measure(command: list[str], repeats: int) -> dict[str, float]:
    """Wall seconds of ``repeats`` processes, after one that warms the file cache."""
    seconds = []
    for number in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        if number:
            seconds.append(time.perf_counter() - start)
    return {
        "median_s": round(statistics.median(seconds), 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
    }


def main() -> None:
    """Measure all commands and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    print(json.dumps({name: measure(command, repeats) for name, command in COMMANDS.items()}, indent=2))


if __name__ == "__main__":
    main()
