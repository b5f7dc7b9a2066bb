"""Reads a model's files from end to end: each record of a packed file against its seal, the rest for being readable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tierlm.errors import StorageError
from tierlm.weights.checkpoint import Header, TensorInfo
from tierlm.weights.checksum import Seal, new_checksum
from tierlm.weights.packed import read_seals
from tierlm.weights.reader import read_pieces


def damage(headers: dict[Path, Header], progress: Callable[[int, int], None]) -> Iterator[StorageError]:
    """Everything that is wrong with some files. ``progress`` is called with the bytes read so far, and in total."""
    checks = [(part, seal) for file, header in headers.items() for part, seal in _checks(file, header)]
    done, total = 0, sum(part.nbytes for part, _ in checks)
    for part, seal in checks:
        digest = new_checksum()
        try:
            for piece in read_pieces(part):
                digest.update(piece)
                done += piece.nbytes
                progress(done, total)
            if seal is not None:
                seal.check(digest.hexdigest())
        except StorageError as error:
            yield error


def _checks(file: Path, header: Header) -> Iterator[tuple[TensorInfo, Seal | None]]:
    """What is to be read of a file, as if it were one tensor each, and the seal of each if the file has any."""
    if seals := read_seals(file, header):
        for seal in seals.values():
            yield TensorInfo(seal.name, file, seal.offset, seal.nbytes, "U8", (seal.nbytes,)), seal
    else:
        for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.offset):
            yield tensor, None
