"""Seals: the checksum of each record of a packed file, and its verification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from tierlm.errors import StorageError

ALGORITHM = "xxh3_64"
DIGITS = 16  # hexadecimal digits of a checksum


def new_checksum() -> Any:
    """An incremental 64-bit XXH3 (``update``, ``hexdigest``): faster than any disk; detects damage, not forgery.
    https://github.com/Cyan4973/xxHash"""
    return xxhash.xxh3_64()


def checksum(data: memoryview | bytes) -> str:
    """The checksum of ``data``: DIGITS hexadecimal digits. Releases the GIL."""
    return xxhash.xxh3_64_hexdigest(data)


class Checksums:
    """Checksums of the bytes given to ``update``: one per ``block`` bytes, or a single one if ``block`` is 0."""

    def __init__(self, block: int = 0):
        self._block, self._left = block, block
        self._digest, self._found = new_checksum(), list[str]()

    def update(self, data: memoryview) -> None:
        while self._block and data.nbytes >= self._left:
            self._digest.update(data[: self._left])
            data, self._left = data[self._left :], self._block
            self._found.append(self._digest.hexdigest())
            self._digest = new_checksum()
        self._digest.update(data)
        self._left -= data.nbytes

    def end(self) -> list[str]:
        """All checksums; the last block may be shorter."""
        unfinished = not self._block or self._left < self._block
        return self._found + [self._digest.hexdigest()] * unfinished


@dataclass(frozen=True, slots=True)
class Seal:
    """The checksum of a packed record or block: ``nbytes`` bytes at ``offset`` of ``file``."""

    name: str
    file: Path
    offset: int
    nbytes: int
    checksum: str

    def check(self, found: str) -> None:
        """Raise StorageError if ``found``, the checksum of the bytes read, differs."""
        if found != self.checksum:
            raise StorageError(
                f"{self.file}: {self.name}, {self.nbytes} bytes at offset {self.offset}: expected {ALGORITHM} "
                f"{self.checksum}, found {found}; the file is damaged: copy it again, or pack the model again",
                file=str(self.file),
                tensor=self.name,
                offset=self.offset,
            )
