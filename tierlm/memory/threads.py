"""The executor for any job: Python threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from tierlm.host import cannot_start
from tierlm.memory.executor import Executor, LinkStats
from tierlm.memory.ticket import Job, State, Ticket
from tierlm.policies.residency import Purpose
from tierlm.timeline import Timeline

LEAVE = 5.0  # seconds that threads get to end
Item = tuple[Ticket, int, Job]  # the job and its index in its ticket


class Threads(Executor):
    """``count`` threads, at most ``spare`` of them on prefetch and warm-up. ``announce``: called after each ticket.
    Raises TierlmError if the system refuses a thread."""

    def __init__(self, count: int, spare: int, announce: Callable[[], None], timeline: Timeline | None = None):
        self._spare, self._announce, self._timeline = spare, announce, timeline
        self._lock = threading.Lock()
        self._work, self._changed = threading.Condition(self._lock), threading.Condition(self._lock)
        self._waiting: dict[Purpose, deque[Item]] = {purpose: deque() for purpose in Purpose}
        self._ended: deque[Ticket] = deque()
        self._links: dict[str, LinkStats] = {}
        self._count = 0
        self._closed = False
        names = [f"tierlm-transfer-{i}" for i in range(count)]
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            self._threads = [thread for thread in self._threads if thread.ident is not None]
            self.close(LEAVE)
            raise cannot_start(count, "transfers") from error

    def submit(self, ticket: Ticket, *, first: bool) -> None:
        jobs = range(len(ticket.jobs))
        ticket.unfinished = set(jobs)
        items = [(ticket, index, ticket.jobs[index]) for index in jobs]
        with self._lock:
            queue = self._waiting[ticket.purpose]
            queue.extendleft(reversed(items)) if first else queue.extend(items)
            self._work.notify(len(items))

    def announce(self, ticket: Ticket) -> None:
        """Nothing to do: every ended ticket is announced."""

    def promote(self, ticket: Ticket) -> None:
        with self._lock:
            moved = self._remove(ticket)
            self._waiting[Purpose.DEMAND].extend(moved)
            self._work.notify(len(moved))  # all threads for prefetch may be busy

    def cancel(self, ticket: Ticket) -> bool:
        with self._lock:
            if ticket.state is not State.WAITING:
                return False
            self._remove(ticket)
            return True

    def unfinished(self, ticket: Ticket) -> Job | None:
        with self._lock:
            return ticket.jobs[min(ticket.unfinished)] if ticket.unfinished else None

    def ended(self) -> Iterator[tuple[Ticket, bool]]:
        while self._ended:
            ticket = self._ended.popleft()
            yield ticket, ticket.error is None

    @property
    def count(self) -> int:
        return self._count

    def wait(self, seen: int, timeout: float) -> None:
        with self._lock:
            self._changed.wait_for(lambda: self._count != seen, timeout)

    def wake(self) -> None:
        with self._lock:
            self._count += 1
            self._changed.notify_all()

    def links(self) -> dict[str, LinkStats]:
        now = time.perf_counter()
        with self._lock:
            return {
                name: LinkStats(link.bytes, link.seconds + (now - link.since if link.active else 0.0), link.cpu)
                for name, link in self._links.items()
            }

    def backlog(self) -> int:
        with self._lock:
            return sum(job.nbytes for _, _, job in self._waiting[Purpose.DEMAND])

    def close(self, timeout: float) -> bool:
        with self._lock:
            self._closed = True
            for queue in self._waiting.values():
                queue.clear()
            self._work.notify_all()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _remove(self, ticket: Ticket) -> list[Item]:
        """Remove the queued jobs of ``ticket``."""
        found = []
        for purpose, queue in self._waiting.items():
            if own := [item for item in queue if item[0] is ticket]:
                found += own
                self._waiting[purpose] = deque(item for item in queue if item[0] is not ticket)
        return found

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            self._perform(*taken)
            taken = None  # drop the references while waiting

    def _take(self) -> tuple[bool, Item] | None:
        """Wait for the next job. Returns whether it takes a spare thread, and the job; None once closed."""
        with self._lock:
            while not self._closed:
                for purpose, queue in self._waiting.items():
                    spare = purpose is not Purpose.DEMAND
                    if queue and (self._spare or not spare):
                        self._spare -= spare
                        ticket, _, job = item = queue.popleft()
                        ticket.state = State.BEGUN
                        link = self._links.setdefault(job.link, LinkStats())
                        if not link.active:
                            link.since = time.perf_counter()
                        link.active += 1
                        return spare, item
                self._work.wait()
            return None

    def _perform(self, spare: bool, item: Item) -> None:
        ticket, index, job = item
        began, cpu = time.perf_counter(), time.thread_time()
        error = ticket.error
        if error is None:
            try:
                job.run()
            except BaseException as failure:  # the thread survives; the waiter gets the error
                error = failure
        ended, cpu = time.perf_counter(), time.thread_time() - cpu
        if self._timeline is not None:
            purpose = ticket.purpose.name.lower()
            self._timeline.add(job.link, job.what, began, ended, bytes=job.nbytes, priority=purpose)
        with self._lock:
            link = self._links[job.link]
            link.active -= 1
            link.cpu += cpu
            if not link.active:
                link.seconds += ended - link.since
            if error is None:
                link.bytes += job.nbytes
            ticket.error = ticket.error or error
            if spare:
                self._spare += 1
                self._work.notify()
            assert ticket.unfinished is not None
            ticket.unfinished.discard(index)
            if ticket.unfinished:
                return
            self._ended.append(ticket)
            self._count += 1
            self._changed.notify_all()
        self._announce()
