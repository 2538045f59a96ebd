"""The zip container that torch.save writes, proven sane before anything in it is believed.

Format: .ZIP File Format Specification 6.3 (APPNOTE.TXT), of which torch uses little: every record is
stored, not compressed, under one root folder, and the directory ends the file. Read by hand: the standard
library's reader makes an object of every entry a directory claims before it can be asked how many
there are.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from quill import fsio
from quill.errors import CorruptError
from quill.registry.version import refuse

MOST_RECORDS = 100_000
MOST_DIRECTORY_BYTES = 16 << 20

_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_FULL = 0xFFFFFFFF
_PIECE = 1 << 20
_ENCRYPTED = 0x0041
_ZIP64_EXTRA = 1


class Record(NamedTuple):
    """One entry: where its header is in the file, its size in bytes, and its CRC-32."""

    header: int
    size: int
    crc: int


class TorchZip:
    """An open file of torch.save.

    Args:
        path: The file.

    Attributes:
        records: By their names below the root folder, such as "data/0".

    Raises:
        CorruptError: It is no such file, it is damaged, or it is not safe to read.
        ResourceError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Whoever names a link means the file; a device or a FIFO is refused all the same.
            self.file: FileIO = fsio.open_plain(Path(os.path.realpath(path)))
        except FileNotFoundError:
            raise CorruptError(f"'{path}' is missing", why="it was moved, or never there") from None
        try:
            self.size = os.fstat(self.file.fileno()).st_size
            self._root = ""
            self._end = 0
            self.records = dict(self._directory())
            # torch.serialization.set_crc32_options(False) leaves all of them out.
            self._has_checksums = any(record.crc for record in self.records.values())
            self._believe_no_more_than_there_is()
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def start(self, name: str) -> int:
        """Where a record's bytes begin in the file; its own header says what the directory says."""
        record = self.records[name]
        raw = self._at(record.header, _LOCAL.size)
        signature, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(raw)
        start: int = record.header + _LOCAL.size + name_length + extra_length
        full = f"{self._root}/{name}".encode()
        if (
            signature != b"PK\3\4"
            or method
            or flags & _ENCRYPTED
            or name_length != len(full)
            or self._at(record.header + _LOCAL.size, name_length) != full
            or start + record.size > self._end
        ):
            raise self.damaged(f"the header of its record '{_short(name)}' is not what its directory says")
        return start

    def read(self, name: str, most: int) -> bytes:
        """A small record whole, its CRC-32 checked.

        Args:
            name: Below the root folder.
            most: How many bytes it may have.
        """
        record = self.records[name]
        if record.size > most:
            raise self.unsafe(f"its record '{name}' has {record.size:,} bytes, at most {most:,} are read")
        raw = self._at(self.start(name), record.size)
        if self._has_checksums and zlib.crc32(raw) != record.crc:
            raise self.damaged(f"its record '{name}' has another checksum than was written")
        return raw

    def verify(self, name: str) -> None:
        """Hold a record's bytes against its CRC-32, in a stream, where it has one."""
        record = self.records[name]
        if not self._has_checksums:
            return
        at, left, crc = self.start(name), record.size, 0
        while left:
            piece = self._at(at, min(left, _PIECE))
            crc = zlib.crc32(piece, crc)
            at, left = at + len(piece), left - len(piece)
        if crc != record.crc:
            raise self.damaged(f"its record '{_short(name)}' has another checksum than was written")

    def damaged(self, why: str) -> CorruptError:
        """The refusal of a file that is not whole."""
        return CorruptError(f"'{self.path}' is damaged", why=why, hint="get it again from where it was made")

    def unsafe(self, why: str) -> CorruptError:
        """The refusal of a file that was made to do harm, or by something other than torch.save."""
        return CorruptError(f"'{self.path}' is not safe to read", why=why)

    def _directory(self) -> Iterator[tuple[str, Record]]:
        """The entries, each checked by itself and against those before it."""
        count, size, at = self._end_of_directory()
        if count > MOST_RECORDS or size > MOST_DIRECTORY_BYTES:
            why = f"its directory lists {count:,} records in {size:,} bytes; at most {MOST_RECORDS:,} in"
            raise self.unsafe(f"{why} {MOST_DIRECTORY_BYTES:,} are read")
        raw, place, seen = self._at(at, size), 0, set[str]()
        for _ in range(count):
            if place + _ENTRY.size > size or raw[place : place + 4] != b"PK\1\2":
                raise self.damaged(f"its directory ends after {len(seen):,} of {count:,} records")
            fields = _ENTRY.unpack_from(raw, place)
            flags, method, crc, packed, unpacked, header = fields[3], fields[4], *fields[7:10], fields[16]
            name_end = place + _ENTRY.size + fields[10]
            extra_end = name_end + fields[11]
            place_next = extra_end + fields[12]
            if place_next > size:
                raise self.damaged("its directory is cut off")
            name = self._checked_name(raw[place + _ENTRY.size : name_end])
            packed, unpacked, header = self._wide((packed, unpacked, header), raw[name_end:extra_end])
            if flags & _ENCRYPTED:
                raise self.unsafe(f"its record '{_short(name)}' is encrypted")
            if method or packed != unpacked:
                raise self.unsafe(
                    f"its record '{_short(name)}' is compressed, and torch.save stores them as they are"
                )
            if header + _LOCAL.size + unpacked > at:
                raise self.damaged(
                    f"its record '{_short(name)}' would have {unpacked:,} bytes; the file is too short"
                )
            if name in seen:
                raise self.unsafe(f"it holds the record '{_short(name)}' twice")
            seen.add(name)
            place = place_next
            yield name, Record(header, unpacked, crc)
        if place != size:
            raise self.damaged("its directory holds more than the records it counts")
        self._end = at

    def _end_of_directory(self) -> tuple[int, int, int]:
        """How many entries there are, the bytes they take, and where they begin."""
        head = self._at(0, min(512, self.size))
        if head[:4] != b"PK\3\4":
            pickled = head[:1] in (b"\x80", b"(", b"c")
            shown = "a bare pickle, as torch.save wrote before 2020" if pickled else "no file of torch.save"
            hint = "where you trust it, load it with torch and save it again" if pickled else ""
            refuse(self.path, head, self.size, f"it is {shown}", hint)
        if self.size < _END.size:
            raise self.damaged("it is cut off")
        tail = self.size - _END.size
        end = _END.unpack(self._at(tail, _END.size))
        if end[0] != b"PK\5\6" or end[7]:
            raise self.damaged("it is cut off, or something follows its end: the directory is not there")
        disks, count, size, at = end[1:4], end[4], end[5], end[6]
        if tail >= _LOCATOR.size + _END64.size:
            locator = _LOCATOR.unpack(self._at(tail - _LOCATOR.size, _LOCATOR.size))
            if locator[0] == b"PK\6\7":
                tail -= _LOCATOR.size + _END64.size
                end64 = _END64.unpack(self._at(tail, _END64.size))
                if end64[0] != b"PK\6\6" or locator[2] != tail:
                    raise self.damaged("the end of its directory is not where it says")
                disks, (count, size, at) = (*end64[4:6], end64[6]), end64[7:10]
        if disks != (0, 0, count) or at + size != tail:
            raise self.damaged("its directory is not where it says")
        return count, size, at

    def _checked_name(self, raw: bytes) -> str:
        """A record's name below the root folder, of which there is one."""
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise self.unsafe(f"it holds a record named {_short(repr(raw))}") from None
        root, _, rest = name.partition("/")
        if not root or not rest or {"", ".", ".."} & set(name.split("/")) or {"\\", "\0", ":"} & set(name):
            raise self.unsafe(f"it holds a record named '{_short(name)}', which torch.save never writes")
        self._root = self._root or root
        if root != self._root:
            raise self.unsafe(f"it holds records under '{_short(self._root)}' and '{_short(root)}'")
        return rest

    def _wide(self, fields: tuple[int, int, int], extra: bytes) -> tuple[int, int, int]:
        """Sizes and offset, from the ZIP64 field where the entry has no room for them (APPNOTE 4.5.3)."""
        packed, unpacked, header = fields
        if _FULL not in fields:
            return fields
        at = 0
        while at + 4 <= len(extra):
            tag, length = struct.unpack_from("<2H", extra, at)
            if tag == _ZIP64_EXTRA and at + 4 + length <= len(extra):
                values = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
                # The order is that of the specification: unpacked, packed, offset.
                unpacked = next(values, -1) if unpacked == _FULL else unpacked
                packed = next(values, -1) if packed == _FULL else packed
                header = next(values, -1) if header == _FULL else header
                if -1 in (unpacked, packed, header):
                    break
                return packed, unpacked, header
            at += 4 + length
        raise self.damaged("its directory has an entry without its size")

    def _believe_no_more_than_there_is(self) -> None:
        """Refuse records that lie over one another, which would be more bytes than the file has."""
        at = 0
        for name, record in sorted(self.records.items(), key=lambda item: item[1].header):
            if record.header < at:
                raise self.unsafe(f"its record '{_short(name)}' lies over another")
            at = record.header + _LOCAL.size + record.size

    def _at(self, offset: int, length: int) -> bytes:
        raw = bytearray()
        with fsio.guard(self.path, "read"):
            self.file.seek(offset)
            while len(raw) < length:
                piece = self.file.read(length - len(raw))
                if not piece:
                    raise self.damaged(f"it ends at byte {offset + len(raw):,}")
                raw += piece
        return bytes(raw)


def _short(text: str) -> str:
    shown = ascii(text)[1:-1]
    return shown if len(shown) <= 60 else shown[:57] + "..."
