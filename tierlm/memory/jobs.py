"""The jobs of transfers: read a record, unseal it, copy it up."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tierlm.checkpoints.checksum import Seal, checksum
from tierlm.checkpoints.reader import Reader, Request, failure
from tierlm.checkpoints.record import Record
from tierlm.errors import StorageError
from tierlm.memory.slots import Slot
from tierlm.memory.ticket import DISK, Job
from tierlm.spec import Key


@dataclass(slots=True, eq=False)
class Read:
    """All reads of one record into ``slot``. memory/compiled takes them whole, other executors as one job a request.

    ``words``: one struct Request of memory/compiled per request; None if only ``reader`` can perform them.
    """

    reader: Reader
    requests: Sequence[Request]
    words: array[int] | None
    slot: Slot
    key: Key

    @property
    def what(self) -> str:
        return str(self.key)

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int, /) -> ReadPart:
        request = self.requests[index]
        return ReadPart(DISK, request.hi - request.lo, self.what, self.reader, request, self.slot)


@dataclass(slots=True, eq=False)
class ReadPart(Job):
    reader: Reader
    request: Request
    slot: Slot

    def run(self) -> None:
        self.reader.read(self.request, buffer_of(self.request, self.slot))

    def stalled(self, why: str) -> Exception:
        return failure(self.request, self.request.start, why)


@dataclass(slots=True, eq=False)
class Unseal(Job):
    """Checks a record against ``seal`` unless ``key`` is in ``checked``, and decompresses it if needed. A damaged
    record is read again from a mirror."""

    reader: Reader
    record: Record
    seal: Seal
    slot: Slot
    key: Key
    checked: set[Key]

    def run(self) -> None:
        first, stored = self.key not in self.checked, self.record.inside
        if first:
            try:
                self.compare(self.seal.file)
            except StorageError:
                extent = self.record.extents[0]
                request = Request(extent, extent.lo, extent.hi)
                self.reader.repair(request, buffer_of(request, self.slot), self.compare)
        if stored is not None:
            try:
                stored.restore(self._packed(stored.nbytes), self.slot.buffer.numpy(), check=first)
            except ValueError as error:
                self.checked.discard(self.key)
                why = f"{error}; the record was damaged in transit or packed wrongly: pack the model again"
                raise self.stalled(why) from error
        self.checked.add(self.key)

    def compare(self, file: Path) -> None:
        """Raises StorageError that names ``file``, the origin of the record."""
        replace(self.seal, file=file).check(checksum(self._packed(self.seal.nbytes).data))

    def _packed(self, nbytes: int) -> NDArray[np.uint8]:
        at = self.record.extents[0].at
        return self.slot.buffer.numpy()[at : at + nbytes]

    def stalled(self, why: str) -> Exception:
        seal = self.seal
        if self.record.inside is None:
            return StorageError(f"checking {seal.name} of {seal.file} against its checksum: {why}")
        what = f"{seal.file}: decompressing {seal.name}, {seal.nbytes} bytes at offset {seal.offset}: {why}"
        return StorageError(what, file=str(seal.file), tensor=seal.name, offset=seal.offset)


@dataclass(slots=True, eq=False)
class CopyUp(Job):
    """Copies ``nbytes`` from ``source`` to ``slot`` of the tier above."""

    source: Slot
    slot: Slot

    def run(self) -> None:
        self.slot.wait()
        self.slot.copy(self.source, self.nbytes)

    def stalled(self, why: str) -> Exception:
        return StorageError(f"copying {self.what} over {self.link}: {why}")


def buffer_of(request: Request, slot: Slot) -> memoryview:
    """The destination of ``request`` in ``slot``. Waits until the old content is no longer read."""
    slot.wait()
    assert slot.memory is not None
    return slot.memory[request.at : request.at + request.hi - request.lo]
