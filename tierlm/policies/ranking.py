"""Keys in the order of a rank: a heap that is cleaned lazily."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from tierlm.spec import Key

R = TypeVar("R", bound=Any)  # a number, or a tuple of numbers


class Ranking(Generic[R]):
    """Keys and their ranks; iterates from the smallest. A change is O(log n), a look at the first O(1), amortised."""

    def __init__(self) -> None:
        self.ranks: dict[Key, R] = {}  # to be changed through `place` and `remove` only
        self._heap: list[tuple[R, Key]] = []  # holds stale entries too: those whose rank is not the key's

    def place(self, key: Key, rank: R) -> None:
        """Give ``key``, new or not, its rank."""
        self.ranks[key] = rank
        heapq.heappush(self._heap, (rank, key))
        if len(self._heap) > 4 * len(self.ranks) + 64:
            self._heap = [(rank, key) for key, rank in self.ranks.items()]
            heapq.heapify(self._heap)

    def remove(self, key: Key) -> R:
        return self.ranks.pop(key)

    def __iter__(self) -> Iterator[Key]:
        passed: list[tuple[R, Key]] = []
        try:
            while self._heap:
                rank, key = self._heap[0]
                if self.ranks.get(key) == rank:
                    yield key
                    passed.append((rank, key))
                heapq.heappop(self._heap)
        finally:
            for item in passed:
                heapq.heappush(self._heap, item)
