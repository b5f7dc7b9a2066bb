"""Packing: stored weights in, a folder of packed files out, complete or not at all.

The output goes to a temporary folder next to the target, which is renamed at the end. Each file in it is renamed when
complete; after a kill, the others are written again. Only a few matrices are in memory at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tierlm.checkpoints.ahead import ahead
from tierlm.checkpoints.codec import Run
from tierlm.checkpoints.packed import RecordShape, file_size, in_file_order, write_file
from tierlm.checkpoints.reader import PIECE, read_pieces
from tierlm.checkpoints.record import Place, TensorInfo
from tierlm.checkpoints.stored import StoredWeight
from tierlm.checkpoints.views import view
from tierlm.config import format_size
from tierlm.errors import StorageError, UsageError
from tierlm.files import Stamp, open_regular, read_regular, whole, write_whole
from tierlm.formats import FORMATS, Part
from tierlm.formats.format import part_name
from tierlm.kernels import Weight, quantise, widen

DESCRIPTION = "tierlm.json"  # source and settings of the pack
INDEX = "model.safetensors.index.json"
SLICE_VALUES = 2**18  # values converted at a time, so that they stay in the processor's cache
SLICE_ROWS = 128  # a slice has a multiple of these rows, and of the rows of a block
AHEAD = 4  # matrices or pieces queued between reading, converting and writing, if memory allows
SPARE = 64 * 2**20  # bytes left free on the disk

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Packing:
    """One weight and its target format."""

    weight: StoredWeight
    target: str

    def tensors(self) -> dict[str, Part]:
        if self.target == self.weight.format:
            return {name: (part.dtype, part.shape) for name, part in self.weight.by_name().items()}
        made = FORMATS[self.target].parts(self.weight.shape)
        return {part_name(self.weight.name, ending): part for ending, part in made.items()}

    def convert(self, parts: Sequence[Tensor]) -> dict[str, memoryview]:
        """The bytes of the target's tensors by name, converted from the weight's ``parts`` through float32."""
        shape = self.weight.shape
        data, scale, extra = FORMATS[self.weight.format].divide(parts)
        stored = Weight(data, self.weight.format, scale, shape, extra=extra)
        unit = lcm(SLICE_ROWS, FORMATS[self.target].block[0])
        step = max(unit, SLICE_VALUES // shape[1] // unit * unit)
        edges = [(at, min(at + step, shape[0])) for at in range(0, shape[0], step)]
        made = [quantise(widen(stored, *rows), self.target) for rows in edges]
        found = [torch.cat([weight.data for weight in made])]
        if made[0].scale is not None:
            found.append(torch.cat([weight.scale for weight in made if weight.scale is not None]))
        return {name: _bytes(part) for name, part in zip(self.tensors(), found, strict=True)}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor to convert. ``parts``: the weight's stored tensors, with the weight's first tensor only."""

    name: str
    packing: Packing
    parts: Sequence[Tensor] | None


@dataclass(frozen=True, slots=True)
class PackedRecord:
    """The weights of one record. ``compress``, ``block``: see RecordShape."""

    name: str
    packings: Sequence[Packing]
    compress: bool = False
    block: int = 0

    def shape(self) -> RecordShape:
        tensors: dict[str, Part] = {}
        for packing in self.packings:
            tensors |= packing.tensors()
        return RecordShape(self.name, in_file_order(tensors), self.compress, self.block)

    @property
    def floats(self) -> bool:
        """Whether every format is a float format, so that compression pays."""
        return all(FORMATS[packing.target].floats for packing in self.packings)

    def read(self) -> Iterator[memoryview | Wanted]:
        """The record's tensors in file order: bytes where the format stays, else what to convert."""
        owner = {name: packing for packing in self.packings for name in packing.tensors()}
        begun: set[str] = set()
        for name in self.shape().tensors:
            packing = owner[name]
            weight = packing.weight
            if packing.target == weight.format:
                yield from read_pieces(weight.by_name()[name])
                continue
            parts = None if weight.name in begun else [_read(part) for part in weight.parts.values()]
            begun.add(weight.name)
            yield Wanted(name, packing, parts)


def read_records(records: Iterable[PackedRecord]) -> Generator[memoryview | Wanted, None, None]:
    """The items of all records, in the order in which they are written."""
    for record in records:
        yield from record.read()


def converted(items: Generator[memoryview | Wanted, None, None]) -> Generator[memoryview, None, None]:
    """The bytes to write: ``items`` with each Wanted converted."""
    made: dict[str, memoryview] = {}
    with closing(items):
        for item in items:
            if isinstance(item, memoryview):
                yield item
                continue
            if item.parts is not None:
                made |= item.packing.convert(item.parts)
            yield made.pop(item.name)


def raw_bytes(record: PackedRecord) -> tuple[bytes, list[Run]]:
    """A record's uncompressed bytes and its runs."""
    return b"".join(converted(read_records([record]))), record.shape().runs


def pack(
    files: Mapping[str, Sequence[PackedRecord]],
    beside: Mapping[str, bytes],
    out: Path,
    description: Mapping[str, Any],
    sources: Mapping[Path, Stamp],
    progress: Progress | None = None,
    queued: int = AHEAD,
) -> None:
    """Write ``files`` (name -> records) and ``beside`` (name -> content) to the new folder ``out``.

    Reading, converting and writing overlap. ``description``: "packed" and "source"; an interrupted pack with the same
    description continues. ``sources``: the files that are read; the pack fails if one changes meanwhile. ``progress``:
    called with bytes done and in total. ``queued``: see ``memory_of``. Raises UsageError, StorageError.
    """
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out}: exists already; a pack needs a new folder: choose another, or remove it")
    metadata = {
        "tierlm.packed": json.dumps(description["packed"]),
        "tierlm.source": description["source"]["fingerprint"],
    }
    with _unfinished(out, description) as folder:
        shapes = {name: [record.shape() for record in records] for name, records in files.items()}
        sizes = {name: file_size(each, metadata) for name, each in shapes.items()}
        done = sum(size for name, size in sizes.items() if (folder / name).exists())
        total = sum(sizes.values())
        _check_room(folder, out, total - done + sum(map(len, beside.values())))
        missing = [name for name in files if not (folder / name).exists()]

        def counted(chunks: Iterator[memoryview]) -> Iterator[memoryview]:
            nonlocal done
            for chunk in chunks:
                yield chunk
                done += chunk.nbytes
                if progress is not None:
                    progress(done, total)

        reads = ahead(read_records(record for name in missing for record in files[name]), queued)
        with closing(ahead(converted(reads), queued)) as chunks:
            stream = counted(chunks)
            for name in missing:
                write_file(folder / name, shapes[name], metadata, stream)
        for source, stamp in sources.items():
            _require_unchanged(source, stamp)
        total = sum((folder / name).stat().st_size for name in files)
        weight_map = {tensor: name for name, each in shapes.items() for shape in each for tensor in shape.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        for name, content in beside.items():
            with whole(folder / name) as file:
                file.write(content)
        write_whole(folder / INDEX, json.dumps(index, indent=1))
        os.rename(folder, out)


def memory_of(files: Mapping[str, Sequence[PackedRecord]], queued: int) -> int:
    """The most bytes of a pack of ``files`` with ``queued`` matrices or pieces between its stages."""
    source = target = piece = compressing = 0
    for record in (record for records in files.values() for record in records):
        for packing in record.packings:
            parts = [part.nbytes for part in packing.weight.parts.values()]
            if packing.target == packing.weight.format:
                piece = max(piece, *(min(PIECE, nbytes) for nbytes in parts))
            else:
                source = max(source, sum(parts))
                target = max(target, RecordShape("", packing.tensors()).nbytes)
        if record.compress:
            compressing = max(compressing, 4 * record.shape().nbytes)  # pieces, whole, planes, stored
    between = (queued + 1) * (max(source, piece) + max(target, piece))
    return between + 2 * target + compressing  # a converted matrix is joined from its slices


def unfinished(out: Path) -> Any:
    """The description of an interrupted pack to ``out``; None if absent or unreadable."""
    with suppress(OSError, ValueError):
        return json.loads(read_regular(_beside(out) / DESCRIPTION))
    return None


def _beside(out: Path) -> Path:
    return out.with_name(out.name + ".unfinished")


@contextmanager
def _unfinished(out: Path, description: Mapping[str, Any]) -> Iterator[Path]:
    """The temporary folder that becomes ``out``, locked against other packs."""
    folder = _beside(out)
    note = folder / DESCRIPTION
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"{folder}: expected a writable folder: {error.strerror}") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        text = json.dumps(description, indent=1) + "\n"
        try:
            found = read_regular(note) if note.exists() else None
        except OSError as error:
            raise UsageError(f"{note}: cannot be read: {error.strerror}; remove {folder}") from error
        if found != text.encode() and (found is not None or any(folder.glob("*.safetensors"))):
            raise UsageError(
                f"{folder}: an unfinished pack of another model, of other settings, or of files changed since; "
                "remove it, or choose another folder"
            )
        try:
            if found is None:
                write_whole(note, text)
            yield folder
        except BaseException as error:
            if not any(folder.glob("*.safetensors")):  # nothing to continue from
                note.unlink(missing_ok=True)
                with suppress(OSError):  # the folder is not empty
                    folder.rmdir()
            if isinstance(error, OSError):
                raise StorageError(
                    f"{error.filename or out}: cannot be written: {error.strerror or error}; free some space and run "
                    "the same command again: it continues from there",
                    file=str(error.filename or out),
                ) from error
            raise
    except BlockingIOError:
        raise UsageError(f"{folder}: another pack is writing to it") from None
    finally:
        os.close(held)


def _require_unchanged(file: Path, stamp: Stamp) -> None:
    try:
        os.close(open_regular(file, expected=stamp))
    except OSError as error:
        raise StorageError(f"{file}: {error.strerror}: what was packed of it is of no use", file=str(file)) from error


def _check_room(folder: Path, out: Path, needed: int) -> None:
    for left in folder.glob(".*"):  # left by a killed pack on a file system without nameless files
        left.unlink()
    free = shutil.disk_usage(folder).free
    if needed + SPARE > free:
        raise StorageError(
            f"{out}: needs {format_size(needed)} and {format_size(SPARE)} to spare, its disk has {format_size(free)} "
            "free; free some space, or choose a folder on another disk",
            file=str(out),
        )


def _read(tensor: TensorInfo) -> Tensor:
    """Read a tensor into its own memory."""
    data = torch.empty(tensor.nbytes, dtype=torch.uint8)
    for _ in read_pieces(tensor, data.numpy().data):
        pass
    return view(data, Place(0, tensor.nbytes, tensor.dtype, tensor.shape))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
