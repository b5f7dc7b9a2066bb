"""Rows of a matrix that is never loaded: how a token's embedding is looked up on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from tierlm.checkpoints.checkpoint import Extent, TensorInfo
from tierlm.checkpoints.checksum import Seal, checksum
from tierlm.checkpoints.reader import Request, failure, read_pieces

BLOCK = 2**17  # bytes of rows that share a seal: they are read together when the first of them is


def block_of_rows(tensor: TensorInfo) -> int:
    """The bytes of about BLOCK in whole rows of a tensor."""
    stride = tensor.nbytes // tensor.shape[0]
    return max(1, BLOCK // stride) * stride


class Rows:
    """The rows of ``tensor``, of two dimensions. ``seals``: of blocks of its bytes, each of which is compared when one
    of its rows is first read; larger ones, of stores that were packed without blocks, are left alone."""

    def __init__(self, tensor: TensorInfo, seals: Iterable[Seal] = ()):
        self._tensor, self._block = tensor, block_of_rows(tensor)
        self._unchecked = {seal.offset: seal for seal in seals if seal.nbytes <= self._block}

    def read(self, rows: Sequence[int]) -> bytes:
        """Some rows, one after another. Raises StorageError."""
        stride = self._tensor.nbytes // self._tensor.shape[0]
        for at in sorted({row * stride // self._block * self._block for row in rows}):
            if (seal := self._unchecked.get(self._tensor.offset + at)) is not None:
                part = TensorInfo(seal.name, seal.file, seal.offset, seal.nbytes, "U8", (seal.nbytes,))
                seal.check(checksum(b"".join(read_pieces(part))))
                del self._unchecked[seal.offset]
        return read_rows(self._tensor, rows)


def read_rows(tensor: TensorInfo, rows: Iterable[int]) -> bytes:
    """Some rows of a tensor of two dimensions, one after another.

    A few KiB a row, through the page cache, with read-ahead off. Raises StorageError.
    """
    stride = tensor.nbytes // tensor.shape[0]
    found: dict[int, bytes] = {}
    rows = list(rows)
    extent = Extent(tensor.file, tensor.offset, tensor.offset + tensor.nbytes, 0, (tensor,))
    try:
        with open(tensor.file, "rb", buffering=0) as stream:
            fd = stream.fileno()
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            for row in sorted(set(rows)):
                offset = tensor.offset + row * stride
                found[row] = os.pread(fd, stride, offset)
                if len(found[row]) != stride:
                    request = Request(extent, offset, offset + stride)
                    raise failure(request, offset, f"expected {stride} bytes, found {len(found[row])}")
    except OSError as error:
        raise failure(Request(extent, tensor.offset, tensor.offset), tensor.offset, error.strerror or "") from error
    return b"".join(found[row] for row in rows)
