"""Policies by order of arrival or use: fifo, random, lru, per-layer lru, clock, sieve."""

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
    """Any record, with equal chances: the baseline. Repeatable by ``seed``."""

    def __init__(self, info: TierInfo, *, seed: int = 0):
        super().__init__(info)
        self._random = random.Random(seed)
        self._keys: list[Key] = []
        self._place: dict[Key, int] = {}
        self._draw = self._random.random()  # of the next victim; repeated calls of victims agree

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


class Lru(Fifo):
    """Least recently used."""

    def on_hit(self, key: Key) -> None:
        self._queue.move_to_end(key)


class LayerLru(Policy):
    """Least recently used within a layer. Each layer has an equal share of the slots; others may use the rest of a
    share until the layer needs it. After Eliseev and Mazur (arXiv 2312.17238), whose shares are fixed."""

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
    """A queue whose keys have 0 to ``most`` lives. The hand moves each key it skips to the end and takes one of its
    lives; it stops at the first key without a life."""

    def __init__(self, most: int):
        self.most = most
        self.lives: OrderedDict[Key, int] = OrderedDict()

    def __iter__(self) -> Iterator[Key]:
        """Keys in the order in which the hand would stop at them."""
        for lives in range(self.most + 1):
            yield from (key for key, left in self.lives.items() if left == lives)

    def spare(self, key: Key) -> None:
        """Give ``key``, which is used, one more life."""
        self.lives[key] = min(self.lives[key] + 1, self.most)

    def turn(self, key: Key) -> None:
        """Turn the hand until it stops at ``key``, and remove that. Other keys without a life are in use: skip them."""
        while True:
            other, lives = self.lives.popitem(last=False)
            if other == key and lives == 0:
                return
            self.lives[other] = max(0, lives - 1)


class Clock(Policy):
    """Second chance (Corbato, "A paging experiment with the Multics system", 1968) with ``lives`` chances: a queue in
    order of arrival; a key at its head that was used since the hand last saw it goes back to the end."""

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
    """SIEVE (Zhang et al., NSDI 2024): like clock, but a spared key keeps its place and the hand continues where it
    stopped, so it soon reaches new keys."""

    def __init__(self, info: TierInfo):
        super().__init__(info)
        self._ahead: OrderedDict[Key, bool] = OrderedDict()  # from the hand to the newest; True: used since
        self._behind: OrderedDict[Key, bool] = OrderedDict()  # all older keys
        self._offered: Key | None = None

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._ahead[key] = False

    def on_hit(self, key: Key) -> None:
        (self._ahead if key in self._ahead else self._behind)[key] = True

    def on_evict(self, key: Key) -> None:
        if key == self._offered:
            self._turn(key)
        else:
            self.on_discard(key)

    def on_discard(self, key: Key) -> None:
        del (self._ahead if key in self._ahead else self._behind)[key]
        self._wrap()

    def victims(self, incoming: Key | None = None) -> Iterator[Key]:
        for used in (False, True):
            for part in (self._ahead, self._behind):
                for key in (key for key, seen in part.items() if seen == used):
                    self._offered = key
                    yield key

    def _turn(self, key: Key) -> None:
        """Move the hand to ``key`` and remove it."""
        while True:
            other, used = self._ahead.popitem(last=False)
            if other != key or used:
                self._behind[other] = False
            self._wrap()
            if other == key and not used:
                return

    def _wrap(self) -> None:
        """After the newest key, the hand goes to the oldest."""
        if not self._ahead:
            self._ahead, self._behind = self._behind, self._ahead
