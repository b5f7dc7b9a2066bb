"""What transfers do: read a record, compare it with its seal, restore it, copy it up."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tierlm.checkpoints.checksum import Seal, checksum
from tierlm.checkpoints.codec import Compressed
from tierlm.checkpoints.reader import Reader, Request, failure
from tierlm.errors import StorageError
from tierlm.memory.slots import Slot
from tierlm.memory.ticket import DISK, Job
from tierlm.spec import Key


@dataclass(slots=True, eq=False)
class Read:
    """All reads of one record into ``slot``, as ``Jobs``. memory/compiled takes them as they are, any other executor
    one by one.

    ``words``: struct Request of memory/compiled for each of ``requests``; None where only ``reader`` can perform them.
    """

    reader: Reader
    requests: Sequence[Request]
    words: array[int] | None
    slot: Slot
    key: Key

    @property
    def what(self) -> str:
        return str(tuple(self.key))

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int, /) -> ReadPart:
        request = self.requests[index]
        return ReadPart(DISK, request.hi - request.lo, self.what, self.reader, request, self.slot)


@dataclass(slots=True, eq=False)
class ReadPart(Job):
    """One request."""

    reader: Reader
    request: Request
    slot: Slot

    def run(self) -> None:
        self.reader.read(self.request, buffer_of(self.request, self.slot))

    def stalled(self, why: str) -> Exception:
        return failure(self.request, self.request.start, why)


@dataclass(slots=True, eq=False)
class Check(Job):
    """Compares the record of ``request``, which has been read, with its seal; if they differ, reads it from a mirror.
    Adds ``key`` to ``checked``."""

    reader: Reader
    request: Request
    slot: Slot
    seal: Seal
    key: Key
    checked: set[Key]

    def run(self) -> None:
        try:
            self.compare(self.seal.file)
        except StorageError:
            self.reader.repair(self.request, buffer_of(self.request, self.slot), self.compare)
        self.checked.add(self.key)

    def compare(self, file: Path) -> None:
        """Raises StorageError, which names ``file``, where the record came from."""
        at = self.request.extent.at
        replace(self.seal, file=file).check(checksum(self.slot.buffer[at : at + self.seal.nbytes].numpy().data))

    def stalled(self, why: str) -> Exception:
        return StorageError(f"comparing {self.seal.name} of {self.seal.file} with its checksum: {why}")


@dataclass(slots=True, eq=False)
class Decompression(Job):
    """Restores a compressed record in its slot. ``check`` goes first where the record has not been checked yet."""

    check: Check
    stored: Compressed

    def run(self) -> None:
        check = self.check
        first = check.key not in check.checked
        if first:
            check.run()
        at, buffer = check.request.extent.at, check.slot.buffer.numpy()
        try:
            self.stored.restore(buffer[at : at + self.stored.nbytes], buffer, check=first)
        except ValueError as error:
            check.checked.discard(check.key)
            raise self.stalled(
                f"{error}; it was damaged on the way, or packed wrongly: pack the model again"
            ) from error

    def stalled(self, why: str) -> Exception:
        seal = self.check.seal
        what = f"{seal.file}: decompressing {seal.name}, {seal.nbytes} bytes at offset {seal.offset}: {why}"
        return StorageError(what, file=str(seal.file), tensor=seal.name, offset=seal.offset)


@dataclass(slots=True, eq=False)
class CopyUp(Job):
    """Copies ``nbytes`` of ``source``, uint8 [size], into ``slot`` of the tier above."""

    source: Tensor
    slot: Slot

    def run(self) -> None:
        self.slot.wait()
        target, source = self.slot.buffer[: self.nbytes], self.source[: self.nbytes]
        if target.device.type == "cpu":
            target.copy_(source)
            return
        stream = torch.Stream(target.device)  # beside the computation; out of torch's pool
        torch.accelerator.set_stream(stream)  # of this thread only
        target.copy_(source, non_blocking=True)
        stream.synchronize()

    def stalled(self, why: str) -> Exception:
        return StorageError(f"copying {self.what} over {self.link}: {why}")


def buffer_of(request: Request, slot: Slot) -> memoryview:
    """The place of a request in its slot, once nobody reads the old content any more."""
    slot.wait()
    assert slot.memory is not None
    return slot.memory[request.at : request.at + request.hi - request.lo]
