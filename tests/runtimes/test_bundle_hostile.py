"""Bundles that are damaged or built to do harm: one clear line each, nothing written outside, bounded memory."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compressor.errors import ArtifactError, CompressorError, TargetError
from compressor.exporters.bundle import write_bundle
from compressor.runtimes import load
from compressor.runtimes.arrays import read_arrays
from compressor.runtimes.bundle import check_bundle, file_options, unpack
from compressor.runtimes.file_names import clashing_names, name_problem
from compressor.runtimes.onnx_references import external_references
from compressor.runtimes.plain_json import parse_json
from compressor.runtimes.zip_reader import Limits, ZipReader
from tests.small_artifacts import generator

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@functools.cache
def good_bundle() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(generator(Path(folder) / "artifact"), Path(folder) / "x.zip")
        return (Path(folder) / "x.zip").read_bytes()


def members() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(good_bundle())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def manifest() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(members()["manifest.json"])
    return value


def zip_of(files: list[tuple[str | zipfile.ZipInfo, bytes]], packing: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", packing) as archive:
        warnings.simplefilter("ignore")  # of names that stand twice
        for name, data in files:
            archive.writestr(name, data)
    return out.getvalue()


def with_file(name: str, data: bytes, *, listed: bool = True, packing: int = zipfile.ZIP_STORED) -> bytes:
    """The good bundle with one file more, which the manifest lists with its right hash."""
    files, facts = members(), manifest()
    if listed:
        facts["files"][name] = hashlib.sha256(data).hexdigest()
    files["manifest.json"] = json.dumps(facts).encode()
    return zip_of([*files.items(), (name, data)], packing)


def with_manifest(text: bytes) -> bytes:
    return zip_of([*({**members(), "manifest.json": text}).items()])


def edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    facts = manifest()
    edit(facts)
    return with_manifest(json.dumps(facts).encode())


@pytest.fixture
def yard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for bundles, beside a temporary folder of its own; whatever happens, nothing new may lie in either."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield tmp_path
    assert {path.name for path in tmp_path.rglob("*")} <= {"temporary", "x.zip"}


def refused(yard: Path, data: bytes, said: str, kind: type[CompressorError] = ArtifactError) -> None:
    (yard / "x.zip").write_bytes(data)
    with pytest.raises(kind, match=said) as caught:
        load(yard / "x.zip")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and "x.zip" in message


def test_good_bundle_loads(yard: Path) -> None:
    (yard / "x.zip").write_bytes(good_bundle())
    assert load(yard / "x.zip")(label=2).min() == 255


# --- the archive -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../outside", "a/../../outside", "/outside", "//outside", "C:/outside", "c:outside", "..\\outside", "a\\b",
        "nul", "CON.txt", "a/aux.onnx", "com1", "lpt¹.bin", "a/./b", "a//b", "./a", "a ", "a.", " a", "a:stream", "a*",
        "a\x01b", "a\x7f", "a\u202eb", "a\u200bb", "cafe\u0301", "x" * 256, "/".join("a" * 17),
    ],
)  # fmt: skip
def test_name_that_leaves_the_folder_or_is_none_on_some_system_is_refused(yard: Path, name: str) -> None:
    refused(yard, with_file(name, b"data"), "names? .*(is|holds|leaves|begins|too long)")


def test_name_with_a_nul_byte_is_refused(yard: Path) -> None:
    refused(yard, with_file("aXb", b"data").replace(b"aXb", b"a\0b"), "holds control or invisible characters")


def test_name_that_is_not_unicode_is_refused(yard: Path) -> None:
    refused(yard, with_file("aXb", b"data").replace(b"aXb", b"a\xffb"), "is not UTF-8")


@pytest.mark.parametrize("pair", [("a.bin", "A.BIN"), ("ﬁle", "file"), ("straße", "STRASSE"), ("a", "a/b"), ("a", "a")])
def test_names_that_are_one_file_are_refused(yard: Path, pair: tuple[str, str]) -> None:
    facts = manifest()
    facts["files"] = {name: hashlib.sha256(b"1").hexdigest() for name in pair}
    files = {**members(), "manifest.json": json.dumps(facts).encode()}
    refused(yard, zip_of([*files.items(), (pair[0], b"1"), (pair[1], b"1")]), "are one file on some systems")


@pytest.mark.parametrize("kind", [0o120777, 0o010644, 0o060644, 0o040755])
def test_links_and_special_files_are_refused(yard: Path, kind: int) -> None:
    entry = zipfile.ZipInfo("outside")
    entry.external_attr, entry.create_system = kind << 16, 3
    refused(yard, zip_of([*members().items(), (entry, b"/etc/passwd")]), "is a link or a special file")


def test_bomb_is_refused(yard: Path) -> None:
    bomb = with_file("zeros.bin", bytes(64 * 2**20), packing=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**20
    refused(yard, bomb, "unpacks to more than 100 times its size")


def test_bomb_inside_a_file_stays_packed(yard: Path) -> None:
    inside = zip_of([("zeros", bytes(64 * 2**20))], zipfile.ZIP_DEFLATED)
    (yard / "x.zip").write_bytes(with_file("inside.zip", inside, packing=zipfile.ZIP_DEFLATED))
    with unpack(yard / "x.zip") as (folder, _):
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 2**20


def lying(name: str, **values: int) -> bytes:
    """The good bundle with a deflated file whose entry in the list says something else of it."""
    data = with_file(name, os.urandom(1000) + bytes(5000), packing=zipfile.ZIP_DEFLATED)
    place = data.rindex(b"PK\x01\x02")
    fields = list(struct.unpack_from("<4s6H3L5H2L", data, place))
    for field, value in values.items():
        fields[{"crc": 7, "packed": 8, "size": 9, "method": 4, "flags": 3, "header": 16}[field]] = value
    return data[:place] + struct.pack("<4s6H3L5H2L", *fields) + data[place + 46 :]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"size": 5999}, "unpacks to more than the 5999 bytes|two different things"),
        ({"size": 6001}, "two different things|not what was packed"),
        ({"crc": 1}, "is not what was packed"),
        ({"packed": 5}, "two different things|ends early"),
        ({"packed": 2**31}, "overlaps the list of files"),
        ({"method": 12}, "in a way that is not read"),
        ({"method": 0}, "in a way that is not read"),
        ({"flags": 1}, "is encrypted"),
        ({"header": 0}, "overlaps another file|two different things"),
        ({"header": 2**31}, "overlaps another file"),
        ({"size": 2**32 - 1, "packed": 2**32 - 1}, "unpacks to more|has no size|overlaps"),
    ],
)
def test_entry_that_says_what_is_not_so_is_refused(yard: Path, values: dict[str, int], said: str) -> None:
    refused(yard, lying("extra.bin", **values), said)


def test_sizes_that_follow_the_data_are_not_believed(yard: Path) -> None:
    """With bit 3 the first copy of the sizes is empty: only what is unpacked counts."""

    class Stream(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, piece: Any) -> int:
            self.data += bytes(piece)
            return len(bytes(piece))

    out = Stream()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        for name, content in members().items():
            archive.writestr(name, content)
    (yard / "x.zip").write_bytes(bytes(out.data))
    check_bundle(yard / "x.zip")
    place = out.data.rindex(b"PK\x01\x02")
    struct.pack_into("<L", out.data, place + 24, 10)
    refused(yard, bytes(out.data), "unpacks to more than the 10 bytes|not what was packed|differs")


def test_entries_that_share_bytes_are_refused(yard: Path) -> None:
    """Many names for one kernel of compressed zeros: small, and enormous when unpacked."""
    kernel = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = kernel.compress(bytes(2**20)) + kernel.flush()
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 8, 0, 0, zlib.crc32(bytes(2**20)), len(packed), 2**20, 1, 0)
    body = local + b"a" + packed
    central = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, zlib.crc32(bytes(2**20)), len(packed), 2**20,
                    1, 0, 0, 0, 0, 0, 0) + bytes([97 + k]) for k in range(8)
    )  # fmt: skip
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 8, 8, len(central), len(body), 0)
    refused(yard, body + central + end, "overlaps another file")


def test_too_many_entries_and_too_much_data_are_refused(yard: Path) -> None:
    refused(yard, zip_of([(f"f{k}", b"") for k in range(5000)]), "lists more than 4096 files")
    (yard / "x.zip").write_bytes(good_bundle())
    with pytest.raises(ArtifactError, match="unpacks to"):
        ZipReader(yard / "x.zip", Limits(total_bytes=1000))


def test_count_that_is_not_so_is_refused_without_reading_as_much(yard: Path) -> None:
    data = bytearray(good_bundle())
    struct.pack_into("<2H", data, len(data) - 22 + 8, 65534, 65534)
    refused(yard, bytes(data), "lists more than 4096 files")


@pytest.mark.parametrize("keep", [0, 1, 21, 22, 100, 0.5, 0.9, -1, -22])
def test_bundle_cut_short_is_refused(yard: Path, keep: float) -> None:
    data = good_bundle()
    end = int(len(data) * keep) if isinstance(keep, float) else keep
    refused(yard, data[:end], "is no bundle|tampered|damaged")


@pytest.mark.parametrize("place", ["before", "behind"])
def test_bytes_around_the_archive_are_refused(yard: Path, place: str) -> None:
    data = b"#!/bin/sh\n" + good_bundle() if place == "before" else good_bundle() + b"more"
    refused(yard, data, "not where it says|bytes behind its end|is no zip")


def test_file_without_a_hash_and_hash_without_a_file_are_refused(yard: Path) -> None:
    refused(yard, with_file("extra.bin", b"data", listed=False), "'extra.bin', which no hash protects")
    refused(yard, edited(lambda m: m["files"].update({"missing.bin": "0" * 64})), "lacks 'missing.bin'")
    refused(yard, zip_of([("readme.txt", b"hello")]), "has no manifest.json")


@pytest.mark.parametrize("name", ["denoiser.onnx", "assets.npz"])
def test_wrong_hash_is_refused(yard: Path, name: str) -> None:
    files = members()
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    refused(yard, zip_of([*files.items()]), f"{name} differs from the manifest")


# --- the manifest ----------------------------------------------------------------------------------------------------


def shape(*sizes: object) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["graphs"]["denoiser"]["inputs"][0].update(shape=list(sizes))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m.update(schema_version=2), "has schema 2; this version reads 1"),
        (lambda m: m.update(schema_version="1" * 10_000), "has schema"),
        (lambda m: m.pop("schema_version"), "has schema None"),
        (lambda m: m.update(surprise=1), "damaged: surprise"),
        (lambda m: m["metadata"].update(x=float("nan")), "NaN is no JSON number"),
        (lambda m: m["metadata"].update(x=float("inf")), "Infinity is no JSON number"),
        (lambda m: m["metadata"].update(x="\ud800"), "half a character"),
        (shape("batch", 10**12), "has a shape that no engine takes"),
        (shape("batch", 2**20, 2**20), "has a shape that no engine takes"),
        (shape("batch", -1), "has a shape that no engine takes"),
        (shape(*["a"] * 40), "has a shape that no engine takes"),
        (lambda m: m["graphs"]["denoiser"]["inputs"][0].update(dtype="O"), "unknown element type 'O'"),
        (lambda m: m["graphs"]["denoiser"].update(file="../outside"), "lacks '../outside'"),
        (lambda m: m["graphs"]["denoiser"].update(file="manifest.json"), "which no hash protects"),
        (lambda m: m["assets"].update(file="denoiser.onnx"), "two hashes"),
        (lambda m: m["files"].update({"ASSETS.npz": "0" * 64}), "are one file on some systems"),
        (lambda m: m["driver"].update(name="../../evil"), "no driver"),
        (lambda m: m["driver"].update(name="__init__"), "no driver"),
        (lambda m: m["driver"].update(name="x" * 5000), "driver.name: .* at most 200"),
        (lambda m: m["engine"].update(name="x" * 5000), "engine.name: .* at most 200"),
        (lambda m: m["driver"]["settings"].update(shape=["x" * 5000]), "the driver 'sampler' cannot use"),
        (lambda m: m["driver"]["settings"].update(shape=[10**6, 10**6, 10**6]), "cannot use the shape"),
        (lambda m: m["driver"]["settings"].update(shape=[1, 0, 2]), "cannot use the shape"),
        (lambda m: m["driver"]["settings"].update(shape="abc"), "the driver 'sampler' cannot use"),
        (lambda m: m["driver"]["settings"].update(clip=[]), "the driver 'sampler' cannot use"),
        (lambda m: m["driver"]["settings"].pop("shape"), "misses 'shape'"),
        (lambda m: m["target"].update(options=3), "not what a target has"),
        (lambda m: m["target"]["options"].update(threads=10**9), "threads must be 0 to 1024"),
        (lambda m: m["target"]["options"].update(properties={"CACHE_DIR": "x"}), "that name files .CACHE_DIR"),
        (lambda m: m["target"]["options"].update(properties=[1]), "not what a target has"),
        (lambda m: m["engine"].update(name="shell"), "no runtime 'shell'"),
    ],
)  # fmt: skip
def test_manifest_that_lies_is_refused(yard: Path, edit: Callable[[dict[str, Any]], object], said: str) -> None:
    (yard / "x.zip").write_bytes(edited(edit))
    with pytest.raises(CompressorError, match=said) as caught:
        load(yard / "x.zip")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("depth", [40, 1000, 200_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_deep_json_is_refused(yard: Path, depth: int, brackets: str) -> None:
    opening = "[" if brackets == "[]" else '{"a":'
    deep = opening * depth + "1" + brackets[1] * depth
    text = json.dumps(manifest()).replace('"metadata": {}', f'"metadata": {{"x": {deep}}}')
    assert deep in text
    refused(yard, with_manifest(text.encode()), "nested deeper than 32 levels")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "damaged"),
        (b"[]", "has schema None"),
        (b"{", "damaged"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"schema_version": 1, "schema_version": 1}', "stands twice"),
        (b'{"x": 1e999}', "too large"),
        (b'{"x": ' + b"9" * 5000 + b"}", "damaged"),
        (b'{"schema_version": 1}', "damaged: target"),
        (b'"' + b"x" * (17 * 2**20) + b'"', "larger than 16 MB"),
    ],
)
def test_manifest_that_is_none_is_refused(yard: Path, text: bytes, said: str) -> None:
    refused(yard, with_manifest(text), said)


def test_options_that_name_files_are_found_wherever_they_hide() -> None:
    options = {
        "properties": {"PERFORMANCE_HINT": "LATENCY", "NESTED": {"X": ["ok", "/etc"]}, "cache_dir": 1},
        "provider_options": {"Tensorrt": {"trt_extra_plugin_lib_paths": "evil.so", "trt_fp16_enable": "1"}},
    }
    assert file_options({"options": options}) == ["X", "cache_dir", "trt_extra_plugin_lib_paths"]


# --- arrays and graphs -----------------------------------------------------------------------------------------------


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}"), "do not agree"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,)}", bytes(16)), "do not agree"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "object|numbers"),
        (npy("{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}", bytes(16)), "numbers"),
        (npy("{'descr': [('a', 'O')], 'fortran_order': False, 'shape': (1,)}", bytes(8)), "numbers"),
        (npy("__import__('os').system('touch outside')"), "header|malformed"),
        (npy("(" * 5000), "header|nested|parenthes|memory|EOF"),
        (npy("{}"), "header|keys"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(8), b"\x09\x00"), "magic|9|format"),
        (b"\x93NUMPY", "magic|expected|EOF"),
        (b"", "magic|expected|EOF"),
        (b"\x80\x04\x95", "magic|expected|EOF"),
    ],
)
def test_arrays_that_are_none_are_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.npz").write_bytes(zip_of([("x.npy", data)]))
    with pytest.raises(ArtifactError, match=rf"a\.npz is damaged: x\.npy: .*({said})") as caught:
        read_arrays(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


def test_arrays_are_read_as_numpy_wrote_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "f": rng.random((3, 4)), "i": np.arange(6, dtype=">i4").reshape(2, 3), "s": np.float32(3),
        "b": np.array([True]),
        "fortran": np.asfortranarray(rng.random((3, 5)).astype(np.float16)), "empty": np.zeros((0, 2)),
    }  # fmt: skip
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        found = read_arrays(tmp_path / "a.npz")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (
                found[name].dtype == array.dtype and np.array_equal(found[name], array) and found[name].flags.writeable
            )


def test_bomb_of_arrays_inside_a_bundle_is_refused(yard: Path) -> None:
    out = io.BytesIO()
    np.savez_compressed(out, **{"timesteps": np.zeros(2**23, np.float32)})
    facts, files = manifest(), members()
    facts["assets"]["sha256"] = hashlib.sha256(out.getvalue()).hexdigest()
    files |= {"assets.npz": out.getvalue(), "manifest.json": json.dumps(facts).encode()}
    refused(yard, zip_of([*files.items()]), "timesteps.npy unpacks to more than 100 times its size")


def reference(*pairs: tuple[str, str]) -> bytes:
    """A model whose one weight lies elsewhere."""
    tensor = onnx.TensorProto(name="w", dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in pairs:
        tensor.external_data.add(key=key, value=value)
    return onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor])).SerializeToString()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (reference(("location", "a"), ("location", "/etc/passwd")), "two values of 'location'"),
        (reference(("location", "a"), ("offset", "-1")), "no plain offset"),
        (reference(("location", "a"), ("length", "9" * 30)), "no plain offset"),
        (reference(("location", "a" * 5000)), "name of a file is too long"),
        (
            onnx.ModelProto(graph=onnx.GraphProto(node=[onnx.NodeProto(op_type="EPContext")])).SerializeToString(),
            "EPContext",
        ),
        (b"", "is no ONNX model"),
        (b"\x3a\xff\xff\xff\xff\x7f", "longer than the message"),
        (b"\x3a\x02\x0a" * 2, "ends early|longer|no wire type"),
        (b"\x0b", "no wire type 3"),
        (b"\x80" * 12, "number is too long"),
    ],
)
def test_graph_whose_references_are_not_plain_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match=said) as caught:
        external_references(tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)


def test_graph_under_a_name_that_hides_what_it_is_is_refused(yard: Path) -> None:
    files, facts = members(), manifest()
    files["denoiser.bin"] = files.pop("denoiser.onnx")
    facts["graphs"]["denoiser"]["file"] = "denoiser.bin"
    files["manifest.json"] = json.dumps(facts).encode()
    refused(yard, zip_of([*files.items()]), "is no file for onnxruntime: .onnx")


def walked_or_refused(folder: Path, data: bytes) -> None:
    (folder / "x.onnx").write_bytes(data)
    try:
        external_references(folder / "x.onnx")
    except ArtifactError as error:
        assert "is no ONNX model" in str(error)


@given(data=st.binary(max_size=300))
@QUICK
def test_graph_of_any_bytes_is_walked_or_refused(tmp_path: Path, data: bytes) -> None:
    walked_or_refused(tmp_path, data)


@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
@QUICK
def test_graph_with_a_changed_byte_is_walked_or_refused(tmp_path: Path, place: int, value: int) -> None:
    data = bytearray(members()["denoiser.onnx"])
    data[place % len(data)] = value
    walked_or_refused(tmp_path, bytes(data))


# --- whatever else ---------------------------------------------------------------------------------------------------


@given(place=st.integers(0, 10**6), change=st.one_of(st.binary(max_size=8), st.integers(1, 2000)))
@QUICK
def test_any_change_of_a_byte_is_refused_or_changes_nothing(tmp_path: Path, place: int, change: bytes | int) -> None:
    data = bytearray(good_bundle())
    place %= len(data)
    if isinstance(change, bytes):
        data[place : place + len(change)] = change
    else:
        del data[place : place + change]
    path = tmp_path / "x.zip"
    path.write_bytes(bytes(data))
    try:
        with unpack(path) as (folder, _):
            found = {name: (folder / name).read_bytes() for name in members() if name != "manifest.json"}
        assert found == {name: content for name, content in members().items() if name != "manifest.json"}
    except (ArtifactError, TargetError) as error:
        assert "\n" not in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=8,
)


@given(data=st.data())
@QUICK
def test_any_value_anywhere_in_the_manifest_is_refused_or_loads(tmp_path: Path, data: st.DataObject) -> None:
    facts: Any = manifest()
    node, key = facts, data.draw(st.sampled_from(sorted(facts)))
    while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(JSON)
    path = tmp_path / "x.zip"
    path.write_bytes(with_manifest(json.dumps(facts).encode()))
    try:
        with load(path, {"threads": 1}) as model:
            model(label=0)
    except CompressorError as error:
        assert "\n" not in str(error)


@given(text=st.text(max_size=30))
@QUICK
def test_a_good_name_stays_in_its_folder_everywhere(text: str) -> None:
    if not name_problem(text):
        path = Path("/root/folder") / text
        assert os.path.normpath(path).startswith("/root/folder/")
        assert not set(text) & set('\\:*?"<>|\0') and clashing_names([text, text.upper() + "x"]) is None


@given(value=JSON)
@QUICK
def test_json_that_is_plain_is_read_as_it_is(value: Any) -> None:
    text = json.dumps(value)
    try:
        assert parse_json(text.encode()) == json.loads(text)
    except ValueError as error:
        assert any(word in text for word in ("NaN", "Infinity", "\\ud")), error


def test_memory_is_bounded_whatever_a_bundle_claims(tmp_path: Path) -> None:
    facts, files = manifest(), members()
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (9000000000,)}"
    files["assets.npz"] = zip_of([("timesteps.npy", npy(header))])
    facts["assets"]["sha256"] = hashlib.sha256(files["assets.npz"]).hexdigest()
    files["manifest.json"] = json.dumps(facts).encode()
    many = json.dumps(manifest()).replace('"metadata": {}', '"metadata": {"x": [' + "[]," * 5_000_000 + "0]}")
    bundles = {
        "good": good_bundle(),
        "shape": edited(lambda m: m["driver"]["settings"].update(shape=[2**14, 2**14, 2**14])),
        "array": zip_of([*files.items()]),
        "values": with_manifest(many.encode()),
        "bomb": with_file("zeros.bin", bytes(200 * 2**20), packing=zipfile.ZIP_DEFLATED),
    }
    for name, data in bundles.items():
        (tmp_path / f"{name}.zip").write_bytes(data)
    code = f"""
        from compressor.errors import CompressorError
        from compressor.profiles.memory import peak_rss_mb
        from compressor.runtimes import load

        load("{tmp_path}/good.zip").close()
        before = peak_rss_mb()
        for name in {[name for name in bundles if name != "good"]}:
            try:
                load(f"{tmp_path}/{{name}}.zip")
                raise SystemExit(f"{{name}} was loaded")
            except CompressorError as error:
                print(error)
        grown = peak_rss_mb() - before
        assert grown < 100, f"{{grown:.0f}} MB"
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:] + done.stdout[-500:]
    assert done.stdout.count("\n") == 4
