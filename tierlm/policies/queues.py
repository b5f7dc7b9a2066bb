"""Policies of several queues, with ghosts (evicted keys): 2q, s3-fifo, arc."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import ClassVar

from tierlm.policies.eviction import Bounds, Policy, TierInfo
from tierlm.policies.recency import Ring
from tierlm.spec import Key

Queue = OrderedDict[Key, None]


class TwoQ(Policy):
    """2Q (Johnson and Shasha, VLDB 1994): new keys enter a queue with a ``share`` of the slots. A key that returns
    while it is among the last ``ghosts`` x capacity evicted from that queue enters the main part, which is lru."""

    tunable: ClassVar[Bounds] = {"share": (0.05, 0.75), "ghosts": (0.25, 4.0)}

    def __init__(self, info: TierInfo, *, share: float = 0.25, ghosts: float = 0.5):
        super().__init__(info)
        self.limit, self.ghost_limit = int(info.capacity * share), int(info.capacity * ghosts)
        self._new, self._main, self._ghosts = Queue(), Queue(), Queue()

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        again = key in self._ghosts
        self._ghosts.pop(key, None)
        (self._main if again and demanded else self._new)[key] = None
        _trim(self._ghosts, self.ghost_limit)

    def on_hit(self, key: Key) -> None:
        if key in self._main:
            self._main.move_to_end(key)

    def on_evict(self, key: Key) -> None:
        if key in self._new:
            self._ghosts[key] = None
        self.on_discard(key)

    def on_discard(self, key: Key) -> None:
        del (self._new if key in self._new else self._main)[key]

    def victims(self, incoming: Key | None = None) -> Iterator[Key]:
        first, second = (self._new, self._main) if len(self._new) > self.limit else (self._main, self._new)
        yield from first
        yield from second


class S3Fifo(Policy):
    """S3-FIFO (Yang et al., SOSP 2023): new keys enter a small queue with a ``share`` of the slots. At its head, keys
    with at least ``uses`` move to the main queue, a clock with three lives; the others leave. A key that returns while
    it is among the last ``ghosts`` x capacity evicted from the small queue enters the main queue.

    As in libCacheSim, new keys also enter the main queue if the small one is full before the first eviction.
    """

    tunable: ClassVar[Bounds] = {"share": (0.02, 0.5), "ghosts": (0.25, 4.0), "uses": (1, 4)}
    LIVES = 3

    def __init__(self, info: TierInfo, *, share: float = 0.1, ghosts: float = 0.9, uses: int = 2):
        super().__init__(info)
        self.limit, self.ghost_limit = int(info.capacity * share), int(info.capacity * ghosts)
        self.uses = uses
        self._small: OrderedDict[Key, int] = OrderedDict()  # uses since the insertion
        self._main = Ring(self.LIVES)
        self._ghosts = Queue()
        self._full = False  # a key has been evicted
        self._offered: Key | None = None

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        again = key in self._ghosts
        self._ghosts.pop(key, None)
        early = not self._full and len(self._small) >= self.limit
        (self._main.lives if (again and demanded) or early else self._small)[key] = 0
        _trim(self._ghosts, self.ghost_limit)

    def on_hit(self, key: Key) -> None:
        if key in self._small:
            self._small[key] += 1
        else:
            self._main.spare(key)

    def on_evict(self, key: Key) -> None:
        self._full = True
        if key == self._offered:
            self._turn(key)
        else:
            self.on_discard(key)

    def on_discard(self, key: Key) -> None:
        del (self._small if key in self._small else self._main.lives)[key]

    def victims(self, incoming: Key | None = None) -> Iterator[Key]:
        for key in self._order():
            self._offered = key
            yield key

    def _order(self) -> Iterator[Key]:
        crowded = self._crowded()
        if not crowded:
            yield from (key for key, uses in self._small.items() if uses < self.uses)
        yield from self._main
        yield from (key for key, uses in self._small.items() if crowded or uses >= self.uses)

    def _crowded(self) -> bool:
        """Whether the main queue exceeds its share."""
        return len(self._main.lives) > self.info.capacity - self.limit

    def _turn(self, key: Key) -> None:
        """Remove ``key``, and move the used keys before it in the small queue to the main one."""
        if not self._crowded():
            for other in list(self._small):
                if other == key:
                    break
                if self._small[other] >= self.uses:
                    del self._small[other]
                    self._main.lives[other] = 0
        if key in self._small:
            del self._small[key]
            self._ghosts[key] = None
        else:
            self._main.turn(key)


class Arc(Policy):
    """ARC (Megiddo and Modha, FAST 2003): one lru of keys used once, one of keys used again, and as many ghosts as
    slots. A returning ghost moves the target size of the first lru towards the size that would have kept it."""

    def __init__(self, info: TierInfo):
        super().__init__(info)
        self._once, self._again = Queue(), Queue()
        self._once_ghosts, self._again_ghosts = Queue(), Queue()
        self._counts = (0, 0)  # of ghosts, before the eviction for the incoming record
        self._target = 0.0  # slots for keys used once

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._target = self._adapted(key if demanded else None)
        again = demanded and (key in self._once_ghosts or key in self._again_ghosts)
        self._once_ghosts.pop(key, None)
        self._again_ghosts.pop(key, None)
        (self._again if again else self._once)[key] = None
        capacity = self.info.capacity
        _trim(self._once_ghosts, capacity - len(self._once))
        _trim(self._again_ghosts, 2 * capacity - len(self._once) - len(self._again) - len(self._once_ghosts))
        self._counts = (len(self._once_ghosts), len(self._again_ghosts))

    def on_hit(self, key: Key) -> None:
        self._once.pop(key, None)
        self._again[key] = None
        self._again.move_to_end(key)

    def on_evict(self, key: Key) -> None:
        (self._once_ghosts if key in self._once else self._again_ghosts)[key] = None
        self.on_discard(key)

    def on_discard(self, key: Key) -> None:
        del (self._once if key in self._once else self._again)[key]

    def victims(self, incoming: Key | None = None) -> Iterator[Key]:
        target, once = self._adapted(incoming), len(self._once)
        full = once >= self.info.capacity  # then its oldest leaves, whatever the target
        if once > target or (once == target and incoming in self._again_ghosts) or full:
            yield from self._once
            yield from self._again
        else:
            yield from self._again
            yield from self._once

    def _adapted(self, incoming: Key | None) -> float:
        """The target after ``incoming`` is inserted."""
        once, again = self._counts
        if incoming in self._once_ghosts:
            return min(self._target + max(again / max(once, 1), 1.0), float(self.info.capacity))
        if incoming in self._again_ghosts:
            return max(self._target - max(once / max(again, 1), 1.0), 0.0)
        return self._target


def _trim(ghosts: Queue, limit: int) -> None:
    """Forget the oldest of ``ghosts`` beyond ``limit``."""
    while len(ghosts) > max(0, limit):
        ghosts.popitem(last=False)
