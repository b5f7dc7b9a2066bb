"""Rows of a matrix that stays on disk: the lookup of a token's embedding."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from tierlm.checkpoints.checksum import Seal, checksum
from tierlm.checkpoints.reader import Reader, Request, failure
from tierlm.checkpoints.record import Extent, TensorInfo
from tierlm.files import Stamp, open_regular

BLOCK = 2**17  # bytes of rows that share a seal; a block is verified when one of its rows is first read


def block_of_rows(row: int) -> int:
    """BLOCK, rounded down to whole rows of ``row`` bytes, at least one."""
    return max(1, BLOCK // row) * row


class Rows:
    """The rows of ``tensor`` [rows, columns], read through the page cache without read-ahead.

    The file stays open until ``close``, so a rename does not matter. ``seals``: of blocks of the tensor; a block is
    verified when one of its rows is first read. Seals larger than a block (stores packed without blocks) are ignored.
    ``stamp``: of the file, when its header was read. ``reader``: waits for rows that still arrive. All methods but
    ``close`` raise StorageError.
    """

    def __init__(
        self,
        tensor: TensorInfo,
        seals: Iterable[Seal] = (),
        stamp: Stamp | None = None,
        reader: Reader | None = None,
    ):
        self._reader = reader
        self._tensor, self._stride = tensor, tensor.nbytes // tensor.shape[0]
        self._block = block_of_rows(self._stride)
        self._unchecked = {seal.offset: seal for seal in seals if seal.nbytes <= self._block}
        self._extent = Extent(tensor.file, tensor.offset, tensor.offset + tensor.nbytes, 0, (tensor,))
        try:
            self._stream = open(open_regular(tensor.file, expected=stamp), "rb", buffering=0)  # noqa: SIM115
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        except OSError as error:
            raise self._failure(tensor.offset, error.strerror or str(error)) from error

    def read(self, rows: Sequence[int]) -> bytes:
        """The bytes of ``rows`` in order; each distinct row is read once."""
        for at in sorted({row * self._stride // self._block * self._block for row in rows}) if self._unchecked else ():
            if (seal := self._unchecked.get(self._tensor.offset + at)) is not None:
                seal.check(checksum(self._read(seal.offset, seal.nbytes)))
                del self._unchecked[seal.offset]
        first = self._tensor.offset
        found = {row: self._read(first + row * self._stride, self._stride) for row in sorted(set(rows))}
        return b"".join(found[row] for row in rows)

    def close(self) -> None:
        """Close the file. May be called again."""
        self._stream.close()

    def _read(self, offset: int, nbytes: int) -> bytes:
        try:
            if self._reader is not None:
                self._reader.wait(self._tensor.file, offset, offset + nbytes)
            found = os.pread(self._stream.fileno(), nbytes, offset)
        except OSError as error:
            raise self._failure(offset, error.strerror or str(error)) from error
        if len(found) != nbytes:
            raise self._failure(offset, f"expected {nbytes} bytes, found {len(found)}")
        return found

    def _failure(self, offset: int, what: str) -> Exception:
        return failure(Request(self._extent, offset, offset), offset, what)
