"""The files of a store of KV blocks: ``blocks`` has slots of equal size, ``headers`` says what is in each of them.

A header is erased before its slot is written and set afterwards, so a killed process leaves no header of a block that
is not whole. If the machine itself stops, the checksum of header or block tells.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import xxhash

from tierlm.memory.kvblock import NAME
from tierlm.policies.chains import BlockKey

MAGIC = b"tierlmK1"
FIELDS = struct.Struct(f"<8s{NAME}s{NAME}s{NAME}sIQQ")  # magic, identity, name, parent, depth, serial, checksum
HEADER = 128  # bytes, the last 8 a checksum of the others


@dataclass(frozen=True, slots=True)
class Header:
    """What a slot holds. ``serial`` grows from write to write; ``checksum``: xxh3_64 of the slot's bytes."""

    key: BlockKey
    serial: int
    checksum: int

    def pack(self, identity: bytes) -> bytes:
        """The header's bytes, in a store of ``identity``."""
        depth, name, parent = self.key
        fields = FIELDS.pack(MAGIC, identity, name, parent, depth, self.serial, self.checksum).ljust(HEADER - 8, b"\0")
        return fields + xxhash.xxh3_64_digest(fields)

    @classmethod
    def unpack(cls, data: bytes, identity: bytes) -> Header | None:
        """The header in ``data``; None if it is erased, damaged, or of another identity."""
        if len(data) != HEADER or xxhash.xxh3_64_digest(data[:-8]) != data[-8:]:
            return None
        magic, owner, name, parent, depth, serial, checksum = FIELDS.unpack_from(data)
        if magic != MAGIC or owner != identity:
            return None
        return cls(BlockKey(depth, name, parent), serial, checksum)


class BlockFiles:
    """The two files in ``folder``, which are made if absent, and locked: one process has them at a time.

    ``found``: the headers of an earlier process, by slot. Slots of ``slot_bytes``, at most ``slots``; what an earlier
    process has stored beyond them is cut off. Raises OSError, BlockingIOError if they are locked. Reads and writes go
    past the page cache where the file system can, so their memory must be aligned.
    """

    def __init__(self, folder: Path, identity: bytes, slot_bytes: int, slots: int):
        self._identity, self._slot_bytes = identity, slot_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._headers = _open(folder / "headers")
        try:
            fcntl.flock(self._headers, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._blocks = _open(folder / "blocks", os.O_DIRECT)
        except BaseException:
            os.close(self._headers)
            raise
        try:
            self.found = self._read_headers(slots)
            kept = max(self.found, default=-1) + 1
            os.ftruncate(self._headers, kept * HEADER)
            os.ftruncate(self._blocks, kept * slot_bytes)
        except BaseException:
            self.close()
            raise

    def _read_headers(self, slots: int) -> dict[int, Header]:
        """The headers of slots that are whole."""
        size = min(os.fstat(self._headers).st_size, slots * HEADER)
        data, ends = os.pread(self._headers, size, 0), os.fstat(self._blocks).st_size // self._slot_bytes
        read = (Header.unpack(data[slot * HEADER :][:HEADER], self._identity) for slot in range(len(data) // HEADER))
        return {slot: header for slot, header in enumerate(read) if header is not None and slot < ends}

    def write(self, slot: int, header: Header, block: memoryview) -> None:
        """Put ``block`` of slot_bytes into ``slot``. Raises OSError; then the slot is empty."""
        self.erase(slot)
        _write(self._blocks, block, slot * self._slot_bytes)
        _write(self._headers, memoryview(header.pack(self._identity)), slot * HEADER)

    def erase(self, slot: int) -> None:
        """Make ``slot`` empty. Raises OSError."""
        _write(self._headers, memoryview(bytes(HEADER)), slot * HEADER)

    def read(self, slot: int, block: memoryview) -> None:
        """Fill ``block`` of slot_bytes from ``slot``. Raises OSError, also if the file ends before."""
        done = 0
        while done < block.nbytes:
            count = os.preadv(self._blocks, [block[done:]], slot * self._slot_bytes + done)
            if not count:
                raise OSError(errno.EIO, "the file ends within a block")
            done += count

    def close(self) -> None:
        """Close the files, which unlocks them."""
        os.close(self._blocks)
        os.close(self._headers)


def _open(file: Path, flags: int = 0) -> int:
    """Open ``file`` for reading and writing, without ``flags`` if the file system does not know them."""
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    except OSError as error:
        if not flags or error.errno != errno.EINVAL:
            raise
    return _open(file)


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < data.nbytes:
        done += os.pwritev(fd, [data[done:]], offset + done)
