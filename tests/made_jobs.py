"""Jobs and reads for tests, and threads that can be held while the queue is filled."""

from __future__ import annotations

import itertools
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from made_files import content

from tierlm.checkpoints.reader import DirectReader, Request
from tierlm.checkpoints.record import ALIGNMENT, Record, TensorInfo, build_record
from tierlm.memory.disk import Disk
from tierlm.memory.jobs import Read
from tierlm.memory.slots import Slot, allocate
from tierlm.memory.ticket import Job, Ticket
from tierlm.memory.transfer import Transfer
from tierlm.policies.residency import Purpose
from tierlm.spec import ExpertKey, Key
from tierlm.timeline import Timeline

WAIT = 20.0
DEMAND, PREFETCH, WARM_UP = Purpose
HOLD = ExpertKey(99, 0)  # for reads that no test looks at


@dataclass(slots=True, eq=False)
class Call(Job):
    """Calls a function."""

    function: Callable[[], object]
    error: Callable[[str], Exception] = RuntimeError

    def run(self) -> None:
        self.function()

    def stalled(self, why: str) -> Exception:
        return self.error(why)


def call(function: Callable[[], object]) -> Call:
    return Call("call", 0, "call", function)


class Held(Transfer):
    """Holds the reading threads in their announcements until ``gate`` opens."""

    def __init__(self, threads: int = 1, timeline: Timeline | None = None, merged_bytes: int = 0):
        self.gate, self.inside = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        super().__init__(threads, timeline, merged_bytes)

    def take_ended(self) -> None:
        super().take_ended()
        if isinstance(threading.current_thread(), threading._DummyThread):  # a thread that Python did not create
            self.inside.release()
            assert self.gate.wait(WAIT)


@dataclass
class Shelf:
    """A file of consecutive records, and slots into which a disk reads them."""

    file: Path
    edges: Sequence[int]
    transfer: Held
    request_bytes: int = 2**20
    given: list[Record] | None = None  # in place of the records between ``edges``
    slots: list[Slot] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.records = self.given or [
            build_record({"w": TensorInfo(f"w{i}", self.file, start, stop - start, "U8", (stop - start,))})
            for i, (start, stop) in enumerate(itertools.pairwise(self.edges))
        ]
        self.slots = [Slot(allocate(record.nbytes, torch.device("cpu"))) for record in self.records]
        self.reader = DirectReader()
        self.disk = Disk(self.reader, self.record, self.transfer, self.request_bytes)

    def record(self, key: Key) -> Record:
        assert isinstance(key, ExpertKey)
        return self.records[key.expert]

    def fetch(self, i: int, purpose: Purpose = DEMAND) -> Ticket:
        ticket = self.disk.fetch(ExpertKey(0, i), self.slots[i], purpose, False)[0]
        assert ticket.done or ticket.executor != 0
        return ticket

    def read(self, words: Sequence[int], slot: Slot, requests: Sequence[Request] = ()) -> Read:
        """A read of any words; ``requests`` say what to read if that fails."""
        return Read(self.reader, requests, array("q", words), slot, HOLD)

    def expected(self, i: int) -> bytes:
        return content(self.edges[-1])[self.edges[i] : self.edges[i + 1]]

    def bytes_of(self, i: int) -> bytes:
        place = self.records[i].places["w"]
        return self.slots[i].buffer[place.offset : place.offset + place.nbytes].numpy().tobytes()

    def hold(self, threads: int = 1) -> None:
        """Keep ``threads`` threads in an announcement until ``transfer.gate`` opens."""
        self.transfer.gate.clear()
        self.scratch = Slot(allocate(threads * ALIGNMENT, torch.device("cpu")))
        fd = self.reader.descriptor(self.file)
        assert fd is not None
        for i in range(threads):
            read = self.read([fd, 0, 1, ALIGNMENT, i * ALIGNMENT], self.scratch)
            self.transfer.submit(read, last=call(lambda: None))
            assert self.transfer.inside.acquire(timeout=WAIT)

    def finish(self, *tickets: Ticket) -> None:
        for ticket in tickets:
            self.transfer.wait_any([ticket], WAIT)

    def close(self) -> None:
        self.transfer.gate.set()
        assert self.transfer.close(WAIT)
        self.reader.close()


def reads_of(timeline: Timeline) -> list[list[int]]:
    """The bytes of reads merged into one: those that began and ended together."""
    together: dict[tuple[float, float], list[int]] = {}
    for track, _, name, began, ended, details in timeline._spans:
        if track == "disk->ram" and name != str(HOLD):
            together.setdefault((began, ended), []).append(details["bytes"])
    return list(together.values())
