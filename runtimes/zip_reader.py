"""Read a zip that is not trusted: sizes are believed only as upper limits, entries may not overlap, nothing is written.

The standard library's reader is lenient where this one is strict: it takes archives whose entries share bytes, whose
two copies of a name differ, or that unpack to more than they say. Only stored and deflated files are read.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from compressor.errors import ArtifactError
from compressor.runtimes.file_names import clashing_names, name_problem

__all__ = ["LIMITS", "Limits", "ZipEntry", "ZipReader"]

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _SIZES_FOLLOW, _PATCHED, _STRONG, _UTF8, _MASKED = 1, 1 << 3, 1 << 5, 1 << 6, 1 << 11, 1 << 13
_UNKNOWN16, _UNKNOWN32 = 0xFFFF, 0xFFFFFFFF
_CHUNK = 2**20


@dataclass(frozen=True)
class Limits:
    """What an archive may ask for.

    Attributes:
        entries: Files.
        directory_bytes: Size of the list of files.
        total_bytes: Size of all files, unpacked.
        ratio: Unpacked size over packed size of a file larger than 1 MB.
    """

    entries: int = 4096
    directory_bytes: int = 4 * 2**20
    total_bytes: int = 64 * 2**30
    ratio: int = 100


LIMITS = Limits()


@dataclass(frozen=True)
class ZipEntry:
    """A file in the archive: where its bytes lie, and what it says of itself."""

    name: str
    size: int
    packed: int
    crc: int
    deflated: bool
    flags: int
    header: int
    start: int = 0


class ZipReader:
    """The files of an archive by name, in `entries`. It is a context manager.

    Args:
        path: The archive.
        limits: What it may ask for.

    Raises:
        ArtifactError: It is no zip, damaged, or built to mislead.
    """

    def __init__(self, path: Path, limits: Limits = LIMITS) -> None:
        self.path, self.limits = Path(path), limits
        try:
            if not self.path.is_file():
                raise ArtifactError(f"{path} is no file")
            self._file: BinaryIO = open(self.path, "rb")  # noqa: SIM115 - closed by `close`
            self._size = self.path.stat().st_size
        except (OSError, ValueError) as error:
            raise ArtifactError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        try:
            self.entries = self._list()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> ZipReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self, name: str, limit: int) -> bytes:
        """A whole file of at most ``limit`` bytes."""
        entry = self.entries[name]
        if entry.size > limit:
            self._refuse(f"{name} is larger than {limit / 2**20:g} MB")
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, at most 1 MB at a time; more or fewer than it says is an error."""
        entry = self.entries[name]
        size = crc = 0
        for chunk in self._inflated(entry) if entry.deflated else self._stored(entry):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
            if size > entry.size:
                self._refuse(f"{name} unpacks to more than the {entry.size} bytes that it says")
            yield chunk
        if size != entry.size or crc != entry.crc:
            self._refuse(f"{name} is not what was packed (size or checksum)")

    # -- data --

    def _stored(self, entry: ZipEntry) -> Iterator[bytes]:
        for place in range(0, entry.packed, _CHUNK):
            yield self._at(entry.start + place, min(_CHUNK, entry.packed - place))

    def _inflated(self, entry: ZipEntry) -> Iterator[bytes]:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        place, pending = 0, b""
        while not inflate.eof:
            if not pending and place < entry.packed:
                pending = self._at(entry.start + place, min(_CHUNK, entry.packed - place))
                place += len(pending)
            exhausted = not pending
            try:
                chunk = inflate.decompress(pending, _CHUNK)
            except zlib.error as error:
                self._refuse(f"{entry.name} cannot be unpacked ({error})")
            pending = inflate.unconsumed_tail
            if chunk:
                yield chunk
            elif exhausted and not inflate.eof:
                self._refuse(f"{entry.name} ends early")
        if inflate.unused_data or place < entry.packed:
            self._refuse(f"{entry.name} has bytes behind its end")

    def _at(self, place: int, size: int) -> bytes:
        try:
            self._file.seek(place)
            data = self._file.read(size)
        except OSError as error:
            raise ArtifactError(f"cannot read {self.path}: {error.strerror or error}") from error
        if len(data) != size:
            self._refuse("it ends early")
        return data

    # -- the list of files --

    def _list(self) -> dict[str, ZipEntry]:
        count, start, end = self._directory()
        if count > self.limits.entries or end - start > self.limits.directory_bytes:
            self._refuse(f"it lists more than {self.limits.entries} files")
        data, place, found = self._at(start, end - start), 0, []
        for _ in range(count):
            entry, place = self._central(data, place)
            if entry is not None:
                found.append(entry)
        if place != len(data):
            self._refuse("its list of files has bytes behind its end")
        names = [entry.name for entry in found]
        clash = clashing_names(names)
        if clash is not None:
            self._refuse(f"{clash[0]!r} and {clash[1]!r} are one file on some systems")
        total = sum(entry.size for entry in found)
        if total > self.limits.total_bytes:
            self._refuse(f"it unpacks to {total / 2**30:.3g} GB; the limit is {self.limits.total_bytes / 2**30:g}")
        return {entry.name: entry for entry in self._located(found, start)}

    def _directory(self) -> tuple[int, int, int]:
        """Number of files, and where their list begins and ends."""
        room = min(self._size, _END.size + _UNKNOWN16)
        tail = self._at(self._size - room, room)
        found = tail.rfind(b"PK\x05\x06")
        if found < 0 or len(tail) - found < _END.size:
            raise ArtifactError(f"{self.path} is no bundle: it is no zip, or it was cut short")
        _, disk, first, here, count, size, start, comment = _END.unpack_from(tail, found)
        end = self._size - room + found
        if found + _END.size + comment != len(tail):
            self._refuse("it has bytes behind its end")
        before = self._at(max(0, end - _END64_LOCATOR.size), min(end, _END64_LOCATOR.size))
        # writers add the 64-bit end from 2 GB on, where the values still fit into the other one
        if before.startswith(b"PK\x06\x07") or _UNKNOWN16 in (here, count) or _UNKNOWN32 in (size, start):
            narrow = ((here, _UNKNOWN16), (count, _UNKNOWN16), (size, _UNKNOWN32), (start, _UNKNOWN32))
            if len(before) < _END64_LOCATOR.size:
                self._refuse("its list of files is not where it says")
            mark, disk, place, _ = _END64_LOCATOR.unpack(before)
            if mark != b"PK\x06\x07" or place + _END64.size + _END64_LOCATOR.size != end:
                self._refuse("its list of files is not where it says")
            mark, _, _, _, disk, first, here, count, size, start = _END64.unpack(self._at(place, _END64.size))
            end = place
            wide = (here, count, size, start)
            agree = all(value in (known, none) for (value, none), known in zip(narrow, wide, strict=True))
            if mark != b"PK\x06\x06" or not agree:
                self._refuse("its list of files is not where it says")
        if disk or first or here != count:
            self._refuse("it is one part of several")
        if start + size != end:
            self._refuse("its list of files is not where it says")
        return count, start, end

    def _central(self, data: bytes, place: int) -> tuple[ZipEntry | None, int]:
        """An entry of the list (None for a folder) and the place behind it."""
        if place + _CENTRAL.size > len(data):
            self._refuse("its list of files ends early")
        fields = _CENTRAL.unpack_from(data, place)
        mark, flags, method, crc, packed, size = fields[0], fields[3], fields[4], fields[7], fields[8], fields[9]
        name_size, extra_size, comment_size, attributes, header = *fields[10:13], fields[15], fields[16]
        behind = place + _CENTRAL.size + name_size + extra_size + comment_size
        if mark != b"PK\x01\x02" or behind > len(data):
            self._refuse("its list of files is damaged")
        raw = data[place + _CENTRAL.size :][:name_size]
        name = self._name(raw, flags)
        extra = data[place + _CENTRAL.size + name_size :][:extra_size]
        size, packed, header = self._wide(name, extra, size, packed, header)
        folder = name.endswith("/")
        problem = name_problem(name[:-1] if folder else name)
        if problem:
            self._refuse(f"the name {name[:80]!r} {problem}")
        kind = stat.S_IFMT(attributes >> 16)
        if kind not in (0, stat.S_IFDIR if folder else stat.S_IFREG):
            self._refuse(f"{name} is a link or a special file")
        if flags & (_ENCRYPTED | _PATCHED | _STRONG | _MASKED):
            self._refuse(f"{name} is encrypted")
        if method not in (_STORED, _DEFLATED) or (method == _STORED and packed != size):
            self._refuse(f"{name} is packed in a way that is not read (method {method})")
        if size > 2**20 and size > packed * self.limits.ratio:
            self._refuse(f"{name} unpacks to more than {self.limits.ratio} times its size")
        if folder:
            return (None, behind) if not size else self._refuse(f"{name} is a folder with content")
        return ZipEntry(name, size, packed, crc, method == _DEFLATED, flags, header), behind

    def _name(self, raw: bytes, flags: int) -> str:
        try:
            return raw.decode("utf-8" if flags & _UTF8 else "ascii")
        except UnicodeDecodeError:
            self._refuse(f"the name {raw[:80]!r} is not UTF-8")

    def _wide(self, name: str, extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
        """The sizes and the place with what the 64-bit field says of those that do not fit in 32 bits."""
        values = [size, packed, header]
        while len(extra) >= 4:
            kind, length = struct.unpack_from("<2H", extra)
            field, extra = extra[4 : 4 + length], extra[4 + length :]
            if kind != 1:
                continue
            for number, value in enumerate(values):
                if value == _UNKNOWN32 and len(field) >= 8:
                    values[number], field = struct.unpack_from("<Q", field)[0], field[8:]
            break
        if any(value >= 2**62 for value in values):
            self._refuse(f"{name} has no size")
        return values[0], values[1], values[2]

    def _located(self, entries: list[ZipEntry], end: int) -> list[ZipEntry]:
        """Entries with the place of their data; they follow each other without sharing a byte."""
        located, free = [], 0
        for entry in sorted(entries, key=lambda entry: entry.header):
            if entry.header < free or entry.header + _LOCAL.size > end:
                self._refuse(f"{entry.name} overlaps another file")
            fields = _LOCAL.unpack(self._at(entry.header, _LOCAL.size))
            mark, flags, method, packed, size = fields[0], fields[2], fields[3], fields[7], fields[8]
            start = entry.header + _LOCAL.size + fields[9] + fields[10]
            if start + entry.packed > end:
                self._refuse(f"{entry.name} overlaps the list of files")
            name = self._name(self._at(entry.header + _LOCAL.size, fields[9]), flags)
            sizes = {(entry.packed, entry.size), (_UNKNOWN32, _UNKNOWN32)}
            agree = (packed, size) in sizes or flags & _SIZES_FOLLOW
            same = (name, method, flags) == (entry.name, _DEFLATED if entry.deflated else _STORED, entry.flags)
            if mark != b"PK\x03\x04" or not same or not agree:
                self._refuse(f"{entry.name} says two different things of itself")
            located.append(ZipEntry(**{**vars(entry), "start": start}))
            free = start + entry.packed
        return located

    def _refuse(self, reason: str) -> NoReturn:
        raise ArtifactError(f"{self.path} is damaged or was tampered with: {reason}")
