"""A packed file: a safetensors file of sealed records, each of which begins on a multiple of ALIGNMENT.

The tensors of a record lie together, those of large items first, so that all are aligned; U8 tensors named PADDING fill
the room up to the next record, since the format allows no holes. The header is padded with spaces, which it does allow.
Its metadata has the records: name -> [offset from where the tensors begin, bytes, checksum]. A compressed record is one
U8 tensor, and the metadata has what is inside it. All of it: docs/packed.md.
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

from tierlm.checkpoints.checkpoint import ALIGNMENT, INSIDE, ITEM_SIZE, MAX_HEADER, Header
from tierlm.checkpoints.checksum import DIGITS, Checksums, Seal, checksum
from tierlm.checkpoints.codec import Run, compress, least_and_most
from tierlm.errors import CheckpointError, StorageError
from tierlm.formats import Shape

VERSION = "1"
PADDING = "tierlm.padding."
COMPRESSED = "tierlm.zstd."
RECORDS = "tierlm.records"
FLUSH = 32 * 2**20  # bytes after which the disk is given what was written: it works while more is made


@dataclass(frozen=True, slots=True)
class RecordShape:
    """A record to be written: its name, and its tensors, name -> dtype and shape, in the order of the file.

    ``compress``: it is stored as codec.py says, as the one tensor COMPRESSED + its offset. ``block``: every so
    many bytes have a checksum of their own; 0: all have one. Not both.
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
        """What it may take in the file. More than a compressed one takes, so that every number in the header is."""
        return _aligned(least_and_most(self.runs)[1]) + 1 if self.compress else self.nbytes


class Written(NamedTuple):
    """What has become of a record: its bytes in the file, their checksums, and that of what was compressed."""

    nbytes: int
    checksums: Sequence[str]
    raw: str


def in_file_order(tensors: Mapping[str, tuple[str, Shape]]) -> dict[str, tuple[str, Shape]]:
    """Tensors of large items first: then each begins on a multiple of its own, without holes."""
    return dict(sorted(tensors.items(), key=lambda item: -ITEM_SIZE[item[1][0]]))


def file_size(records: Sequence[RecordShape], metadata: Mapping[str, str]) -> int:
    """The bytes of the file that ``write_file`` makes; the most, if records are compressed."""
    return len(_header(records, metadata)) + sum(_aligned(record.most) for record in records)


def write_file(
    file: Path, records: Sequence[RecordShape], metadata: Mapping[str, str], chunks: Iterator[memoryview]
) -> None:
    """Write a packed file beside ``file``, bring it to the disk, and rename it.

    ``chunks``: the bytes of one record after another, in the order of their tensors; no chunk is part of two, and what
    comes after the last record is not asked for. Raises StorageError where the disk is full or fails; then, as after
    any other error, nothing of the file is left.
    """
    beside = file.with_name(file.name + ".unfinished")
    done: list[Written] = []
    begin = len(_header(records, metadata))
    try:
        with open(beside, "wb") as stream:
            stream.write(bytes(begin))  # written last: without it the file is none
            waiting = 0
            for record in records:
                pieces, raw = _pieces(chunks, record), ""
                if record.compress:
                    whole = b"".join(pieces)
                    pieces, raw = iter([memoryview(compress(whole, record.runs))]), checksum(whole)
                written, checksums = 0, Checksums(record.block)
                for piece in pieces:
                    stream.write(piece)
                    checksums.update(piece)
                    written += piece.nbytes
                    waiting += piece.nbytes
                    if waiting >= FLUSH:
                        _flush(stream)
                        waiting = 0
                stream.write(bytes(_aligned(written) - written))
                done.append(Written(written, checksums.end(), raw))
            stream.seek(0)
            stream.write(_header(records, metadata, done, begin))
            _flush(stream)
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StorageError(
            f"{file}: cannot be written: {error.strerror or error}; make room, and run the same command "
            "again: it goes on with this file",
            file=str(file),
        ) from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _pieces(chunks: Iterator[memoryview], record: RecordShape) -> Iterator[memoryview]:
    left = record.nbytes
    while left > 0:
        piece = next(chunks)
        left -= piece.nbytes
        yield piece
    assert left == 0, (record.name, left)


def _flush(stream: BinaryIO) -> None:
    """Bring what was written to the disk, and out of the page cache, which is for what is read next."""
    stream.flush()
    os.fsync(stream.fileno())
    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seals(file: Path, header: Header) -> dict[int, Seal]:
    """The seals of a packed file by their offset in it; none of any other file. Raises CheckpointError."""
    text = header.metadata.get(RECORDS)
    if text is None:
        return {}
    version = header.metadata.get("tierlm.version")
    if version != VERSION:
        raise CheckpointError(f"{file}: packed in version {version!r}, expected {VERSION!r}; pack the model again")
    try:
        entries: Any = json.loads(text)
        seals = {}
        for name, (offset, nbytes, checksum) in entries.items():
            if type(offset) is not int or type(nbytes) is not int or re.fullmatch(r"[0-9a-f]{16}", checksum) is None:
                raise ValueError(f"{name}: {[offset, nbytes, checksum]}")
            seals[header.begin + offset] = Seal(name, file, header.begin + offset, nbytes, checksum)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: header: the records are malformed ({error}); pack the model again") from error
    return seals


def row_block(name: str, start: int, stop: int) -> str:
    """What the rows from ``start`` to ``stop`` of the matrix ``name`` are called where each block is a record."""
    return f"{name}.rows.{start}.{stop}"


def row_blocks(name: str, tensors: Iterable[str]) -> list[tuple[int, int]]:
    """The blocks of rows of ``name`` among some tensors' names, in order."""
    pattern = re.compile(re.escape(name) + r"\.rows\.(\d{1,12})\.(\d{1,12})")
    found = (pattern.fullmatch(each) for each in tensors)
    return sorted((int(match[1]), int(match[2])) for match in found if match)


def _header(
    records: Sequence[RecordShape], metadata: Mapping[str, str], written: Sequence[Written] = (), begin: int = 0
) -> bytes:
    """The length and the header, padded to ALIGNMENT, and to ``begin`` bytes. While nothing is ``written``: one that is
    at least as long as it will be then."""
    at = 0
    tensors: dict[str, Any] = {}
    seals: dict[str, list[Any]] = {}
    inside: dict[str, Any] = {}
    for record, found in zip(records, written or map(_unknown, records), strict=True):
        size = max(1, found.nbytes)  # one that is empty has a checksum too
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
