"""Who performs the jobs of tickets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from tierlm.memory.ticket import Job, Ticket


@dataclass
class LinkStats:
    """``seconds``: during which at least one job was under way on this link; ``cpu``: processor time of the threads."""

    bytes: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    active: int = 0
    since: float = 0.0


class Executor(ABC):
    """Threads that take jobs off queues: demands first, then prefetch, then warm-up.

    ``Transfer`` is the only caller. It calls ``submit``, ``announce``, ``promote``, ``cancel``, ``unfinished`` and
    ``ended`` under its lock; they return at once, and raise nothing. An executor has a lock of its own, and calls
    nobody while it holds it.
    """

    @abstractmethod
    def submit(self, ticket: Ticket, *, first: bool) -> None:
        """Queue the jobs of ``ticket`` by its priority, in order, ``first`` or last. Dropped once closed."""

    @abstractmethod
    def announce(self, ticket: Ticket) -> None:
        """Call back when ``ticket`` has ended, so that what waits for it begins although nobody asks."""

    @abstractmethod
    def promote(self, ticket: Ticket) -> None:
        """Make the jobs of ``ticket`` that have not begun demands, behind the others. The caller sets the priority."""

    @abstractmethod
    def cancel(self, ticket: Ticket) -> bool:
        """Drop the jobs of ``ticket``. False, and nothing happens, if one has begun."""

    @abstractmethod
    def unfinished(self, ticket: Ticket) -> Job | None:
        """The first job of ``ticket`` that has not ended; None if all have."""

    @abstractmethod
    def ended(self) -> Iterator[tuple[Ticket, bool]]:
        """The tickets whose jobs have all ended since the last call, and whether all is well. If it is not, and
        ``ticket.error`` is not set, another executor is to find out why."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many tickets have ended, and calls of ``wake``: changes when there is something to look at."""

    @abstractmethod
    def wait(self, seen: int, timeout: float) -> None:
        """Return once ``count`` is not ``seen``, or after ``timeout`` seconds."""

    @abstractmethod
    def wake(self) -> None:
        """Count one more thing that has ended: end all waits."""

    @abstractmethod
    def links(self) -> dict[str, LinkStats]:
        """Per link, what has been done so far."""

    @abstractmethod
    def backlog(self) -> int:
        """Bytes of demands that no thread has taken up."""

    @abstractmethod
    def close(self, timeout: float) -> bool:
        """Stop the threads after the jobs that they are in; drop the rest. False if a thread is stuck in one after
        ``timeout`` seconds. May be called again."""
