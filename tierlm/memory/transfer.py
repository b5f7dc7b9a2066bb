"""What moves bytes: threads over a queue, in which demands go first, then guesses, then the background.

Plain reads of files go to threads that do without Python (memory/compiled), where they were built. All else, copies
between memories, checksums, reads that may be done from several files, and reads that failed, is done by Python's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tierlm.memory import compiled
from tierlm.memory.compiled import Reads
from tierlm.memory.queues import Queues
from tierlm.memory.ticket import DISK, Job, PlainRead, Priority, Ticket
from tierlm.policies.limits import spare_lanes
from tierlm.timeline import Timeline

INTERRUPTIBLE = 0.1  # seconds of waiting after which Python looks whether it has been interrupted


@dataclass
class LinkStats:
    """``seconds``: during which at least one job was under way on this link; ``cpu``: processor time of the threads."""

    bytes: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    active: int = 0
    since: float = 0.0


class Signal:
    """Counts what has ended, and wakes who waits for it: what ``compiled.Reads`` is as well."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()

    def wait(self, seen: int, timeout: float) -> None:
        """Return once ``count`` is not ``seen``, or after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.count != seen, timeout)

    def wake(self) -> None:
        with self._changed:
            self.count += 1
            self._changed.notify_all()


class Transfer:
    """Pools of ``threads`` over queues. All methods may be called from any thread.

    Guesses and the background take up a quarter of the threads, or two: a demand finds most of them free, and the
    arithmetic beside them keeps more of the memory's bandwidth. ``merged_bytes``: what plain reads that adjoin may come
    to together, to be done in one go.
    """

    def __init__(self, threads: int, timeline: Timeline | None = None, merged_bytes: int = 0):
        self.timeline = timeline
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        spare = spare_lanes(threads)
        self._queues = Queues(threads, spare)
        self._closed = False
        self.links: dict[str, LinkStats] = {}
        self.reads: Reads | None = None  # where they were built
        if compiled.load() is not None:
            self.reads = Reads(threads, spare, merged_bytes, self.collect)
        self._reading: dict[int, Ticket] = {}  # what they have
        self._ended: Reads | Signal = self.reads or Signal()
        self._collected = 0  # of its count, what has been looked at
        self._threads = [
            threading.Thread(target=self._run, name=f"tierlm-transfer-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        jobs: Sequence[Job],
        *,
        priority: Priority = Priority.DEMAND,
        after: Ticket | None = None,
        last: Job | None = None,
    ) -> Ticket:
        """Queue jobs, and a ``last`` one that needs the others; they start once ``after`` is done, and fail with it.

        Raises RuntimeError when closed.
        """
        ticket = Ticket(jobs, priority, after, last, len(jobs), unfinished=set(range(len(jobs))))
        with self._lock:
            if self._closed:
                raise RuntimeError("transfer is closed")
            if after is not None and not after.done:
                after.dependents.append(ticket)
                if after.number and self.reads is not None:
                    self.reads.announce(after.number)
                    self._collect()  # if it ended just before
            elif after is not None and (after.error or after.cancelled):
                ticket.cancelled = after.cancelled
                self._finish(ticket, after.error)
            else:
                self._enqueue(ticket, first=after is not None)
        return ticket

    def read(self, read: PlainRead, *, priority: Priority = Priority.DEMAND, last: Job | None = None) -> Ticket:
        """Queue plain reads, and a ``last`` job that needs them. Raises RuntimeError when closed."""
        if self.reads is None:
            return self.submit(read.jobs(), priority=priority, last=last)
        ticket = Ticket((), priority, last=last, read=read)
        with self._lock:
            if self._closed:
                raise RuntimeError("transfer is closed")
            ticket.number = self.reads.submit(read.requests, read.base, priority, last is not None)
            self._reading[ticket.number] = ticket
        return ticket

    def collect(self) -> None:
        """Take note of the reads that have ended: their tickets are not ``done`` before."""
        seen = self._ended.count
        if seen != self._collected:
            with self._lock:
                self._collect()
            self._collected = seen

    def promote(self, ticket: Ticket) -> None:
        """Make a ticket, and what it waits for, a demand."""
        with self._lock:
            link: Ticket | None = ticket
            while link is not None and link.priority is not Priority.DEMAND:
                if link.number and self.reads is not None:
                    self.reads.promote(link.number)
                self._work.notify(self._queues.promote(link))  # a background job may have had no thread
                link = link.after

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a ticket of which nothing has started. False if it is too late for that."""
        with self._lock:
            if ticket.done or ticket.begun:
                return False
            if ticket.number and self.reads is not None:
                if not self.reads.cancel(ticket.number):
                    return False
                del self._reading[ticket.number]
            if ticket.after is not None and ticket in ticket.after.dependents:
                ticket.after.dependents.remove(ticket)
            self._queues.remove(ticket)
            ticket.cancelled = True
            self._finish(ticket, None)
            return True

    def wait_any(self, tickets: Sequence[Ticket], timeout: float) -> None:
        """Return once any of ``tickets`` is done. Raises the stalled read's error after ``timeout`` seconds without
        one."""
        deadline = time.monotonic() + timeout
        while True:
            seen = self._ended.count
            self.collect()
            if any(ticket.done for ticket in tickets):
                return
            if (left := deadline - time.monotonic()) > 0:
                self._ended.wait(seen, min(left, INTERRUPTIBLE))
            elif (stuck := self._stuck(tickets[0])) is not None:
                raise stuck.stalled(f"stalled: nothing came for {timeout:g} s")

    def _stuck(self, ticket: Ticket) -> Job | None:
        """The first job that has not ended of ``ticket``, or of what it waits for; None if there is none by now."""
        with self._lock:
            while ticket.after is not None and not ticket.after.done:
                ticket = ticket.after
            if ticket.done:
                return None
            if ticket.number and ticket.read is not None and self.reads is not None:
                return ticket.read.jobs()[self.reads.unfinished(ticket.number)]
            return ticket.jobs[min(ticket.unfinished)]

    def busy(self) -> dict[str, LinkStats]:
        """Per link: bytes moved and seconds busy so far."""
        now = time.perf_counter()
        with self._lock:
            found = {
                name: LinkStats(link.bytes, link.seconds + (now - link.since if link.active else 0.0), link.cpu)
                for name, link in self.links.items()
            }
        if self.reads is not None:
            account, link = self.reads.account(), found.setdefault(DISK, LinkStats())
            link.bytes += account.bytes
            link.seconds += account.seconds
            link.cpu += account.cpu
        return found

    def backlog(self) -> int:
        """Bytes of demands that no thread has taken up yet."""
        waiting = 0 if self.reads is None else self.reads.account().waiting
        with self._lock:
            return waiting + self._queues.backlog()

    def close(self, timeout: float = 5.0) -> bool:
        """Stop the threads after the jobs that they are in. False if one of them is stuck in a read."""
        with self._lock:
            self._closed = True
            self._queues.clear()
            self._work.notify_all()
        deadline = time.monotonic() + timeout
        idle = self.reads is None or self.reads.close(timeout)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return idle and not any(thread.is_alive() for thread in self._threads)

    def _enqueue(self, ticket: Ticket, first: bool) -> None:
        self._queues.put(ticket, range(len(ticket.jobs)), first)
        self._work.notify(len(ticket.jobs))

    def _collect(self) -> None:
        if self.reads is None:
            return
        timed = self.timeline is not None
        for number, good, times in self.reads.ended(timed):
            ticket = self._reading.pop(number)
            ticket.number, read = 0, ticket.read
            assert read is not None
            if timed:
                self._note(ticket, read, times)
            if good:
                ticket.begun = True
                self._conclude(ticket)
            else:  # again, by those who find out why
                ticket.jobs = read.jobs()
                ticket.pending, ticket.unfinished = len(ticket.jobs), set(range(len(ticket.jobs)))
                self._enqueue(ticket, first=True)

    def _note(self, ticket: Ticket, read: PlainRead, times: Sequence[float]) -> None:
        """Enter reads that have ended into the timeline."""
        assert self.timeline is not None
        priority = ticket.priority.name.lower()
        spans = zip(times[::3], times[1::3], times[2::3], read.requests[3::5], strict=False)  # other tickets' follow
        for began, ended, lane, nbytes in spans:
            self.timeline.add(DISK, read.what, began, ended, int(lane), bytes=nbytes, priority=priority)

    def _conclude(self, ticket: Ticket) -> None:
        """All queued jobs of a ticket have ended: queue its last one, if there is one, or finish it."""
        if ticket.last is None or ticket.error is not None:
            self._finish(ticket, None)
            return
        index = len(ticket.jobs)
        ticket.jobs, ticket.last = [*ticket.jobs, ticket.last], None
        ticket.pending = 1
        ticket.unfinished.add(index)
        self._queues.put(ticket, [index], first=True)
        self._work.notify()

    def _finish(self, ticket: Ticket, error: BaseException | None) -> None:
        ticket.error = ticket.error or error
        ticket.done = True
        for dependent in ticket.dependents:
            if ticket.error or ticket.cancelled:
                dependent.cancelled = ticket.cancelled
                self._finish(dependent, ticket.error)
            else:
                self._enqueue(dependent, first=True)
        ticket.dependents.clear()
        self._ended.wake()

    def _run(self) -> None:
        while True:
            with self._work:
                while not (items := self._queues.take()) and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
                jobs = [ticket.jobs[index] for ticket, index in items]
                priority, skip = items[0][0].priority, items[0][0].error is not None
                link = self.links.setdefault(jobs[0].link, LinkStats())
                began = time.perf_counter()
                if not link.active:
                    link.since = began
                link.active += 1
            cpu = time.thread_time()
            errors = [None] if skip else _run_jobs(jobs)
            cpu = time.thread_time() - cpu
            ended = time.perf_counter()
            if self.timeline is not None:
                name, nbytes = ", ".join(job.what for job in jobs), sum(job.nbytes for job in jobs)
                self.timeline.add(jobs[0].link, name, began, ended, bytes=nbytes, priority=priority.name.lower())
            with self._work:
                link.active -= 1
                if not link.active:
                    link.seconds += ended - link.since
                link.cpu += cpu
                if priority is not Priority.DEMAND:
                    self._queues.spare += 1
                    self._work.notify()
                for (ticket, index), job, error in zip(items, jobs, errors, strict=True):
                    if error is None and not skip:
                        link.bytes += job.nbytes
                    ticket.error = ticket.error or error
                    ticket.unfinished.discard(index)
                    ticket.pending -= 1
                    if not ticket.pending:
                        self._conclude(ticket)


def _run_jobs(jobs: Sequence[Job]) -> list[BaseException | None]:
    """Do some jobs, in one go if there are several. Returns the error of each: whatever it is, the thread lives on and
    the waiter gets it."""
    if len(jobs) > 1:
        try:
            jobs[0].run_with(jobs[1:])
            return [None] * len(jobs)
        except BaseException:  # whose it is shows when each is done alone
            pass
    errors: list[BaseException | None] = []
    for job in jobs:
        try:
            job.run()
            errors.append(None)
        except BaseException as error:
            errors.append(error)
    return errors
