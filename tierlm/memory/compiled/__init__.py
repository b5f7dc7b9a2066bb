"""The executor for plain reads: native threads that never take the GIL for a read; others populate memory."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from tierlm.host import cannot_start
from tierlm.library import check_layout, find_library
from tierlm.memory.executor import Executor, LinkStats
from tierlm.memory.jobs import Read
from tierlm.memory.slots import Slot
from tierlm.memory.ticket import DISK, Job, Ticket
from tierlm.timeline import Timeline

TIMED = 1024  # reads per ticket with recorded times
LEAVE = 1.0  # seconds that reads in progress get when Python exits


class Request(ctypes.Structure):
    """One request of ``Read.words``: read ``length`` bytes of descriptor ``file``, at least the first ``wanted``, to
    ``at`` bytes into the slot. All fields but ``wanted`` are aligned."""

    _fields_ = [(name, ctypes.c_int64) for name in ("file", "offset", "wanted", "length", "at")]


WORDS = len(Request._fields_)


class Reads(Executor):
    """Runs tickets whose jobs are a ``Read`` with words. Reports that a read failed, but not why.

    At most ``spare`` threads prefetch and warm up; where no demand was recent, all of them warm up. A warm-up begins
    when no demand is queued or in progress, after one of ``touching`` threads has populated its memory. These run only
    where processors idle. Adjacent reads of a file, up to ``merged_bytes`` in total, are done as one. A thread calls
    ``announce`` when a ticket marked for it ends. ``wait`` and ``close`` release the GIL; other calls return at once
    and keep it. Raises TierlmError if the system refuses a thread.
    """

    def __init__(
        self,
        threads: int,
        spare: int,
        touching: int,
        merged_bytes: int,
        announce: Callable[[], None],
        timeline: Timeline | None,
    ):
        libraries = load()
        assert libraries is not None  # checked by the caller
        self._quick, self._slow = libraries
        self._timeline = timeline
        self._tickets: dict[int, Ticket] = {}
        self._populating: dict[Slot, int] = {}  # numbers, like those of tickets
        self._count = ctypes.c_int64()
        self._announce = ctypes.CFUNCTYPE(None)(announce)
        self._times = (ctypes.c_double * (3 * TIMED))()
        count = ctypes.byref(self._count)
        self._reads = self._quick.tierlm_reads_open(threads, spare, touching, merged_bytes, count, self._announce)
        if self._reads is None:
            raise cannot_start(threads + touching, "reads")
        weakref.finalize(self, _free, self._slow, self._reads, os.getpid())

    @property
    def count(self) -> int:
        return self._count.value

    def submit(self, ticket: Ticket, *, first: bool) -> None:
        read = ticket.jobs
        assert isinstance(read, Read) and read.words is not None
        address, words = read.words.buffer_info()
        base, announced = read.slot.buffer.data_ptr(), ticket.last is not None or bool(ticket.dependents)
        ticket.number = self._quick.tierlm_reads_submit(
            self._reads, ticket.purpose, address, words // WORDS, base, announced, first
        )
        self._tickets[ticket.number] = ticket

    def populate(self, slot: Slot) -> None:
        number = self._quick.tierlm_reads_populate(self._reads, slot.buffer.data_ptr(), slot.size)
        self._populating[slot] = number

    def leave(self, slot: Slot) -> None:
        self._quick.tierlm_reads_cancel(self._reads, self._populating.pop(slot, 0))

    def announce(self, ticket: Ticket) -> None:
        self._quick.tierlm_reads_announce(self._reads, ticket.number)

    def promote(self, ticket: Ticket) -> None:
        self._quick.tierlm_reads_promote(self._reads, ticket.number)

    def cancel(self, ticket: Ticket) -> bool:
        if not self._quick.tierlm_reads_cancel(self._reads, ticket.number):
            return False
        del self._tickets[ticket.number]
        return True

    def unfinished(self, ticket: Ticket) -> Job | None:
        index = self._quick.tierlm_reads_unfinished(self._reads, ticket.number)
        return None if index < 0 else ticket.jobs[index]

    def ended(self) -> Iterator[tuple[Ticket, bool]]:
        room = 0 if self._timeline is None else TIMED
        while number := self._quick.tierlm_reads_next_ended(self._reads, self._times, room):
            ticket = self._tickets.pop(abs(number))
            if self._timeline is not None:
                self._note(self._timeline, ticket, self._times[:])
            yield ticket, number > 0

    def _note(self, timeline: Timeline, ticket: Ticket, times: Sequence[float]) -> None:
        """Add ended reads to the timeline. ``times``: begin, end and thread of each; what follows is stale."""
        read, purpose = ticket.jobs, ticket.purpose.name.lower()
        assert isinstance(read, Read)
        for request, began, ended, lane in zip(read.requests, times[::3], times[1::3], times[2::3], strict=False):
            nbytes = request.hi - request.lo
            timeline.add(DISK, read.what, began, ended, int(lane), bytes=nbytes, priority=purpose)

    def wait(self, seen: int, timeout: float) -> None:
        self._slow.tierlm_reads_wait(self._reads, seen, timeout)

    def wake(self) -> None:
        self._quick.tierlm_reads_wake(self._reads)

    def links(self) -> dict[str, LinkStats]:
        (nbytes, _), (seconds, cpu) = self._stats()
        return {DISK: LinkStats(nbytes, seconds, cpu)}

    def backlog(self) -> int:
        return self._stats()[0][1]

    def _stats(self) -> tuple[Sequence[int], Sequence[float]]:
        """Bytes read and bytes of queued demands; seconds with a read in progress and CPU seconds."""
        moved, spent = (ctypes.c_int64 * 2)(), (ctypes.c_double * 2)()
        self._quick.tierlm_reads_stats(self._reads, moved, spent)
        return moved[:], spent[:]

    def close(self, timeout: float) -> bool:
        if self._slow.tierlm_reads_close(self._reads, timeout):
            return True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))  # the target memory must outlive the read
        return False


def _free(library: ctypes.CDLL, reads: int, pid: int) -> None:
    """Not in a forked process, where the threads do not exist and their lock may be held for ever."""
    if os.getpid() == pid:
        library.tierlm_reads_free(reads, LEAVE)


@cache
def load() -> tuple[ctypes.PyDLL, ctypes.CDLL] | None:
    """The library, loaded to keep and to release the GIL; None if it was not built."""
    file = find_library(Path(__file__).parent)
    if file is None:
        return None
    quick, slow = ctypes.PyDLL(str(file)), ctypes.CDLL(str(file))
    check_layout(slow, Request)
    pointer, number, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    quick.tierlm_reads_open.argtypes = [whole, whole, whole, number, pointer, pointer]
    quick.tierlm_reads_open.restype = pointer
    quick.tierlm_reads_submit.argtypes = [pointer, whole, pointer, number, pointer, whole, whole]
    quick.tierlm_reads_submit.restype = number
    quick.tierlm_reads_populate.argtypes = [pointer, pointer, number]
    quick.tierlm_reads_populate.restype = number
    quick.tierlm_reads_next_ended.argtypes = [pointer, pointer, number]
    quick.tierlm_reads_next_ended.restype = number
    quick.tierlm_reads_stats.argtypes = [pointer] * 3
    quick.tierlm_reads_stats.restype = None
    for name in ("promote", "cancel", "announce", "unfinished"):
        getattr(quick, f"tierlm_reads_{name}").argtypes = [pointer, number]
    quick.tierlm_reads_unfinished.restype = number
    quick.tierlm_reads_wake.argtypes = [pointer]
    slow.tierlm_reads_wait.argtypes = [pointer, number, real]
    slow.tierlm_reads_close.argtypes = slow.tierlm_reads_free.argtypes = [pointer, real]
    return quick, slow
