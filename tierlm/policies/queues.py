"""Policies of several queues, with ghosts (keys that have left): 2q, s3-fifo, arc."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import ClassVar

from tierlm.policies.eviction import Bounds, Policy, TierInfo
from tierlm.policies.recency import Ring
from tierlm.spec import Key

Queue = OrderedDict[Key, None]


class TwoQ(Policy):
    """2Q (Johnson and Shasha, VLDB 1994): newcomers wait in a queue of the ``share`` of the slots; one that comes again
    after it has left that queue, while it is among the last ``ghosts`` x capacity to do so, goes to the main part,
    which is lru."""

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
    """S3-FIFO (Yang et al., SOSP 2023): newcomers wait in a small queue of the ``share`` of the slots; at its head,
    those with ``uses`` or more go on to the main queue, a clock with three lives, and the others leave. One that comes
    again, while it is among the last ``ghosts`` x capacity to leave the small queue, goes to the main one at once.

    As in libCacheSim, newcomers that find the small queue full before anything has left go to the main queue.
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
        self._full = False  # something has left
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
        """Whether the main queue is beyond its share."""
        return len(self._main.lives) > self.info.capacity - self.limit

    def _turn(self, key: Key) -> None:
        """Move on to the main queue what was passed in the small one, and take ``key`` out."""
        if not self._crowded():
            for passed in list(self._small):
                if passed == key:
                    break
                if self._small[passed] >= self.uses:
                    del self._small[passed]
                    self._main.lives[passed] = 0
        if key in self._small:
            del self._small[key]
            self._ghosts[key] = None
        else:
            self._main.turn(key)


class Arc(Policy):
    """ARC (Megiddo and Modha, FAST 2003): lru of what was used once and of what was used again, with as many ghosts as
    slots; each return of a ghost moves the target size of the first towards the side that would have kept it."""

    def __init__(self, info: TierInfo):
        super().__init__(info)
        self._once, self._again = Queue(), Queue()
        self._once_ghosts, self._again_ghosts = Queue(), Queue()
        self._counts = (0, 0)  # of ghosts, before what leaves for the record that comes
        self._target = 0.0  # slots for what was used once

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
        full = once >= self.info.capacity  # then its oldest goes, whatever the target
        if once > target or (once == target and incoming in self._again_ghosts) or full:
            yield from self._once
            yield from self._again
        else:
            yield from self._again
            yield from self._once

    def _adapted(self, incoming: Key | None) -> float:
        """The target, once ``incoming`` has come."""
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
