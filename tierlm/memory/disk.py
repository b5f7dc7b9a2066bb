"""The lowest tier: files on disk. A sealed record is checked against its seal when it is first read."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence

from tierlm.checkpoints.reader import Reader, Request, split
from tierlm.checkpoints.record import Record
from tierlm.memory.jobs import Read, Unseal
from tierlm.memory.slots import Entry, Slot
from tierlm.memory.ticket import Ticket
from tierlm.memory.transfer import Transfer
from tierlm.policies.residency import Purpose
from tierlm.spec import Key


class Disk:
    """The lowest tier: holds every record, and reads it in requests of at most ``request_bytes``."""

    def __init__(self, reader: Reader, records: Callable[[Key], Record], transfer: Transfer, request_bytes: int):
        self.reader, self.records, self.transfer = reader, records, transfer
        self.request_bytes = request_bytes
        self._checked: set[Key] = set()  # transfer threads add to it
        self._requests: dict[Key, tuple[list[Request], array[int] | None]] = {}

    def fetch(self, key: Key, slot: Slot, purpose: Purpose, streaming: bool) -> tuple[Ticket, None]:
        record = self.records(key)
        requests, words = self._requests.get(key) or self._split(key, record)
        if slot.guard is not None:  # only a Python thread can wait for the event
            words = None
        last = None
        if record.inside is not None or (record.seal is not None and key not in self._checked):
            assert record.seal is not None  # ensured by the catalog
            link, nbytes = ("checksum", record.seal.nbytes) if record.inside is None else ("zstd", record.inside.raw)
            last = Unseal(link, nbytes, str(key), self.reader, record, record.seal, slot, key, self._checked)
        read = Read(self.reader, requests, words, slot, key)
        return self.transfer.submit(read, purpose=purpose, last=last), None

    def _split(self, key: Key, record: Record) -> tuple[list[Request], array[int] | None]:
        """The requests of ``record``, and their ``Read.words``: None unless all are plain reads."""
        requests = [part for extent in record.extents for part in split(extent, self.request_bytes)]
        words = array("q")
        for request in requests:
            descriptor = self.reader.descriptor(request.extent.file)
            if descriptor is None:
                return self._requests.setdefault(key, (requests, None))
            words.extend((descriptor, request.lo, request.stop - request.lo, request.hi - request.lo, request.at))
        return self._requests.setdefault(key, (requests, words))

    def settle(self) -> None:
        """Collect finished reads; nothing arrives at the disk itself."""
        self.transfer.collect()

    def copied(self, entry: Entry) -> None:
        """The disk pins nothing."""

    def keep(self, key: Key) -> None:
        """The disk keeps everything."""

    def cancel_stale(self, layer: int, wanted: Collection[Key], *, begun: bool = True) -> None:
        """Reads belong to the tier that asked for them."""

    def end_turn(self, layer: int) -> None:
        """The disk learns nothing."""

    def warm(self, keys: Sequence[Key], shares: Mapping[Key, float]) -> None:
        """The disk has no free slots."""

    def populate(self) -> None:
        """The disk has no slots."""

    def in_flight(self) -> list[Ticket]:
        return []
