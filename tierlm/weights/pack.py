"""Packing: weights as they are stored, in; a folder of packed files, out, whole or not at all.

Everything is written into a folder beside the one that was asked for, which gets its name at the end. A file that has
its own name there is finished; one in which a pack was killed is written again. One record at a time is in memory.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tierlm.config import format_size
from tierlm.errors import StorageError, UsageError
from tierlm.files import write_whole
from tierlm.kernels import Weight, widen
from tierlm.weights.checkpoint import Place, TensorInfo
from tierlm.weights.formats import MAKERS, view
from tierlm.weights.layouts import Layout, StoredWeight
from tierlm.weights.packed import RecordShape, file_size, in_file_order, write_file
from tierlm.weights.reader import read_pieces

DESCRIPTION = "tierlm.json"  # what was packed, and how
INDEX = "model.safetensors.index.json"
SLICE_VALUES = 2**18  # of a matrix that are converted at a time: what that takes stays in the processor's cache
SLICE_ROWS = 128  # a slice is of a multiple of these: the scales of no layout span more
SPARE = 64 * 2**20  # bytes that are left free on the disk

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Packing:
    """One weight and the layout that it is to have."""

    weight: StoredWeight
    target: Layout

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {self.weight.name + ending: part for ending, part in self.target.parts(self.weight.shape).items()}

    def convert(self) -> dict[str, memoryview]:
        """The bytes of its tensors by name, by way of float32."""
        source, shape = self.weight, self.weight.shape
        data, *scales = [_read(part) for part in source.parts.values()]
        stored = Weight(data, scales[0] if scales else None, (shape[0], shape[1]))
        step = max(SLICE_ROWS, SLICE_VALUES // shape[1] // SLICE_ROWS * SLICE_ROWS)
        edges = [(at, min(at + step, shape[0])) for at in range(0, shape[0], step)]
        made = [MAKERS[self.target.name](widen(stored, *rows)) for rows in edges]
        parts = [torch.cat([weight.data for weight in made])]
        if made[0].scale is not None:
            parts.append(torch.cat([weight.scale for weight in made if weight.scale is not None]))
        return {name: _bytes(part) for name, part in zip(self.tensors(), parts, strict=True)}


@dataclass(frozen=True, slots=True)
class PackedRecord:
    """The weights that are to be read as one."""

    name: str
    packings: Sequence[Packing]

    def shape(self) -> RecordShape:
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for packing in self.packings:
            tensors |= packing.tensors()
        return RecordShape(self.name, in_file_order(tensors))

    def chunks(self) -> Iterator[memoryview]:
        """The record's bytes. What keeps its layout passes through as it is; the rest is converted when it comes."""
        kept: dict[str, TensorInfo] = {}
        owner: dict[str, Packing] = {}
        for packing in self.packings:
            owner |= dict.fromkeys(packing.tensors(), packing)
            if packing.target == packing.weight.layout:
                kept |= {packing.weight.name + ending: part for ending, part in packing.weight.parts.items()}
        converted: dict[str, memoryview] = {}
        for name in self.shape().tensors:
            if name in kept:
                yield from read_pieces(kept[name])
                continue
            if name not in converted:
                converted |= owner[name].convert()
            yield converted.pop(name)


def pack(
    files: Mapping[str, Sequence[PackedRecord]],
    beside: Sequence[Path],
    out: Path,
    description: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write ``files`` (name -> records) into the new folder ``out``, with copies of the files ``beside``.

    ``description``: of what is "packed" and of its "source"; a pack that was interrupted goes on where it has the same.
    ``progress`` is called with the bytes written so far, and in total. Raises UsageError, StorageError.
    """
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out}: exists already; a pack is written to a new folder: choose another, or remove it")
    metadata = {
        "tierlm.packed": json.dumps(description["packed"]),
        "tierlm.source": description["source"]["fingerprint"],
    }
    with _unfinished(out, description) as folder:
        shapes = {name: [record.shape() for record in records] for name, records in files.items()}
        sizes = {name: file_size(each, metadata) for name, each in shapes.items()}
        done = sum(size for name, size in sizes.items() if (folder / name).exists())
        total = sum(sizes.values())
        _check_room(folder, out, total - done + sum(file.stat().st_size for file in beside))
        for name, records in files.items():
            if (folder / name).exists():
                continue

            def chunks(records: Sequence[PackedRecord] = records, shapes: Any = shapes[name]) -> Iterator[Any]:
                nonlocal done
                for record, shape in zip(records, shapes, strict=True):
                    yield record.chunks()
                    done += shape.nbytes
                    if progress is not None:
                        progress(done, total)

            write_file(folder / name, shapes[name], metadata, chunks())
        weight_map = {tensor: name for name, each in shapes.items() for shape in each for tensor in shape.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        try:
            for file in beside:
                shutil.copyfile(file, folder / file.name)
            write_whole(folder / INDEX, json.dumps(index, indent=1))
            os.rename(folder, out)
        except OSError as error:
            raise StorageError(f"{out}: cannot be written: {error.strerror or error}", file=str(out)) from error


@contextmanager
def _unfinished(out: Path, description: Mapping[str, Any]) -> Iterator[Path]:
    """The folder that is to become ``out``, and nobody else's meanwhile."""
    folder = out.with_name(out.name + ".unfinished")
    note = folder / DESCRIPTION
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"{folder}: expected a folder that can be written to: {error.strerror}") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        text = json.dumps(description, indent=1) + "\n"
        if note.exists() or any(folder.glob("*.safetensors")):
            if not note.exists() or note.read_text(encoding="utf-8") != text:
                raise UsageError(
                    f"{folder}: an unfinished pack of another model, of other settings, or of files that have changed "
                    "since; remove it, or choose another folder"
                )
        else:
            write_whole(note, text)
        yield folder
    except BlockingIOError:
        raise UsageError(f"{folder}: another pack is writing to it") from None
    finally:
        os.close(held)


def _check_room(folder: Path, out: Path, needed: int) -> None:
    for left in folder.glob("*.unfinished"):  # of a pack that was killed; it is written again
        left.unlink()
    free = shutil.disk_usage(folder).free
    if needed + SPARE > free:
        raise StorageError(
            f"{out}: needs {format_size(needed)} and {format_size(SPARE)} to spare, its disk has {format_size(free)} "
            "free; make room, or choose a folder on another disk",
            file=str(out),
        )


def _read(tensor: TensorInfo) -> Tensor:
    """A tensor, in memory of its own."""
    data = torch.empty(tensor.nbytes, dtype=torch.uint8)
    at = 0
    for piece in read_pieces(tensor):
        data[at : at + len(piece)] = torch.frombuffer(piece, dtype=torch.uint8)
        at += len(piece)
    return view(data, Place(0, tensor.nbytes, tensor.dtype, tensor.shape))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
