"""What moves bytes: tickets, over two executors.

Plain reads of files go to threads that do without Python (memory/compiled), where they were built. Everything else,
copies between memories, checksums, reads that have a choice of files, and reads that failed, goes to threads of Python.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from tierlm.memory import compiled
from tierlm.memory.executor import Executor, LinkStats
from tierlm.memory.jobs import Read
from tierlm.memory.threads import Threads
from tierlm.memory.ticket import DISK, Job, Priority, State, Ticket
from tierlm.policies.limits import spare_lanes
from tierlm.timeline import Timeline

INTERRUPTIBLE = 0.1  # seconds of waiting after which Python looks whether it has been interrupted


class Transfer:
    """Tickets, and who performs them: ``threads`` threads of each executor. All methods may be called from any thread.

    Prefetch and warm-up take up a quarter of the threads, or two: a demand finds most of them free, and the arithmetic
    beside them keeps more of the memory's bandwidth. ``merged_bytes``: what plain reads that adjoin may come to
    together, to be done in one go. ``executor``: one that does all work in place of the two.
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
        self._closed = False
        self._seen = 0  # of the count of ``reads``, what has been looked at
        spare = spare_lanes(threads)
        self.threads = executor or Threads(threads, spare, self.take_ended, timeline)
        self.reads = self.threads
        if executor is None and compiled.load() is not None:
            self.reads = compiled.Reads(threads, spare, merged_bytes, self.take_ended, timeline)
        self._executors: tuple[Executor, ...] = (
            (self.threads,) if self.reads is self.threads else (self.threads, self.reads)
        )

    def submit(
        self,
        jobs: Sequence[Job] | Read,
        *,
        priority: Priority = Priority.DEMAND,
        after: Ticket | None = None,
        last: Job | None = None,
    ) -> Ticket:
        """Queue jobs, and a ``last`` one that needs the others; they start once ``after`` is done, and fail with it.

        Raises RuntimeError when closed.
        """
        ticket = Ticket(jobs, priority, after, last)
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
                    self._collect()  # if it ended just before
        return ticket

    def collect(self) -> None:
        """Take note of what has ended: tickets are not ``done`` before."""
        if self.reads.count != self._seen:
            self.take_ended()

    def take_ended(self) -> None:
        """``collect``, for executors to call."""
        with self._lock:
            seen = self.reads.count
            self._collect()
            self._seen = seen

    def promote(self, ticket: Ticket) -> None:
        """Make a ticket, and what it waits for, a demand."""
        with self._lock:
            link: Ticket | None = ticket
            while link is not None and link.priority is not Priority.DEMAND:
                if link.executor is not None:
                    self._executors[link.executor].promote(link)
                link.priority = Priority.DEMAND
                link = link.after

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a ticket of which nothing has begun. False if it is too late for that."""
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
        """Return once any of ``tickets`` is done. Raises the stalled job's error after ``timeout`` seconds without
        one."""
        deadline = time.monotonic() + timeout
        while True:
            seen = self.reads.count
            self.collect()
            if any(ticket.done for ticket in tickets):
                return
            if (left := deadline - time.monotonic()) > 0:
                self.reads.wait(seen, min(left, INTERRUPTIBLE))
            elif (stuck := self._stuck(tickets[0])) is not None:
                raise stuck.stalled(f"stalled: nothing came for {timeout:g} s")

    def busy(self) -> dict[str, LinkStats]:
        """Per link: bytes moved and seconds busy so far."""
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
        """Bytes of demands that no thread has taken up yet."""
        return sum(executor.backlog() for executor in self._executors)

    def close(self, timeout: float = 5.0) -> bool:
        """Stop the threads after the jobs that they are in. False if one of them is stuck in a read."""
        with self._lock:
            self._closed = True
        deadline = time.monotonic() + timeout
        idle = [executor.close(max(0.0, deadline - time.monotonic())) for executor in self._executors]
        return all(idle)

    def _start(self, ticket: Ticket, *, first: bool) -> None:
        """Hand the jobs of ``ticket`` to the executor for their kind."""
        plain = isinstance(ticket.jobs, Read) and ticket.jobs.words is not None
        ticket.executor = len(self._executors) - 1 if plain else 0
        self._executors[ticket.executor].submit(ticket, first=first)

    def _collect(self) -> None:
        for executor in self._executors:
            for ticket, good in executor.ended():
                ticket.state = State.BEGUN
                if ticket.error is not None:
                    self._finish(ticket, State.FAILED)
                elif not good:  # once more, by those who find out why
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
        """Start ``ticket`` now that ``after`` is done, or end it the same way."""
        if after.state is State.ARRIVED:
            self._start(ticket, first=True)
        else:
            ticket.error = after.error
            self._finish(ticket, after.state)

    def _stuck(self, ticket: Ticket) -> Job | None:
        """The first job that has not ended of ``ticket``, or of what it waits for; None if there is none by now."""
        with self._lock:
            while ticket.after is not None and not ticket.after.done:
                ticket = ticket.after
            return None if ticket.executor is None else self._executors[ticket.executor].unfinished(ticket)
