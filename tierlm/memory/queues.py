"""Jobs that wait for a thread."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable

from tierlm.memory.ticket import Priority, Ticket

MERGE_WINDOW = 64  # jobs of a queue that are looked at for neighbours

Item = tuple[Ticket, int]  # a job, by its place among those of its ticket


class Queues:
    """One for each priority, for ``threads`` threads. ``spare``: those that may still turn to anything but demands;
    whoever has done such a job gives its place back. To be used under a lock."""

    def __init__(self, threads: int, spare: int):
        self.threads, self.spare = threads, spare
        self._waiting: dict[Priority, deque[Item]] = {priority: deque() for priority in Priority}

    def put(self, ticket: Ticket, jobs: Iterable[int], first: bool) -> None:
        """Queue some jobs of ``ticket``, in order, ``first`` or last."""
        items = [(ticket, index) for index in jobs]
        if first:
            self._waiting[ticket.priority].extendleft(reversed(items))
        else:
            self._waiting[ticket.priority].extend(items)

    def remove(self, ticket: Ticket) -> list[Item]:
        """Take the jobs of ``ticket`` off, and return them."""
        queue = self._waiting[ticket.priority]
        found = [item for item in queue if item[0] is ticket]
        for item in found:
            queue.remove(item)
        return found

    def promote(self, ticket: Ticket) -> int:
        """Make ``ticket`` a demand, the last one so far. Returns how many of its jobs are waiting."""
        moved = self.remove(ticket)
        ticket.priority = Priority.DEMAND
        self._waiting[Priority.DEMAND].extend(moved)
        return len(moved)

    def backlog(self) -> int:
        """Bytes of demands."""
        return sum(ticket.jobs[index].nbytes for ticket, index in self._waiting[Priority.DEMAND])

    def clear(self) -> None:
        for queue in self._waiting.values():
            queue.clear()

    def take(self) -> list[Item]:
        """Off the queue whose turn it is, its first job, and those near it that can be done with it in one go; nothing
        if there is nothing to do. No more than a thread's share: small jobs side by side are better done by threads
        that have nothing to do."""
        for priority, queue in self._waiting.items():
            if queue and (priority is Priority.DEMAND or self.spare):
                self.spare -= priority is not Priority.DEMAND
                return self._together(queue)
        return []

    def _together(self, queue: deque[Item]) -> list[Item]:
        items = [queue.popleft()]
        share = 1 + len(queue) // self.threads
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
