"""Reads a model's files from end to end: each record of a packed file against its seal, the rest for being readable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tierlm.checkpoints.checkpoint import Header, TensorInfo
from tierlm.checkpoints.checksum import Seal, new_checksum
from tierlm.checkpoints.codec import Compressed
from tierlm.checkpoints.packed import read_seals
from tierlm.checkpoints.reader import read_pieces, restored
from tierlm.errors import StorageError


def damage(headers: dict[Path, Header], progress: Callable[[int, int], None]) -> Iterator[StorageError]:
    """Everything that is wrong with some files. ``progress`` is called with the bytes read so far, and in total."""
    checks = [check for file, header in headers.items() for check in _checks(file, header)]
    done, total = 0, sum(part.nbytes for part, _, _ in checks)
    for part, seal, inside in checks:
        digest = new_checksum()
        stored = bytearray()  # of what has to be decompressed
        try:
            for piece in read_pieces(part):
                digest.update(piece)
                if inside is not None:
                    stored += piece
                done += piece.nbytes
                progress(done, total)
            if seal is not None:
                seal.check(digest.hexdigest())
            if inside is not None:
                restored(part, inside, stored)
        except StorageError as error:
            yield error


def _checks(file: Path, header: Header) -> Iterator[tuple[TensorInfo, Seal | None, Compressed | None]]:
    """What is to be read of a file, as if it were one tensor each, the seal of each if the file has any, and how it is
    compressed if it is."""
    if seals := read_seals(file, header):
        inside = {tensor.inside.start: tensor.inside for tensor in header.tensors.values() if tensor.inside is not None}
        for seal in seals.values():
            part = TensorInfo(seal.name, file, seal.offset, seal.nbytes, "U8", (seal.nbytes,))
            yield part, seal, inside.get(seal.offset)
    else:
        for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.offset):
            yield tensor, None, None
