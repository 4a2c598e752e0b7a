"""Load damaged and hostile bundles for a set time: how many were tried, and what was not the project's own error.

python benchmarks/fuzz_bundles.py --seconds 60 --out benchmarks/results/fuzz_bundles.json

Every case starts from a good bundle and changes one thing: bytes of the file, fields of its entries, names, a value of
the manifest, arrays, or a graph (with the hashes made right again, so that what lies behind them is reached). It must
load and run, or be refused by a `CompressorError` of one line; anything else is a finding, and its bundle is kept.
Changed graphs are walked for references, not given to an engine: what an engine makes of them is the engine's.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import random
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from compressor.errors import CompressorError
from compressor.exporters.bundle import write_bundle
from compressor.profiles.memory import peak_rss_mb
from compressor.runtimes import load
from compressor.runtimes.bundle import check_bundle, unpack
from tests.small_artifacts import classifier, generator

Files = dict[str, bytes]

NAMES = (
    "../outside", "/outside", "a/../../outside", "C:\\outside", "a\\b", "nul", "con.txt", "a.", "a ", "MANIFEST.json",
    "a/b", "a", "A", "x" * 300, "\u202e", "caf\u00e9", "cafe\u0301", ".", "..", "", "a//b", "a\x01", "~/outside",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -(2**70), 1e308, 0.5, "", "a", "../outside", "/etc/passwd", "\0",
    "NaN", "x" * 5000, [], {}, [[]], [0], [None], ["batch"], [10**9, 10**9], {"": 0}, {"a": {"b": []}}, "\ud800",
    float("nan"), float("inf"), [1] * 1000, "O", "float128", "<U9", "onnxruntime", "openvino", "sampler", "predict",
)  # fmt: skip


def packed(files: Files, packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of files, by the standard library."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", packing) as archive:
        warnings.simplefilter("ignore")
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def hashed(files: Files) -> Files:
    """The files with a manifest whose hashes are right."""
    facts = json.loads(files["manifest.json"])
    for graph in facts["graphs"].values():
        graph["sha256"] = hashlib.sha256(files[graph["file"]]).hexdigest()
    if facts["assets"]["file"]:
        facts["assets"]["sha256"] = hashlib.sha256(files[facts["assets"]["file"]]).hexdigest()
    return {**files, "manifest.json": json.dumps(facts).encode()}


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, put in, left out, or repeated."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, length = rng.randrange(len(out) + 1), rng.choice((1, 2, 4, 16, 200))
        kind = rng.randrange(5)
        if kind == 0:
            out[place : place + length] = rng.randbytes(min(length, len(out) - place))
        elif kind == 1:
            out[place:place] = rng.randbytes(length)
        elif kind == 2:
            del out[place : place + length]
        elif kind == 3:
            out[place:place] = out[max(0, place - length) : place]
        else:
            out[place : place + 4] = struct.pack("<L", rng.choice((0, 1, 2**31, 2**32 - 1, 0xFFFF)))[: len(out) - place]
        if not out:
            break
    return bytes(out)


def of_bytes(files: Files, rng: random.Random) -> bytes:
    """The whole file changed, or cut short."""
    data = packed(files, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return data[: rng.randrange(len(data))] if rng.random() < 0.2 else changed_bytes(data, rng)


def of_fields(files: Files, rng: random.Random) -> bytes:
    """A field of an entry, in the list of files or before its data, or of the end record."""
    data = bytearray(packed(files))
    mark, layout = rng.choice(
        ((b"PK\x01\x02", "<4s6H3L5H2L"), (b"PK\x03\x04", "<4s5H3L2H"), (b"PK\x05\x06", "<4s4H2LH"))
    )
    places = [k for k in range(len(data) - 3) if data[k : k + 4] == mark]
    place = rng.choice(places)
    fields = list(struct.unpack_from(layout, data, place))
    number = rng.randrange(1, len(fields))
    fields[number] = rng.choice((0, 1, 8, fields[number] + 1, max(fields[number] - 1, 0), 0x7FFF, 0xFFFF))
    struct.pack_into(layout, data, place, *fields)
    return bytes(data)


def of_names(files: Files, rng: random.Random) -> bytes:
    """A file more under a bad name, or the right files under other names."""
    name, content = rng.choice(NAMES), rng.randbytes(20)
    facts = json.loads(files["manifest.json"])
    if rng.random() < 0.7:
        facts["files"][name] = hashlib.sha256(content).hexdigest()
    more = {**files, "manifest.json": json.dumps(facts).encode()}
    if rng.random() < 0.3:
        more[rng.choice(sorted(files)).upper()] = content
    data = packed({**more, name or "empty": content})
    return data.replace(b"empty", b"\0mpty") if not name else data


def of_manifest(files: Files, rng: random.Random) -> bytes:
    """A value anywhere in the manifest replaced, left out, or put in."""
    facts = json.loads(files["manifest.json"])
    node: Any = facts
    key: Any = rng.choice(sorted(facts))
    while isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.85:
        node = node[key]
        key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(NAMES)] = rng.choice(VALUES)
    else:
        node[key] = rng.choice(VALUES)
    text = json.dumps(facts)
    if kind == 5:
        text = changed_bytes(text.encode(), rng).decode("latin1")
    return packed({**files, "manifest.json": text.encode("utf-8", "surrogatepass")})


def of_arrays(files: Files, rng: random.Random) -> bytes:
    """The arrays damaged, whole or one by one, with the right hash."""
    if "assets.npz" not in files:
        return of_manifest(files, rng)
    with zipfile.ZipFile(io.BytesIO(files["assets.npz"])) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(inside))
    inside[name] = changed_bytes(inside[name][:128], rng) + inside[name][128:]
    data = packed(inside)
    return packed(hashed({**files, "assets.npz": changed_bytes(data, rng) if rng.random() < 0.4 else data}))


def of_graph(files: Files, rng: random.Random) -> bytes:
    """The graph damaged, with the right hash."""
    name = next(name for name in files if name.endswith(".onnx"))
    return packed(hashed({**files, name: changed_bytes(files[name], rng)}))


KINDS: dict[str, Callable[[Files, random.Random], bytes]] = {
    "bytes": of_bytes, "fields": of_fields, "names": of_names, "manifest": of_manifest, "arrays": of_arrays,
    "graph": of_graph,
}  # fmt: skip


def good_bundles(folder: Path) -> list[Files]:
    """The files of the bundles that cases start from."""
    found = []
    for number, artifact in enumerate((classifier(folder / "looks"), generator(folder / "draws"))):
        path = folder / f"{number}.zip"
        write_bundle(artifact, path)
        with zipfile.ZipFile(path) as archive:
            found.append({name: archive.read(name) for name in archive.namelist()})
    return found


def attempt(kind: str, path: Path) -> str:
    """Load and run a bundle: "loaded" or "refused"; anything else is raised."""
    try:
        if kind == "graph":
            with unpack(path):
                return "loaded"
        check_bundle(path)
        warnings.simplefilter("ignore")  # numpy's, of arithmetic with values that a manifest made up
        with load(path, {"threads": 1, "providers": ["CPUExecutionProvider"]}) as model:
            port = model.inputs[0]
            model(label=0) if port.kind == "label" else model([[0.5] * 4] * 4)
        return "loaded"
    except CompressorError as error:
        if "\n" in str(error) or not str(error) or len(str(error)) > 1500:
            raise AssertionError(f"not one line: {error!r:.300}") from error
        return "refused"


def fuzz(seconds: float, seed: int, keep: Path | None = None) -> dict[str, Any]:
    """Try cases for a time.

    Returns:
        Cases and outcomes by kind, findings, the slowest case and the memory that all of them took.
    """
    rng = random.Random(seed)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    findings: list[dict[str, str]] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        yard = Path(name)
        bundles = good_bundles(yard / "made")
        (yard / "temporary").mkdir()
        previous, tempfile.tempdir = tempfile.tempdir, str(yard / "temporary")
        try:
            before = peak_rss_mb()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                kind = rng.choice(sorted(KINDS))
                path = yard / "case.zip"
                path.write_bytes(KINDS[kind](rng.choice(bundles), rng))
                start = time.monotonic()
                try:
                    outcome = attempt(kind, path)
                    left = {entry.name for entry in (*yard.iterdir(), *(yard / "temporary").iterdir())}
                    if left != {"made", "temporary", "case.zip"}:
                        raise AssertionError(f"left behind: {sorted(left)}")
                except Exception as error:  # what is looked for
                    outcome = "finding"
                    last = traceback.extract_tb(error.__traceback__)[-1]
                    findings.append({"kind": kind, "error": f"{error!r:.300}", "at": f"{last.filename}:{last.lineno}"})
                    if keep is not None:
                        keep.mkdir(parents=True, exist_ok=True)
                        (keep / f"{len(findings)}.zip").write_bytes(path.read_bytes())
                counts[kind][outcome] += 1
                slowest = max(slowest, time.monotonic() - start)
            after = peak_rss_mb()
        finally:
            tempfile.tempdir = previous
    return {
        "command": f"python benchmarks/fuzz_bundles.py --seconds {seconds:g} --seed {seed}",
        "python": platform.python_version(),
        "cases": sum(sum(found.values()) for found in counts.values()),
        "outcomes": {kind: dict(sorted(found.items())) for kind, found in counts.items()},
        "slowest_ms": round(slowest * 1000, 1),
        "memory_grown_mb": round(after - before, 1),
        "findings": findings,
    }


def main() -> int:
    """Fuzz, print the result as JSON; 1 if there was a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the bundles of findings")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    result = fuzz(options.seconds, options.seed, options.keep)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
