"""Keys ordered by rank, in a heap cleaned lazily; and the base of the policies that use it."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count
from typing import Any, Generic, TypeVar

from tierlm.policies.eviction import Policy, TierInfo
from tierlm.spec import Key

R = TypeVar("R", bound=Any)  # a number, or a tuple of numbers


class Ranking(Generic[R]):
    """Keys and their ranks; iterates from the smallest. A change is O(log n), the first key O(1), amortised."""

    def __init__(self) -> None:
        self.ranks: dict[Key, R] = {}  # changed by `place` and `remove` only
        self._heap: list[tuple[R, Key]] = []  # with stale entries: an older rank of a key

    def place(self, key: Key, rank: R) -> None:
        """Set the rank of ``key``, new or known."""
        self.ranks[key] = rank
        heapq.heappush(self._heap, (rank, key))
        if len(self._heap) > 4 * len(self.ranks) + 64:
            self._heap = [(rank, key) for key, rank in self.ranks.items()]
            heapq.heapify(self._heap)

    def remove(self, key: Key) -> R:
        return self.ranks.pop(key)

    def __iter__(self) -> Iterator[Key]:
        yielded: list[tuple[R, Key]] = []
        try:
            while self._heap:
                rank, key = self._heap[0]
                if self.ranks.get(key) == rank:
                    yield key
                    yielded.append((rank, key))
                heapq.heappop(self._heap)
        finally:
            for item in yielded:
                heapq.heappush(self._heap, item)


class Ranked(Policy, Generic[R]):
    """A policy that evicts the key of the smallest rank."""

    def __init__(self, info: TierInfo):
        super().__init__(info)
        self._ranking = Ranking[R]()
        self._clock = count()

    def on_evict(self, key: Key) -> None:
        self._ranking.remove(key)

    def victims(self, incoming: Key | None = None) -> Iterator[Key]:
        return iter(self._ranking)
