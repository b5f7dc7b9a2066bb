"""The tier at the bottom."""

from __future__ import annotations

from collections.abc import Callable

from tierlm.errors import StorageError
from tierlm.memory.slots import Entry, Slot
from tierlm.memory.transfer import Job, Priority, Ticket, Transfer
from tierlm.spec import Key
from tierlm.weights.checkpoint import Record
from tierlm.weights.reader import Reader, Request, failure, split


class Disk:
    """The tier at the bottom: records are always there, and are read, at most ``request_bytes`` at a time."""

    def __init__(self, reader: Reader, records: Callable[[Key], Record], transfer: Transfer, request_bytes: int):
        self.reader, self.records, self.transfer = reader, records, transfer
        self.request_bytes = request_bytes

    def fetch(self, key: Key, slot: Slot, priority: Priority, passing: bool) -> tuple[Ticket, None]:
        requests = [part for extent in self.records(key).extents for part in split(extent, self.request_bytes)]
        return self.transfer.submit([self._job(r, slot, str(tuple(key))) for r in requests], priority=priority), None

    def _job(self, request: Request, slot: Slot, what: str) -> Job:
        def run() -> None:
            slot.wait()
            part = slot.buffer[request.at : request.at + request.hi - request.lo]
            self.reader.read(request, part.numpy().data)

        def stalled(why: str) -> StorageError:
            return failure(request, request.start, why)

        return Job("disk->ram", request.hi - request.lo, run, stalled, what)

    def settle(self) -> None:
        """Nothing arrives at the disk."""

    def copied(self, entry: Entry) -> None:
        """The disk pins nothing."""

    def keep(self, key: Key) -> None:
        """The disk keeps everything."""

    def cancel_stale(self, stale: Callable[[Key], bool], *, begun: bool = True) -> None:
        """Reads belong to the tier that asked for them."""
