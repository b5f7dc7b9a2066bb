"""What moves bytes: threads over a queue, in which demands go first, then guesses, then the background.

Plain reads of files go to threads that do without Python (memory/compiled), where they were built. All else, copies
between memories, checksums, reads that may be done from several files, and reads that failed, is done by Python's.
"""

from __future__ import annotations

import itertools
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from tierlm.memory import compiled
from tierlm.memory.compiled import Reads
from tierlm.timeline import Timeline

MERGE_WINDOW = 64  # jobs of the queue that are looked at for neighbours
INTERRUPTIBLE = 0.1  # seconds of waiting after which Python looks whether it has been interrupted
DISK = "disk->ram"


class Priority(IntEnum):
    """What a transfer is for: the layer that runs now waits for it, a predictor asked for it, or a free slot did."""

    DEMAND = 0
    SPECULATIVE = 1
    BACKGROUND = 2


@dataclass(slots=True, eq=False)
class Job:
    """One piece of a transfer: ``run`` moves ``nbytes`` over ``link`` ("disk->ram", ...) and raises if it cannot.

    ``stalled`` makes the error that says which read it is that does not come back. ``what`` names it in a timeline.
    """

    link: str
    nbytes: int
    run: Callable[[], None]
    stalled: Callable[[str], Exception]
    what: str = ""

    def follows(self, jobs: Sequence[Job]) -> bool:
        """Whether this job, behind ``jobs`` of the same link, can be done with them in one go."""
        return False

    def run_with(self, others: Sequence[Job]) -> None:
        """Do this job and ``others``, each of which follows those before it. After an error each is run alone."""
        raise NotImplementedError


@dataclass(slots=True, eq=False)
class PlainRead:
    """A transfer that is nothing but reads of files into one slot of the host's memory.

    ``requests``: as ``compiled.Reads.submit`` has them, to the address ``base``. ``jobs``: makes jobs that do the same;
    asked where a read fails or stalls, since they know what to say. ``what`` names the transfer in a timeline.
    """

    requests: array[int]
    base: int
    jobs: Callable[[], Sequence[Job]]
    what: str


@dataclass(slots=True, eq=False)
class Ticket:
    """A transfer under way. ``done`` once every job of it has ended; then ``error`` says whether one failed.

    ``last``: a job that is to begin, ahead of all others, once the rest are through without error.
    """

    jobs: Sequence[Job]
    priority: Priority
    after: Ticket | None = None
    last: Job | None = None
    pending: int = 0
    begun: bool = False  # some thread has taken up a job
    done: bool = False
    cancelled: bool = False
    error: BaseException | None = None
    unfinished: set[int] = field(default_factory=set)
    dependents: list[Ticket] = field(default_factory=list)
    number: int = 0  # of the ticket among the compiled reads, as long as it is theirs
    read: PlainRead | None = None


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
        self._queues: dict[Priority, deque[tuple[Ticket, int]]] = {priority: deque() for priority in Priority}
        self._spare = min(threads, max(2, threads // 4))  # threads that may still turn to anything but demands
        self._closed = False
        self.links: dict[str, LinkStats] = {}
        self.reads: Reads | None = None  # where they were built
        if compiled.load() is not None:
            self.reads = Reads(threads, self._spare, merged_bytes, self.collect)
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
                queue = self._queues[link.priority]
                moved = [item for item in queue if item[0] is link]
                for item in moved:
                    queue.remove(item)
                link.priority = Priority.DEMAND
                self._queues[Priority.DEMAND].extend(moved)
                self._work.notify(len(moved))  # a background job may have had no thread
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
            queue = self._queues[ticket.priority]
            for item in [item for item in queue if item[0] is ticket]:
                queue.remove(item)
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
            if (left := deadline - time.monotonic()) <= 0:
                break
            self._ended.wait(seen, min(left, INTERRUPTIBLE))
        ticket = tickets[0]
        while ticket.after is not None and not ticket.after.done:
            ticket = ticket.after
        raise self._stuck(ticket).stalled(f"stalled: nothing came for {timeout:g} s")

    def _stuck(self, ticket: Ticket) -> Job:
        """The first job of ``ticket`` that has not ended."""
        with self._lock:
            if ticket.number and ticket.read is not None and self.reads is not None:
                return ticket.read.jobs()[self.reads.unfinished(ticket.number)]
            return ticket.jobs[min(ticket.unfinished, default=-1)]

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
            return waiting + sum(ticket.jobs[index].nbytes for ticket, index in self._queues[Priority.DEMAND])

    def close(self, timeout: float = 5.0) -> bool:
        """Stop the threads after the jobs that they are in. False if one of them is stuck in a read."""
        with self._lock:
            self._closed = True
            for queue in self._queues.values():
                queue.clear()
            self._work.notify_all()
        deadline = time.monotonic() + timeout
        idle = self.reads is None or self.reads.close(timeout)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return idle and not any(thread.is_alive() for thread in self._threads)

    def _enqueue(self, ticket: Ticket, first: bool) -> None:
        queue = self._queues[ticket.priority]
        items = [(ticket, i) for i in range(len(ticket.jobs))]
        if first:
            queue.extendleft(reversed(items))
        else:
            queue.extend(items)
        self._work.notify(len(items))

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
        spans = zip(times[::3], times[1::3], times[2::3], read.requests[3::5], strict=False)  # no more are timed
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
        self._queues[ticket.priority].appendleft((ticket, index))
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

    def _next(self) -> deque[tuple[Ticket, int]] | None:
        """The queue whose turn it is."""
        for priority, queue in self._queues.items():
            if queue and (priority is Priority.DEMAND or self._spare):
                return queue
        return None

    def _run(self) -> None:
        while True:
            with self._work:
                while (queue := self._next()) is None and not self._closed:
                    self._work.wait()
                if self._closed or queue is None:
                    return
                items = self._take(queue)
                jobs = [ticket.jobs[index] for ticket, index in items]
                priority, skip = items[0][0].priority, items[0][0].error is not None
                spare = priority is not Priority.DEMAND
                self._spare -= spare
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
                if spare:
                    self._spare += 1
                    self._work.notify()
                for (ticket, index), job, error in zip(items, jobs, errors, strict=True):
                    if error is None and not skip:
                        link.bytes += job.nbytes
                    ticket.error = ticket.error or error
                    ticket.unfinished.discard(index)
                    ticket.pending -= 1
                    if not ticket.pending:
                        self._conclude(ticket)

    def _take(self, queue: deque[tuple[Ticket, int]]) -> list[tuple[Ticket, int]]:
        """Off the queue: its first job, and those near it that can be done with it in one go. No more than a thread's
        share: small jobs side by side are better done by the threads that have nothing to do."""
        items = [queue.popleft()]
        share = 1 + len(queue) // len(self._threads)
        if share > 1 and items[0][0].error is None:
            jobs = [items[0][0].jobs[items[0][1]]]
            for ticket, index in itertools.islice(queue, MERGE_WINDOW):
                if len(items) < share and ticket.error is None and ticket.jobs[index].follows(jobs):
                    items.append((ticket, index))
                    jobs.append(ticket.jobs[index])
            for item in items[1:]:
                queue.remove(item)
        for ticket, _ in items:
            ticket.begun = True
        return items


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
