"""What is asked of a transfer: jobs, how urgent they are, and the ticket that says how far they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Protocol

DISK = "disk->ram"  # the link of everything that is read from files


class Priority(IntEnum):
    """What a transfer is for: the layer that runs now waits for it, a predictor asked for it, or a free slot did."""

    DEMAND = 0
    PREFETCH = 1
    WARM_UP = 2


class State(Enum):
    """How far a ticket is. A ticket stays in the last three."""

    WAITING = "waiting"  # for the ticket before it, or for a thread
    BEGUN = "begun"  # its executor may know this before the ticket does
    ARRIVED = "arrived"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class Job(ABC):
    """Work for one thread: moves ``nbytes`` over ``link`` ("disk->ram", ...). ``what`` names it in a timeline."""

    link: str
    nbytes: int
    what: str

    @abstractmethod
    def run(self) -> None:
        """Do it, in a thread of an executor. Any exception is the ticket's error."""

    @abstractmethod
    def stalled(self, why: str) -> Exception:
        """The error that names this job as the one that does not come back."""


class Jobs(Protocol):
    """Some jobs, each made when it is asked for, or at hand."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Job: ...


@dataclass(slots=True, eq=False)
class Ticket:
    """A transfer under way. Only ``Transfer`` and executors change it.

    ``jobs``: what ``executor`` has, or is to get; they run in any order and side by side. ``after``: the ticket that
    must arrive first. ``last``: a job that begins, ahead of all others, once ``jobs`` are through without error.
    ``error``: the first one; it may be set before the ticket is done, while other jobs are still under way.
    """

    jobs: Jobs
    priority: Priority
    after: Ticket | None = None
    last: Job | None = None
    state: State = State.WAITING
    error: BaseException | None = None
    executor: int | None = None  # by its index in ``Transfer``; none while it waits for ``after``, and once it is done
    dependents: list[Ticket] = field(default_factory=list)
    number: int = 0  # its name in memory/compiled
    unfinished: set[int] | None = None  # in memory/threads: places in ``jobs``

    @property
    def done(self) -> bool:
        """Whether nothing of it is left to do, for whatever reason."""
        return self.state is not State.WAITING and self.state is not State.BEGUN

    @property
    def cancelled(self) -> bool:
        return self.state is State.CANCELLED
