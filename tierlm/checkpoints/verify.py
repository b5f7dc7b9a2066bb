"""Reads all of a model's files: records of packed files are compared with their seals, others must be readable."""

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
    """Yield every error in the files of ``headers``. ``progress``: called with bytes done and in total."""
    checks = [check for file, header in headers.items() for check in _checks(file, header)]
    done, total = 0, sum(part.nbytes for part, _, _ in checks)
    for part, seal, inside in checks:
        digest = new_checksum()
        stored = bytearray()  # of a compressed record
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
    """The parts of a file to read (records as one tensor each), with seal and compression, if any."""
    if seals := read_seals(file, header):
        inside = {tensor.inside.start: tensor.inside for tensor in header.tensors.values() if tensor.inside is not None}
        for seal in seals.values():
            part = TensorInfo(seal.name, file, seal.offset, seal.nbytes, "U8", (seal.nbytes,))
            yield part, seal, inside.get(seal.offset)
    else:
        for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.offset):
            yield tensor, None, None
