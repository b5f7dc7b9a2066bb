"""The tier at the bottom. Sealed records are compared with their seals when they are first read."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tierlm.checkpoints.checkpoint import Record
from tierlm.checkpoints.checksum import Seal, checksum
from tierlm.checkpoints.codec import Compressed
from tierlm.checkpoints.reader import Reader, Request, failure, split
from tierlm.errors import StorageError
from tierlm.memory.slots import Entry, Slot
from tierlm.memory.ticket import DISK, Job, PlainRead, Priority, Ticket
from tierlm.memory.transfer import Transfer
from tierlm.spec import Key


@dataclass(slots=True, eq=False, kw_only=True)
class Read(Job):
    """One request. Records that are smaller than requests may be, and adjoin in their file, are read in one go."""

    request: Request
    slot: Slot
    disk: Disk

    def follows(self, jobs: Sequence[Job]) -> bool:
        first, last = jobs[0], jobs[-1]
        if not isinstance(first, Read) or not isinstance(last, Read):
            return False
        small = self.request.hi - first.request.lo <= self.disk.request_bytes
        return small and self.disk.reader.adjoin(last.request, self.request)

    def run_with(self, others: Sequence[Job]) -> None:
        reads = [self, *(job for job in others if isinstance(job, Read))]
        self.disk.reader.read_together(
            [read.request for read in reads], [_buffer(read.request, read.slot) for read in reads]
        )


class Disk:
    """The tier at the bottom: records are always there, and are read, at most ``request_bytes`` at a time."""

    def __init__(self, reader: Reader, records: Callable[[Key], Record], transfer: Transfer, request_bytes: int):
        self.reader, self.records, self.transfer = reader, records, transfer
        self.request_bytes = request_bytes
        self._checked: set[Key] = set()  # added to by the transfer's threads
        self._requests: dict[Key, tuple[list[Request], array[int] | None]] = {}

    def fetch(self, key: Key, slot: Slot, priority: Priority, streaming: bool) -> tuple[Ticket, None]:
        record = self.records(key)
        last = None
        if record.inside is not None:
            last = self._decompression(key, record, record.inside, slot)
        elif record.seal is not None and key not in self._checked:
            last = self._check(key, record, record.seal, slot)
        requests, words = self._requests.get(key) or self._split(key, record)

        def jobs() -> list[Job]:
            return [self._job(request, slot, str(key)) for request in requests]

        if words is None or slot.guard is not None:
            return self.transfer.submit(jobs(), priority=priority, last=last), None
        read = PlainRead(words, slot.buffer.data_ptr(), jobs, str(key))
        return self.transfer.read(read, priority=priority, last=last), None

    def _split(self, key: Key, record: Record) -> tuple[list[Request], array[int] | None]:
        """The requests of ``record``; if they are plain reads, as ``PlainRead`` has them as well."""
        requests = [part for extent in record.extents for part in split(extent, self.request_bytes)]
        descriptors = [self.reader.descriptor(request.extent.file) for request in requests]
        words: array[int] | None = array("q")
        for request, descriptor in zip(requests, descriptors, strict=True):
            if words is None or descriptor is None:
                words = None
            else:
                nbytes, wanted = request.hi - request.lo, request.stop - request.lo
                words.extend((descriptor, request.lo, wanted, nbytes, request.at))
        self._requests[key] = requests, words
        return requests, words

    def _decompression(self, key: Key, record: Record, inside: Compressed, slot: Slot) -> Job:
        seal, at = record.seal, record.extents[0].at
        assert seal is not None  # the catalog has seen to it
        check = self._check(key, record, seal, slot)

        def failed(why: object) -> StorageError:
            what = f"{seal.file}: decompressing {seal.name}, {seal.nbytes} bytes at offset {seal.offset}: {why}"
            return StorageError(what, file=str(seal.file), tensor=seal.name, offset=seal.offset)

        def run() -> None:
            first = key not in self._checked
            if first:
                check.run()
            buffer = slot.buffer.numpy()
            try:
                inside.restore(buffer[at : at + inside.nbytes], buffer, check=first)
            except ValueError as error:
                self._checked.discard(key)
                raise failed(f"{error}; it was damaged on the way, or packed wrongly: pack the model again") from error

        return Job("zstd", inside.raw, run, failed, str(key))

    def _check(self, key: Key, record: Record, seal: Seal, slot: Slot) -> Job:
        at = record.extents[0].at

        def check(file: Path) -> None:
            replace(seal, file=file).check(checksum(slot.buffer[at : at + seal.nbytes].numpy().data))

        def run() -> None:
            try:
                check(seal.file)
            except StorageError:
                extent = record.extents[0]
                request = Request(extent, extent.lo, extent.hi)
                self.reader.repair(request, _buffer(request, slot), check)
            self._checked.add(key)

        def stalled(why: str) -> Exception:
            return StorageError(f"comparing {seal.name} of {seal.file} with its checksum: {why}")

        return Job("checksum", seal.nbytes, run, stalled, str(key))

    def _job(self, request: Request, slot: Slot, what: str) -> Job:
        def run() -> None:
            self.reader.read(request, _buffer(request, slot))

        def stalled(why: str) -> Exception:
            return failure(request, request.start, why)

        return Read(DISK, request.hi - request.lo, run, stalled, what, request=request, slot=slot, disk=self)

    def settle(self) -> None:
        """Nothing arrives at the disk, but what has left it may."""
        self.transfer.collect()

    def copied(self, entry: Entry) -> None:
        """The disk pins nothing."""

    def keep(self, key: Key) -> None:
        """The disk keeps everything."""

    def cancel_stale(self, stale: Callable[[Key], bool], *, begun: bool = True) -> None:
        """Reads belong to the tier that asked for them."""


def _buffer(request: Request, slot: Slot) -> memoryview:
    """The place of a request in its slot, once nobody reads the old content any more."""
    slot.wait()
    assert slot.memory is not None
    return slot.memory[request.at : request.at + request.hi - request.lo]
