"""Policies by frequency of use: lfu, lfu with ageing, gdsf, lru-k."""

from __future__ import annotations

import math
from collections import deque
from typing import ClassVar

from tierlm.policies.eviction import Bounds, TierInfo
from tierlm.policies.ranking import Ranked
from tierlm.spec import Key


class Lfu(Ranked[tuple[int, int]]):
    """Least frequently used while resident; ties go to the least recently used. Rank: uses, time of the last."""

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._ranking.place(key, (1 if demanded else 0, next(self._clock)))

    def on_hit(self, key: Key) -> None:
        self._ranking.place(key, (self._ranking.ranks[key][0] + 1, next(self._clock)))


class Gdsf(Ranked[tuple[float, int]]):
    """Greedy-Dual-Size-Frequency (Cherkasova, HPL-98-69, 1998): uses x size ** ``power`` + the rank of the last victim,
    so that former popularity ages. Rank: that value, time of the last use.

    A cache of bytes uses ``power`` -1: small records stay. In a tier every record takes one slot and a miss costs its
    bytes, so the default is 1. Sizes are relative to the mean size seen.
    """

    tunable: ClassVar[Bounds] = {"power": (-1.0, 1.0)}

    def __init__(self, info: TierInfo, *, power: float = 1.0):
        super().__init__(info)
        self.power = power
        self._uses: dict[Key, int] = {}
        self._age = 0.0
        self._sizes = [0, 0]  # sum, count

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._sizes = [self._sizes[0] + self.info.size_of(key), self._sizes[1] + 1]
        self._uses[key] = 0
        self._use(key, 1 if demanded else 0)

    def on_hit(self, key: Key) -> None:
        self._use(key, 1)

    def on_evict(self, key: Key) -> None:
        del self._uses[key]
        self._age = max(self._age, self._ranking.remove(key)[0])

    def on_discard(self, key: Key) -> None:
        del self._uses[key]
        self._ranking.remove(key)

    def _use(self, key: Key, times: int) -> None:
        self._uses[key] += times
        self._ranking.place(key, (self._age + self._uses[key] * self._worth(key), next(self._clock)))

    def _worth(self, key: Key) -> float:
        total, seen = self._sizes
        return float((self.info.size_of(key) * seen / total) ** self.power)


class LfuAgeing(Gdsf):
    """LFU with dynamic ageing (Arlitt et al., "Evaluating content management techniques for Web proxy caches", 2000):
    uses + the rank of the last victim."""

    tunable: ClassVar[Bounds] = {}

    def __init__(self, info: TierInfo):
        super().__init__(info, power=0.0)

    def _worth(self, key: Key) -> float:
        return 1.0


class LruK(Ranked[tuple[float, int]]):
    """LRU-K (O'Neil, O'Neil and Weikum, SIGMOD 1993): the victim is the record whose ``k``-th last use is oldest;
    records with fewer uses leave first, least recently used first. Uses of absent records are kept: a model has few
    records. Rank: times of the ``k``-th last use and of the last."""

    tunable: ClassVar[Bounds] = {"k": (1, 8)}

    def __init__(self, info: TierInfo, *, k: int = 2):
        super().__init__(info)
        self.k = k
        self._uses: dict[Key, deque[int]] = {}  # times of the last k

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._uses.setdefault(key, deque(maxlen=self.k))
        self._note(key, demanded)

    def on_hit(self, key: Key) -> None:
        self._note(key, demanded=True)

    def _note(self, key: Key, demanded: bool) -> None:
        now, uses = next(self._clock), self._uses[key]
        if demanded:
            uses.append(now)
        self._ranking.place(key, (uses[0] if len(uses) == self.k else -math.inf, now))
