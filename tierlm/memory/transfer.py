"""Threads that move bytes. The only file with threads; the queue has a demand side, which goes first, and a
speculative side."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of a transfer: ``run`` moves ``nbytes`` over ``link`` ("disk->ram", ...) and raises if it cannot.

    ``stalled`` makes the error that says which read it is that does not come back.
    """

    link: str
    nbytes: int
    run: Callable[[], None]
    stalled: Callable[[str], Exception]


@dataclass(slots=True, eq=False)
class Ticket:
    """A transfer under way. ``done`` once every job of it has ended; then ``error`` says whether one failed."""

    jobs: Sequence[Job]
    speculative: bool
    after: Ticket | None = None
    pending: int = 0
    queued: int = 0  # jobs that no thread has taken up yet
    done: bool = False
    cancelled: bool = False
    error: BaseException | None = None
    unfinished: set[int] = field(default_factory=set)
    dependents: list[Ticket] = field(default_factory=list)


@dataclass
class LinkStats:
    """``seconds``: during which at least one job was under way on this link."""

    bytes: int = 0
    seconds: float = 0.0
    active: int = 0
    since: float = 0.0


class Transfer:
    """A pool of threads over one queue. All methods may be called from any thread."""

    def __init__(self, threads: int):
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._finished = threading.Condition(self._lock)
        self._demand: deque[tuple[Ticket, int]] = deque()
        self._speculative: deque[tuple[Ticket, int]] = deque()
        self._closed = False
        self.links: dict[str, LinkStats] = {}
        self._threads = [
            threading.Thread(target=self._run, name=f"tierlm-transfer-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, jobs: Sequence[Job], *, speculative: bool = False, after: Ticket | None = None) -> Ticket:
        """Queue jobs; they start once ``after`` is done, and fail with it. Raises RuntimeError when closed."""
        ticket = Ticket(jobs, speculative, after, len(jobs), len(jobs), unfinished=set(range(len(jobs))))
        with self._lock:
            if self._closed:
                raise RuntimeError("transfer is closed")
            if after is not None and not after.done:
                after.dependents.append(ticket)
            elif after is not None and (after.error or after.cancelled):
                ticket.cancelled = after.cancelled
                self._finish(ticket, after.error)
            else:
                self._enqueue(ticket, first=after is not None)
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """Make a speculative ticket, and what it waits for, a demand."""
        with self._lock:
            link: Ticket | None = ticket
            while link is not None and link.speculative:
                link.speculative = False
                moved = [item for item in self._speculative if item[0] is link]
                for item in moved:
                    self._speculative.remove(item)
                self._demand.extend(moved)
                link = link.after

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a ticket of which nothing has started. False if it is too late for that."""
        with self._lock:
            if ticket.done or ticket.queued < len(ticket.jobs):
                return False
            if ticket.after is not None and ticket in ticket.after.dependents:
                ticket.after.dependents.remove(ticket)
            for queue in (self._demand, self._speculative):
                for item in [item for item in queue if item[0] is ticket]:
                    queue.remove(item)
            ticket.cancelled = True
            self._finish(ticket, None)
            return True

    def wait_any(self, tickets: Sequence[Ticket], timeout: float) -> None:
        """Return once any of ``tickets`` is done. Raises the stalled read's error after ``timeout`` seconds without
        one."""
        with self._finished:
            if self._finished.wait_for(lambda: any(ticket.done for ticket in tickets), timeout):
                return
            ticket = tickets[0]
            while ticket.after is not None and not ticket.after.done:
                ticket = ticket.after
            job = ticket.jobs[min(ticket.unfinished)]
        raise job.stalled(f"stalled: nothing came for {timeout:g} s")

    def busy(self) -> dict[str, LinkStats]:
        """Per link: bytes moved and seconds busy so far."""
        now = time.perf_counter()
        with self._lock:
            return {
                name: LinkStats(link.bytes, link.seconds + (now - link.since if link.active else 0.0))
                for name, link in self.links.items()
            }

    def close(self, timeout: float = 5.0) -> bool:
        """Stop the threads after the jobs that they are in. False if one of them is stuck in a read."""
        with self._lock:
            self._closed = True
            self._demand.clear()
            self._speculative.clear()
            self._work.notify_all()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _enqueue(self, ticket: Ticket, first: bool) -> None:
        queue = self._speculative if ticket.speculative else self._demand
        items = [(ticket, i) for i in range(len(ticket.jobs))]
        if first:
            queue.extendleft(reversed(items))
        else:
            queue.extend(items)
        self._work.notify(len(items))

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
        self._finished.notify_all()

    def _run(self) -> None:
        while True:
            with self._work:
                while not (self._demand or self._speculative or self._closed):
                    self._work.wait()
                if self._closed:
                    return
                ticket, index = (self._demand or self._speculative).popleft()
                ticket.queued -= 1
                skip = ticket.error is not None
                job = ticket.jobs[index]
                link = self.links.setdefault(job.link, LinkStats())
                if not link.active:
                    link.since = time.perf_counter()
                link.active += 1
            error: BaseException | None = None
            if not skip:
                try:
                    job.run()
                except BaseException as caught:  # whatever it is, the thread lives on and the waiter gets it
                    error = caught
            with self._work:
                link.active -= 1
                if not link.active:
                    link.seconds += time.perf_counter() - link.since
                if error is None and not skip:
                    link.bytes += job.nbytes
                ticket.error = ticket.error or error
                ticket.unfinished.discard(index)
                ticket.pending -= 1
                if not ticket.pending:
                    self._finish(ticket, None)
