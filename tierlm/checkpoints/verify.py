"""Reads all of a model's files: records of packed files are compared with their seals, others must be readable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tierlm.checkpoints.checksum import Seal, new_checksum
from tierlm.checkpoints.codec import Compressed
from tierlm.checkpoints.container import Container
from tierlm.checkpoints.packed import read_seals
from tierlm.checkpoints.reader import read_pieces, restored
from tierlm.checkpoints.record import TensorInfo
from tierlm.errors import StorageError

Check = tuple[TensorInfo, Seal | None, Compressed | None]


def damage(checkpoint: Container, progress: Callable[[int, int], None]) -> Iterator[StorageError]:
    """Yield every error in the files of ``checkpoint``. ``progress``: called with bytes done and in total."""
    checks = list(_checks(checkpoint))
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


def _checks(checkpoint: Container) -> Iterator[Check]:
    """The parts of the files to read (records as one tensor each), with seal and compression, if any."""
    sealed: set[Path] = set()
    for file, header in checkpoint.headers.items():
        if seals := read_seals(file, header):
            sealed.add(file)
            inside = {part.inside.start: part.inside for part in header.tensors.values() if part.inside is not None}
            for seal in seals.values():
                part = TensorInfo(seal.name, file, seal.offset, seal.nbytes, "U8", (seal.nbytes,))
                yield part, seal, inside.get(seal.offset)
    for tensor in sorted(checkpoint.tensors.values(), key=lambda tensor: (tensor.file, tensor.offset)):
        if tensor.file not in sealed:
            yield tensor, None, None
