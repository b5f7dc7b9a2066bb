"""What is asked of a transfer: jobs, how urgent they are, and the ticket that says how far they are."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

DISK = "disk->ram"  # the link of all that is read from files


class Priority(IntEnum):
    """What a transfer is for: the layer that runs now waits for it, a predictor asked for it, or a free slot did."""

    DEMAND = 0
    PREFETCH = 1
    WARM_UP = 2


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
