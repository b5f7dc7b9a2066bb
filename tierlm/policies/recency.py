"""Policies by order of arrival or of use: fifo, random, lru, per-layer lru, clock, sieve."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import ClassVar

from tierlm.policies.eviction import Bounds, Policy, TierInfo
from tierlm.spec import ExpertKey, Key


class Fifo(Policy):
    """First in, first out."""

    def __init__(self, info: TierInfo):
        super().__init__(info)
        self._queue: OrderedDict[Key, None] = OrderedDict()

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._queue[key] = None

    def on_hit(self, key: Key) -> None:
        """Changes nothing."""

    def on_evict(self, key: Key) -> None:
        del self._queue[key]

    def victims(self, incoming: Key | None = None) -> Iterator[Key]:
        return iter(self._queue)


class Random(Policy):
    """Any, with equal chances: where the others have to be better. The seed makes it repeatable."""

    def __init__(self, info: TierInfo, *, seed: int = 0):
        super().__init__(info)
        self._random = random.Random(seed)
        self._keys: list[Key] = []
        self._place: dict[Key, int] = {}
        self._draw = self._random.random()  # of the next look: looking again gives the same

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._place[key] = len(self._keys)
        self._keys.append(key)

    def on_hit(self, key: Key) -> None:
        """Changes nothing."""

    def on_evict(self, key: Key) -> None:
        place, last = self._place.pop(key), self._keys.pop()
        if last != key:
            self._keys[place] = last
            self._place[last] = place
        self._draw = self._random.random()

    def victims(self, incoming: Key | None = None) -> Iterator[Key]:
        count = len(self._keys)
        first = int(self._draw * count)
        return (self._keys[(first + step) % count] for step in range(count))


class Lru(Policy):
    """Least recently used."""

    def __init__(self, info: TierInfo):
        super().__init__(info)
        self._order: OrderedDict[Key, None] = OrderedDict()

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._order[key] = None

    def on_hit(self, key: Key) -> None:
        self._order.move_to_end(key)

    def on_evict(self, key: Key) -> None:
        del self._order[key]

    def victims(self, incoming: Key | None = None) -> Iterator[Key]:
        return iter(self._order)


class LayerLru(Policy):
    """Least recently used within a layer, where each layer has an equal share of the slots; what a layer does not use
    of its share the others may, until it asks. As in Eliseev and Mazur (arXiv 2312.17238), whose shares are fixed."""

    def __init__(self, info: TierInfo):
        super().__init__(info)
        self._orders: dict[int, OrderedDict[ExpertKey, None]] = {}

    def on_insert(self, key: ExpertKey, demanded: bool = True) -> None:
        self._orders.setdefault(key.layer, OrderedDict())[key] = None

    def on_hit(self, key: ExpertKey) -> None:
        self._orders[key.layer].move_to_end(key)

    def on_evict(self, key: ExpertKey) -> None:
        del self._orders[key.layer][key]

    def victims(self, incoming: ExpertKey | None = None) -> Iterator[ExpertKey]:
        own = self._orders.get(incoming.layer) if incoming is not None else None
        if own and len(own) * len(self._orders) >= self.info.capacity:
            yield from own
        else:
            own = None
        for order in sorted(self._orders.values(), key=len, reverse=True):
            if order is not own:
                yield from order


class Ring:
    """A queue whose keys have 0 to ``most`` lives: the hand goes round, takes one from each key that it passes, and
    stops at the first that has none. What it has passed goes to the end of the queue."""

    def __init__(self, most: int):
        self.most = most
        self.lives: OrderedDict[Key, int] = OrderedDict()

    def __iter__(self) -> Iterator[Key]:
        """In the order in which the hand would stop at them."""
        for lives in range(self.most + 1):
            yield from (key for key, left in self.lives.items() if left == lives)

    def spare(self, key: Key) -> None:
        """``key`` is used: one life more."""
        self.lives[key] = min(self.lives[key] + 1, self.most)

    def turn(self, key: Key) -> None:
        """Turn the hand until it stops at ``key``, and take that out. Others without a life, which are in use, are
        passed."""
        while True:
            passed, lives = self.lives.popitem(last=False)
            if passed == key and lives == 0:
                return
            self.lives[passed] = max(0, lives - 1)


class Clock(Policy):
    """Second chance (Corbato, "A paging experiment with the Multics system", 1968), with ``lives`` chances: a queue
    in order of arrival, from whose head what was used since it was last seen goes back to the end."""

    tunable: ClassVar[Bounds] = {"lives": (1, 3)}

    def __init__(self, info: TierInfo, *, lives: int = 1):
        super().__init__(info)
        self.lives = lives
        self._ring = Ring(lives)
        self._offered: Key | None = None

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._ring.lives[key] = 0

    def on_hit(self, key: Key) -> None:
        self._ring.spare(key)

    def on_evict(self, key: Key) -> None:
        if key == self._offered:
            self._ring.turn(key)
        else:
            self.on_discard(key)

    def on_discard(self, key: Key) -> None:
        del self._ring.lives[key]

    def victims(self, incoming: Key | None = None) -> Iterator[Key]:
        for key in self._ring:
            self._offered = key
            yield key


class Sieve(Policy):
    """SIEVE (Zhang et al., NSDI 2024): clock, but what the hand spares keeps its place, and the hand goes on from where
    it stopped, so that newcomers come under it soon."""

    def __init__(self, info: TierInfo):
        super().__init__(info)
        self._ahead: OrderedDict[Key, bool] = OrderedDict()  # from the hand to the newest; whether used since
        self._passed: OrderedDict[Key, bool] = OrderedDict()  # all that is older than those
        self._offered: Key | None = None

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._ahead[key] = False

    def on_hit(self, key: Key) -> None:
        (self._ahead if key in self._ahead else self._passed)[key] = True

    def on_evict(self, key: Key) -> None:
        if key == self._offered:
            self._turn(key)
        else:
            self.on_discard(key)

    def on_discard(self, key: Key) -> None:
        del (self._ahead if key in self._ahead else self._passed)[key]
        self._wrap()

    def victims(self, incoming: Key | None = None) -> Iterator[Key]:
        for used in (False, True):
            for part in (self._ahead, self._passed):
                for key in (key for key, seen in part.items() if seen == used):
                    self._offered = key
                    yield key

    def _turn(self, key: Key) -> None:
        """Move the hand to ``key``, and take that out."""
        while True:
            passed, used = self._ahead.popitem(last=False)
            if passed != key or used:
                self._passed[passed] = False
            self._wrap()
            if passed == key and not used:
                return

    def _wrap(self) -> None:
        """From the newest, the hand goes to the oldest."""
        if not self._ahead:
            self._ahead, self._passed = self._passed, self._ahead
