"""A packed file: a safetensors file of sealed records, each aligned to ALIGNMENT. Specification: docs/packed.md.

A record's tensors are contiguous, largest items first, so that all are aligned. safetensors allows no holes, so U8
tensors named PADDING fill the gap to the next record; spaces pad the header. The metadata lists the records: name ->
[offset from the start of the data, bytes, checksum]. A compressed record is one U8 tensor; the metadata lists its
contents.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tierlm.checkpoints.checkpoint import INSIDE, ITEM_SIZE, MAX_HEADER, Header, parse_json
from tierlm.checkpoints.checksum import DIGITS, Checksums, Seal, checksum
from tierlm.checkpoints.codec import Run, compress, least_and_most
from tierlm.checkpoints.record import ALIGNMENT
from tierlm.errors import CheckpointError
from tierlm.files import whole
from tierlm.formats import Shape

VERSION = "1"
PADDING = "tierlm.padding."
COMPRESSED = "tierlm.zstd."
RECORDS = "tierlm.records"
FLUSH = 32 * 2**20  # bytes between flushes: the disk writes while the next bytes are made


@dataclass(frozen=True, slots=True)
class RecordShape:
    """A record to write. ``tensors``: name -> dtype and shape, in file order.

    ``compress``: store it as one tensor, COMPRESSED + offset (codec.py). ``block``: bytes per checksum; 0: one for the
    record. Not both.
    """

    name: str
    tensors: Mapping[str, tuple[str, Shape]]
    compress: bool = False
    block: int = 0

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(*tensor) for tensor in self.tensors.values())

    @property
    def runs(self) -> list[Run]:
        return [(_nbytes(*tensor), ITEM_SIZE[tensor[0]]) for tensor in self.tensors.values()]

    @property
    def most(self) -> int:
        """Upper bound of its bytes in the file. Never less than the actual size, so that the header never grows."""
        return _aligned(least_and_most(self.runs)[1]) + 1 if self.compress else self.nbytes


class Written(NamedTuple):
    """A written record: its bytes in the file, their checksums, and the checksum before compression."""

    nbytes: int
    checksums: Sequence[str]
    raw: str


def in_file_order(tensors: Mapping[str, tuple[str, Shape]]) -> dict[str, tuple[str, Shape]]:
    """Sort by item size, largest first: each tensor is aligned to its items, without holes."""
    return dict(sorted(tensors.items(), key=lambda item: -ITEM_SIZE[item[1][0]]))


def file_size(records: Sequence[RecordShape], metadata: Mapping[str, str]) -> int:
    """The bytes of the file that ``write_file`` makes; an upper bound if records are compressed."""
    return len(_header(records, metadata)) + sum(_aligned(record.most) for record in records)


def write_file(
    file: Path, records: Sequence[RecordShape], metadata: Mapping[str, str], chunks: Iterator[memoryview]
) -> None:
    """Write a packed file, complete or not at all.

    ``chunks``: the bytes of the records in order; no chunk spans two records, and none is taken after the last record.
    Raises OSError.
    """
    done: list[Written] = []
    begin = len(_header(records, metadata))
    with whole(file) as stream:
        stream.write(bytes(begin))  # the header comes last
        unflushed = 0
        for record in records:
            pieces, raw = _pieces(chunks, record), ""
            if record.compress:
                content = b"".join(pieces)
                pieces, raw = iter([memoryview(compress(content, record.runs))]), checksum(content)
            written, checksums = 0, Checksums(record.block)
            for piece in pieces:
                stream.write(piece)
                checksums.update(piece)
                written += piece.nbytes
                unflushed += piece.nbytes
                if unflushed >= FLUSH:
                    _flush(stream)
                    unflushed = 0
            stream.write(bytes(_aligned(written) - written))
            done.append(Written(written, checksums.end(), raw))
        stream.seek(0)
        stream.write(_header(records, metadata, done, begin))
        _flush(stream)


def _pieces(chunks: Iterator[memoryview], record: RecordShape) -> Iterator[memoryview]:
    left = record.nbytes
    while left > 0:
        piece = next(chunks)
        left -= piece.nbytes
        yield piece
    assert left == 0, (record.name, left)


def _flush(stream: BinaryIO) -> None:
    """Flush the file to disk and drop it from the page cache, which the next reads need."""
    stream.flush()
    os.fsync(stream.fileno())
    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seals(file: Path, header: Header) -> dict[int, Seal]:
    """The seals of a packed file by file offset; empty for other files. Raises CheckpointError."""
    text = header.metadata.get(RECORDS)
    if text is None:
        return {}
    version = header.metadata.get("tierlm.version")
    if version != VERSION:
        raise CheckpointError(f"{file}: packed in version {version!r}, expected {VERSION!r}; pack the model again")
    try:
        entries: Any = parse_json(text.encode())
        seals = {}
        for name, (offset, nbytes, checksum) in entries.items():
            numbers = type(offset) is int and type(nbytes) is int and min(offset, nbytes) >= 0
            inside = numbers and header.begin + offset + nbytes <= header.stamp.size
            if not inside or re.fullmatch(r"[0-9a-f]{16}", checksum) is None:
                raise ValueError(f"{name}: {[offset, nbytes, checksum]}")
            seals[header.begin + offset] = Seal(name, file, header.begin + offset, nbytes, checksum)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: header: the records are malformed ({error}); pack the model again") from error
    return seals


def row_block(name: str, start: int, stop: int) -> str:
    """The name of rows ``start`` to ``stop`` of the matrix ``name``, where each block of rows is a record."""
    return f"{name}.rows.{start}.{stop}"


def row_blocks(name: str, tensors: Iterable[str]) -> list[tuple[int, int]]:
    """The row blocks of ``name`` among the names ``tensors``, in order."""
    pattern = re.compile(re.escape(name) + r"\.rows\.(\d{1,12})\.(\d{1,12})")
    found = (pattern.fullmatch(each) for each in tensors)
    return sorted((int(match[1]), int(match[2])) for match in found if match)


def _header(
    records: Sequence[RecordShape], metadata: Mapping[str, str], written: Sequence[Written] = (), begin: int = 0
) -> bytes:
    """Length prefix and header, padded to ALIGNMENT and to ``begin`` bytes. Without ``written``: a placeholder that is
    at least as long as the final header."""
    at = 0
    tensors: dict[str, Any] = {}
    seals: dict[str, list[Any]] = {}
    inside: dict[str, Any] = {}
    for record, found in zip(records, written or map(_unknown, records), strict=True):
        size = max(1, found.nbytes)  # an empty record has a checksum too
        block = record.block or size
        for start, digest in zip(range(0, size, block), found.checksums, strict=True):
            name = f"{record.name} from byte {start}" if record.block else record.name
            seals[name] = [at + start, min(block, found.nbytes - start), digest]
        filled = [*record.tensors.items()]
        if record.compress:
            inside[f"{COMPRESSED}{at}"] = [found.raw, record.tensors]
            filled = [(f"{COMPRESSED}{at}", ("U8", (found.nbytes,)))]
        if padding := _aligned(found.nbytes) - found.nbytes:
            filled.append((f"{PADDING}{at}", ("U8", (padding,))))
        for name, (dtype, shape) in filled:
            end = at + _nbytes(dtype, shape)
            tensors[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
    texts = {"format": "pt", "tierlm.version": VERSION, **metadata, RECORDS: json.dumps(seals, separators=(",", ":"))}
    if inside:
        texts[INSIDE] = json.dumps(inside, separators=(",", ":"))
    text = json.dumps({"__metadata__": texts, **tensors}, separators=(",", ":")).encode()
    length = max(begin, _aligned(8 + len(text))) - 8
    assert length <= MAX_HEADER
    return length.to_bytes(8, "little") + text.ljust(length)


def _unknown(record: RecordShape) -> Written:
    count = -(-record.most // record.block) if record.block else 1
    return Written(record.most, ["0" * DIGITS] * count, "0" * DIGITS)


def _nbytes(dtype: str, shape: Shape) -> int:
    return prod(shape) * ITEM_SIZE[dtype]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
