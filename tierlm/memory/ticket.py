"""Transfer requests: jobs, their purpose, and the ticket that tracks them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from tierlm.policies.residency import Purpose

DISK = "disk->ram"  # the link of all file reads


class State(Enum):
    """The state of a ticket. The last three are final."""

    WAITING = "waiting"  # for its predecessor or a thread
    BEGUN = "begun"  # the executor may know before the ticket does
    ARRIVED = "arrived"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class Job(ABC):
    """Work for one thread: move ``nbytes`` over ``link`` ("disk->ram", ...). ``what`` names it in a timeline."""

    link: str
    nbytes: int
    what: str

    @abstractmethod
    def run(self) -> None:
        """Run in an executor's thread. An exception becomes the ticket's error."""

    @abstractmethod
    def stalled(self, why: str) -> Exception:
        """The error to raise when this job does not return."""


class Jobs(Protocol):
    """A sequence of jobs, which may be made on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Job: ...


@dataclass(slots=True, eq=False)
class Ticket:
    """A transfer in progress. Only ``Transfer`` and executors change it.

    ``jobs``: for ``executor``; they run concurrently, in any order. ``after``: the ticket that must arrive first.
    ``last``: a job that jumps the queue once all ``jobs`` have succeeded. ``error``: the first error; it may be set
    before the ticket is done, while other jobs still run.
    """

    jobs: Jobs
    purpose: Purpose
    after: Ticket | None = None
    last: Job | None = None
    state: State = State.WAITING
    error: BaseException | None = None
    executor: int | None = None  # index in ``Transfer``; None while ``after`` is not done, and once done
    dependents: list[Ticket] = field(default_factory=list)
    number: int = 0  # its id in memory/compiled
    unfinished: set[int] | None = None  # in memory/threads: indices into ``jobs``

    @property
    def done(self) -> bool:
        """Whether the ticket has arrived, failed or been cancelled."""
        return self.state is not State.WAITING and self.state is not State.BEGUN

    @property
    def cancelled(self) -> bool:
        return self.state is State.CANCELLED
