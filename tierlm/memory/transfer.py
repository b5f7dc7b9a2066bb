"""Moves bytes: runs tickets on two executors.

Plain file reads go to native threads (memory/compiled), if built. Everything else goes to Python threads: copies
between tiers, checksums, reads with a choice of files, and retries of failed reads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

from tierlm.memory import compiled
from tierlm.memory.executor import Executor, LinkStats
from tierlm.memory.jobs import Read
from tierlm.memory.slots import Slot
from tierlm.memory.threads import LEAVE, Threads
from tierlm.memory.ticket import DISK, Job, State, Ticket
from tierlm.policies.limits import spare_lanes, touch_lanes
from tierlm.policies.residency import Purpose
from tierlm.timeline import Timeline

LOOK = 0.1  # longest wait in seconds before a look at ``leaving``


class Transfer:
    """Tickets and their executors, with ``threads`` threads each. Thread-safe.

    Prefetch and warm-up use a quarter of the threads, at least two, so that demands find most threads free and
    computation keeps memory bandwidth. ``merged_bytes``: adjacent plain reads up to this total are done as one.
    ``executor``: replaces both executors. ``leaving``: set it to end all waits, since the model is to be closed.
    Raises TierlmError if the system refuses a thread.
    """

    def __init__(
        self,
        threads: int,
        timeline: Timeline | None = None,
        merged_bytes: int = 0,
        executor: Executor | None = None,
    ):
        self.timeline = timeline
        self._lock = threading.Lock()
        self.leaving = False
        self._closed = False
        self._seen = 0  # the value of ``reads.count`` at the last collection
        spare = spare_lanes(threads)
        self.threads = executor or Threads(threads, spare, self.take_ended, timeline)
        self.reads = self.threads
        if executor is None and compiled.load() is not None:
            try:
                self.reads = compiled.Reads(threads, spare, touch_lanes(), merged_bytes, self.take_ended, timeline)
            except BaseException:
                self.threads.close(LEAVE)
                raise
        self._executors: tuple[Executor, ...] = (
            (self.threads,) if self.reads is self.threads else (self.threads, self.reads)
        )

    def submit(
        self,
        jobs: Sequence[Job] | Read,
        *,
        purpose: Purpose = Purpose.DEMAND,
        after: Ticket | None = None,
        last: Job | None = None,
    ) -> Ticket:
        """Queue jobs, then ``last``, which depends on them. They start when ``after`` arrives, and fail if it fails.

        Raises RuntimeError when closed.
        """
        ticket = Ticket(jobs, purpose, after, last)
        with self._lock:
            if self._closed:
                raise RuntimeError("transfer is closed")
            if after is None:
                self._start(ticket, first=False)
            elif after.done:
                self._follow(ticket, after)
            else:
                after.dependents.append(ticket)
                if after.executor is not None:
                    self._executors[after.executor].announce(after)
                    self._collect()  # it may have ended just before
        return ticket

    def populate(self, slots: Iterable[Slot]) -> None:
        """Commit the pages of ``slots``, in this order, on processors that idle."""
        with self._lock:
            for slot in slots:
                self.reads.populate(slot)

    def leave(self, slot: Slot) -> None:
        """Stop to populate ``slot``, whose memory is to be returned to the system."""
        with self._lock:
            self.reads.leave(slot)

    def collect(self) -> None:
        """Collect ended tickets. Only this makes them ``done``."""
        if self.reads.count != self._seen:
            self.take_ended()

    def take_ended(self) -> None:
        """As ``collect``, unconditionally. Executors call it."""
        with self._lock:
            seen = self.reads.count
            self._collect()
            self._seen = seen

    def promote(self, ticket: Ticket) -> None:
        """Make a ticket, and those it waits for, a demand."""
        with self._lock:
            link: Ticket | None = ticket
            while link is not None and link.purpose is not Purpose.DEMAND:
                if link.executor is not None:
                    self._executors[link.executor].promote(link)
                link.purpose = Purpose.DEMAND
                link = link.after

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a ticket unless any of its jobs has begun. Returns whether it was dropped."""
        with self._lock:
            if ticket.state is not State.WAITING:
                return False
            if ticket.executor is not None and not self._executors[ticket.executor].cancel(ticket):
                return False
            if ticket.after is not None and ticket in ticket.after.dependents:
                ticket.after.dependents.remove(ticket)
            self._finish(ticket, State.CANCELLED)
            return True

    def wait_any(self, tickets: Sequence[Ticket], timeout: float) -> None:
        """Return once any of ``tickets`` is done. Raises the stalled job's error after ``timeout`` seconds, and
        RuntimeError once ``leaving``."""
        deadline = time.monotonic() + timeout
        while True:
            seen = self.reads.count
            self.collect()
            if any(ticket.done for ticket in tickets):
                return
            if self.leaving:
                raise RuntimeError("transfer is closing")
            if (left := deadline - time.monotonic()) > 0:
                self.reads.wait(seen, min(left, LOOK))
            elif (stuck := self._stuck(tickets[0])) is not None:
                raise stuck.stalled(f"stalled: nothing came for {timeout:g} s")

    def busy(self) -> dict[str, LinkStats]:
        """Totals so far, by link."""
        found = self.reads.links()
        if self.threads is not self.reads:
            for name, link in self.threads.links().items():
                total = found.setdefault(name, LinkStats())
                total.bytes += link.bytes
                total.seconds += link.seconds
                total.cpu += link.cpu
        found.setdefault(DISK, LinkStats())
        return found

    def backlog(self) -> int:
        """Bytes of queued demands that no thread has taken."""
        return sum(executor.backlog() for executor in self._executors)

    def close(self, timeout: float = LEAVE) -> bool:
        """Let the threads finish their current jobs, then stop them. False if one is stuck in a read."""
        with self._lock:
            self._closed = True
        deadline = time.monotonic() + timeout
        idle = [executor.close(max(0.0, deadline - time.monotonic())) for executor in self._executors]
        return all(idle)

    def _start(self, ticket: Ticket, *, first: bool) -> None:
        """Submit ``ticket`` to the executor for its jobs."""
        plain = isinstance(ticket.jobs, Read) and ticket.jobs.words is not None
        ticket.executor = len(self._executors) - 1 if plain else 0
        self._executors[ticket.executor].submit(ticket, first=first)

    def _collect(self) -> None:
        for executor in self._executors:
            for ticket, good in executor.ended():
                ticket.state = State.BEGUN
                if ticket.error is not None:
                    self._finish(ticket, State.FAILED)
                elif not good:  # retried in Python to find the cause
                    ticket.executor = 0
                    self.threads.submit(ticket, first=True)
                elif ticket.last is not None:
                    ticket.jobs, ticket.last = (ticket.last,), None
                    self._start(ticket, first=True)
                else:
                    self._finish(ticket, State.ARRIVED)

    def _finish(self, ticket: Ticket, state: State) -> None:
        ticket.state, ticket.executor = state, None
        for dependent in ticket.dependents:
            self._follow(dependent, ticket)
        ticket.dependents.clear()
        self.reads.wake()

    def _follow(self, ticket: Ticket, after: Ticket) -> None:
        """Start ``ticket`` if ``after`` arrived; otherwise end it the same way."""
        if after.state is State.ARRIVED:
            self._start(ticket, first=True)
        else:
            ticket.error = after.error
            self._finish(ticket, after.state)

    def _stuck(self, ticket: Ticket) -> Job | None:
        """The first unfinished job of ``ticket`` or of the tickets it waits for; None if it ended meanwhile."""
        with self._lock:
            while ticket.after is not None and not ticket.after.done:
                ticket = ticket.after
            return None if ticket.executor is None else self._executors[ticket.executor].unfinished(ticket)
