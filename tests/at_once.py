"""An executor without threads, for tests that must be deterministic."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from tierlm.memory.executor import Executor, LinkStats
from tierlm.memory.ticket import Job, Ticket


class AtOnce(Executor):
    """Performs all jobs in ``submit``: ``Transfer(1, executor=AtOnce())``. A ticket is done when the transfer next
    collects. A failing job fails its ticket."""

    def __init__(self) -> None:
        self._count, self._ended, self._links = 0, deque[Ticket](), dict[str, LinkStats]()

    def submit(self, ticket: Ticket, *, first: bool) -> None:
        for index in range(len(ticket.jobs)):
            job = ticket.jobs[index]
            try:
                job.run()
                self._links.setdefault(job.link, LinkStats()).bytes += job.nbytes
            except Exception as error:
                ticket.error = error
                break
        self._ended.append(ticket)
        self.wake()

    def ended(self) -> Iterator[tuple[Ticket, bool]]:
        while self._ended:
            ticket = self._ended.popleft()
            yield ticket, ticket.error is None

    @property
    def count(self) -> int:
        return self._count

    def wake(self) -> None:
        self._count += 1

    def links(self) -> dict[str, LinkStats]:
        return {name: LinkStats(link.bytes) for name, link in self._links.items()}

    def announce(self, ticket: Ticket) -> None: ...

    def promote(self, ticket: Ticket) -> None: ...

    def cancel(self, ticket: Ticket) -> bool:
        return False

    def unfinished(self, ticket: Ticket) -> Job | None:
        return None

    def wait(self, seen: int, timeout: float) -> None: ...

    def backlog(self) -> int:
        return 0

    def close(self, timeout: float) -> bool:
        return True
