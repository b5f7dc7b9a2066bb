"""The interface of executors: threads that run the jobs of tickets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from tierlm.memory.slots import Slot
from tierlm.memory.ticket import Job, Ticket


@dataclass
class LinkStats:
    """``seconds``: time with at least one job in progress on the link; ``cpu``: CPU seconds of its threads."""

    bytes: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    active: int = 0
    since: float = 0.0


class Executor(ABC):
    """Threads that take jobs from queues: demands first, then prefetch, then warm-up.

    ``Transfer`` is the only caller. It calls ``submit``, ``announce``, ``promote``, ``cancel``, ``unfinished`` and
    ``ended`` under its lock; they return at once and never raise. An executor has its own lock and makes no outside
    call while it holds it.
    """

    @abstractmethod
    def submit(self, ticket: Ticket, *, first: bool) -> None:
        """Queue the jobs of ``ticket`` in order, at the front (``first``) or back of its queue. No-op once closed."""

    def populate(self, slot: Slot) -> None:
        """Commit the pages of ``slot`` ahead of need, where processors idle. Its bytes do not change. A hint."""

    def leave(self, slot: Slot) -> None:
        """Stop to populate ``slot``."""

    @abstractmethod
    def announce(self, ticket: Ticket) -> None:
        """Call back when ``ticket`` ends, so that its dependents start without a poll."""

    @abstractmethod
    def promote(self, ticket: Ticket) -> None:
        """Move the queued jobs of ``ticket`` to the back of the demand queue. The caller sets the purpose."""

    @abstractmethod
    def cancel(self, ticket: Ticket) -> bool:
        """Drop the jobs of ``ticket``. Returns False and does nothing if one has begun."""

    @abstractmethod
    def unfinished(self, ticket: Ticket) -> Job | None:
        """The first unfinished job of ``ticket``, or None."""

    @abstractmethod
    def ended(self) -> Iterator[tuple[Ticket, bool]]:
        """Tickets whose jobs have all ended since the last call, and whether all succeeded. If one failed without
        setting ``ticket.error``, another executor must run it again to find the cause."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Ended tickets plus calls of ``wake``: changes when there is something to collect."""

    @abstractmethod
    def wait(self, seen: int, timeout: float) -> None:
        """Return once ``count`` differs from ``seen``, or after ``timeout`` seconds."""

    @abstractmethod
    def wake(self) -> None:
        """Add one to ``count`` and end all waits."""

    @abstractmethod
    def links(self) -> dict[str, LinkStats]:
        """Totals so far, by link."""

    @abstractmethod
    def backlog(self) -> int:
        """Bytes of queued demands that no thread has taken."""

    @abstractmethod
    def close(self, timeout: float) -> bool:
        """Let the threads finish their current jobs; drop the rest. False if a thread is still stuck after
        ``timeout`` seconds. May be called again."""
