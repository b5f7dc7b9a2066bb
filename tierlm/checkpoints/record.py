"""Where bytes lie: tensors in files, and the records that are read of them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tierlm.checkpoints.checksum import Seal
from tierlm.checkpoints.codec import Compressed

ALIGNMENT = 4096  # bytes; file offset, length and memory address of direct reads
MERGE_GAP = 64 * 1024  # bytes; reading a gap of this size costs less than a second request


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Location of one tensor: bytes ``offset`` to ``offset + nbytes`` of ``file``, row-major.

    ``format``, ``size``: format and shape of the encoded weight; empty for scales and before recognition. ``inside``:
    the compressed record that holds the tensor; ``offset`` is then the record's start in the file plus the tensor's
    offset in the decompressed record.
    """

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    format: str = ""
    size: tuple[int, ...] = ()
    inside: Compressed | None = None

    def rows(self, start: int, stop: int) -> TensorInfo:
        """Rows ``start`` to ``stop`` of the first dimension."""
        stride = self.nbytes // self.shape[0]
        at, size = self.offset + start * stride, (stop - start) * stride
        return TensorInfo(self.name, self.file, at, size, self.dtype, (stop - start, *self.shape[1:]))


@dataclass(frozen=True, slots=True)
class Extent:
    """One contiguous read of the file bytes ``start`` to ``stop``.

    ``lo`` and ``hi`` widen the range to ALIGNMENT. ``at``: offset of ``lo`` in the record, aligned.
    """

    file: Path
    start: int
    stop: int
    at: int
    tensors: tuple[TensorInfo, ...]

    @property
    def lo(self) -> int:
        return self.start // ALIGNMENT * ALIGNMENT

    @property
    def hi(self) -> int:
        return -(-self.stop // ALIGNMENT) * ALIGNMENT

    def tensor_at(self, offset: int) -> str:
        """Name of the tensor at file offset ``offset``, or of the nearest one before it."""
        before = [t.name for t in self.tensors if t.offset <= offset]
        return before[-1] if before else self.tensors[0].name


@dataclass(frozen=True, slots=True)
class Place:
    """Location of a tensor inside a record's bytes. Other fields: see TensorInfo."""

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    format: str = ""
    size: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """The bytes of one streamed unit: the reads that fetch it and the place of each role's tensor in them.

    ``seal``: checksum of the single extent, in a packed store. ``inside``: set if that extent is compressed.
    """

    nbytes: int
    extents: tuple[Extent, ...]
    places: Mapping[str, Place]
    seal: Seal | None = None
    inside: Compressed | None = None

    @property
    def begin(self) -> tuple[str, int]:
        """File and offset of the first byte, to sort reads by."""
        return str(self.extents[0].file), self.extents[0].start


def build_record(tensors: Mapping[str, TensorInfo]) -> Record:
    """Lay out the record of ``tensors`` (role -> tensor). Neighbours in a file become one read."""
    ordered = sorted(tensors.items(), key=lambda item: (str(item[1].file), item[1].offset, item[1].nbytes))
    groups: list[list[tuple[str, TensorInfo]]] = []
    for role, tensor in ordered:
        if groups:
            last = groups[-1][-1][1]
            if last.file == tensor.file and tensor.offset - (last.offset + last.nbytes) <= MERGE_GAP:
                groups[-1].append((role, tensor))
                continue
        groups.append([(role, tensor)])
    at = 0
    extents, places = [], {}
    for group in groups:
        first, last = group[0][1], group[-1][1]
        extent = Extent(first.file, first.offset, last.offset + last.nbytes, at, tuple(t for _, t in group))
        for role, tensor in group:
            offset = at + tensor.offset - extent.lo
            places[role] = Place(offset, tensor.nbytes, tensor.dtype, tensor.shape, tensor.format, tensor.size)
        at += extent.hi - extent.lo
        extents.append(extent)
    return Record(at, tuple(extents), places)


def compressed(record: Record, inside: Compressed) -> Record:
    """A record of one extent, stored compressed as ``inside``: read into the end of a slot, decompressed to its start.

    The slot is one page longer than the record, so that output never overwrites unread input (codec.py)."""
    (extent,) = record.extents
    nbytes = -(-max(inside.raw, inside.nbytes) // ALIGNMENT) * ALIGNMENT + ALIGNMENT
    stored = replace(extent, stop=extent.start + inside.nbytes)
    stored = replace(stored, at=nbytes - (stored.hi - stored.lo))
    return Record(nbytes, (stored,), record.places, record.seal, inside)
