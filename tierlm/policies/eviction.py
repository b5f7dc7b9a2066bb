"""Eviction policies: which resident record leaves. Pure Python; the runtime and a simulator call the same objects.

A policy sees keys and events only. To add one: a class with the five methods of Policy, and a line in POLICIES, or no
line at all: a name such as ``"my.module:MyPolicy"`` is looked up.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, TypeVar

from tierlm.policies.registry import lookup
from tierlm.spec import Key

T = TypeVar("T", bound=tuple[Any, ...])


class Policy(ABC):
    """One tier's order of eviction. ``layers``: how many layers the model runs in a cycle.

    The tier calls, from one thread: ``on_insert`` when a record is given a slot, ``on_hit`` when a record that has one
    is demanded, ``on_evict`` when the tier has taken a record's slot away, ``on_discard`` when a record is gone
    because its read failed. Keys are of the form (layer, ...), and hashable.
    """

    def __init__(self, layers: int):
        self.layers = layers

    @abstractmethod
    def on_insert(self, key: Key, demanded: bool = True) -> None:
        """``key`` has been given a slot; ``demanded`` is False if only a predictor asked for it."""

    @abstractmethod
    def on_hit(self, key: Key) -> None:
        """``key``, which has a slot, is demanded."""

    @abstractmethod
    def on_evict(self, key: Key) -> None:
        """``key`` has lost its slot."""

    def on_discard(self, key: Key) -> None:
        """``key`` never arrived."""
        self.on_evict(key)

    def expect(self, key: Key, share: float) -> None:
        """In earlier runs, ``share`` of the tokens used ``key``."""

    @abstractmethod
    def victims(self) -> Iterator[Key]:
        """Keys that have a slot, the best victim first. The tier skips those in use, and takes one; nothing may be
        called on the policy while it looks."""


class Lru(Policy):
    """Least recently used."""

    def __init__(self, layers: int):
        super().__init__(layers)
        self._order: OrderedDict[Key, None] = OrderedDict()

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._order[key] = None

    def on_hit(self, key: Key) -> None:
        self._order.move_to_end(key)

    def on_evict(self, key: Key) -> None:
        del self._order[key]

    def victims(self) -> Iterator[Key]:
        return iter(self._order)


class Lfu(Policy):
    """Least frequently used while resident; ties go to the least recently used."""

    def __init__(self, layers: int):
        super().__init__(layers)
        self._uses: dict[Key, tuple[int, int]] = {}  # key -> (uses, time of the last)
        self._heap: list[tuple[int, int, Key]] = []  # holds stale entries, told by the time
        self._clock = count()

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._set(key, 1 if demanded else 0)

    def on_hit(self, key: Key) -> None:
        self._set(key, self._uses[key][0] + 1)

    def on_evict(self, key: Key) -> None:
        del self._uses[key]

    def victims(self) -> Iterator[Key]:
        return _drain(self._heap, lambda item: self._uses.get(item[2]) == item[:2])

    def _set(self, key: Key, uses: int) -> None:
        self._uses[key] = (uses, next(self._clock))
        heapq.heappush(self._heap, (*self._uses[key], key))
        if len(self._heap) > 4 * len(self._uses) + 64:
            self._heap = [(*state, key) for key, state in self._uses.items()]
            heapq.heapify(self._heap)


class Cycle(Policy):
    """Layers run in a cycle, so a record's next chance of use is known: when its layer runs again.

    Score = (layers until then) / L + 1/p - 1, in tokens, where p is the exponential average (0.9 a token) of whether a
    token used the record; the largest leaves. p decays alike for all records of a layer, so that each layer keeps a
    heap by the logarithm of p, normalised to one time, and only the heads of the heaps are compared.
    """

    DECAY = 0.9
    FLOOR = 1e-6  # of p: below it, records are equally cold

    def __init__(self, layers: int):
        super().__init__(layers)
        self._token = 0  # counts the passes through the layers
        self._layer = -1  # the one that ran last
        self._rank: dict[Key, float] = {}  # log p, as of token 0; kept for absent records too
        self._heaps: dict[int, list[tuple[float, Key]]] = {}
        self._resident: dict[int, set[Key]] = {}  # by layer
        self._used: dict[Key, int] = {}  # token of the last use

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._resident.setdefault(key.layer, set()).add(key)
        if demanded:
            self._use(key)
        else:
            self._push(key)

    def on_hit(self, key: Key) -> None:
        self._use(key)

    def on_evict(self, key: Key) -> None:
        self._resident[key.layer].remove(key)

    def expect(self, key: Key, share: float) -> None:
        if share > 0 and key not in self._used:
            self._rank[key] = math.log(share) - self._token * math.log(self.DECAY)
            if key in self._resident.get(key.layer, ()):
                self._push(key)

    def victims(self) -> Iterator[Key]:
        runs = {layer: _drain(heap, self._fresh) for layer, heap in self._heaps.items()}
        heads: list[tuple[float, int, Key]] = []
        for layer, run in runs.items():
            self._offer(heads, layer, run)
        while heads:
            _, layer, key = heapq.heappop(heads)
            yield key
            self._offer(heads, layer, runs[layer])

    def _offer(self, heads: list[tuple[float, int, Key]], layer: int, run: Iterator[Key]) -> None:
        key = next(run, None)
        if key is not None:
            distance = ((layer - self._layer - 1) % self.layers + 1) / self.layers
            p = math.exp(self._log_p(key))
            heapq.heappush(heads, (-(distance + 1 / max(p, self.FLOOR) - 1), layer, key))

    def _log_p(self, key: Key) -> float:
        return self._rank.get(key, -math.inf) + self._token * math.log(self.DECAY)

    def _use(self, key: Key) -> None:
        # A pass has ended where a layer comes before the last one, or where one record comes twice in a row.
        again = self._used.get(key) == self._token
        if key.layer < self._layer or (key.layer == self._layer and again):
            self._token += 1
        self._layer = key.layer
        self._used[key] = self._token
        p = math.exp(self._log_p(key)) + (1 - self.DECAY)
        self._rank[key] = math.log(p) - self._token * math.log(self.DECAY)
        self._push(key)

    def _push(self, key: Key) -> None:
        heap = self._heaps.setdefault(key.layer, [])
        heapq.heappush(heap, (self._rank.get(key, -math.inf), key))
        residents = self._resident.get(key.layer, ())
        if len(heap) > 8 * len(residents) + 64:
            self._heaps[key.layer] = [(self._rank.get(other, -math.inf), other) for other in residents]
            heapq.heapify(self._heaps[key.layer])

    def _fresh(self, item: tuple[float, Key]) -> bool:
        rank, key = item
        return key in self._resident.get(key.layer, ()) and rank == self._rank.get(key, -math.inf)


def _drain(heap: list[T], fresh: Callable[[T], bool]) -> Iterator[Key]:
    """The keys (last fields) of a heap's fresh items, in order. Stale ones are dropped, the others put back."""
    taken: list[T] = []
    try:
        while heap:
            item = heapq.heappop(heap)
            if fresh(item):
                taken.append(item)
                yield item[-1]
    finally:
        for item in taken:
            heapq.heappush(heap, item)


POLICIES: dict[str, type[Policy]] = {"lru": Lru, "lfu": Lfu, "cycle": Cycle}


def make_policy(name: str, layers: int) -> Policy:
    """A policy by name, or by ``"module:Class"``. Raises UsageError for an unknown one."""
    return lookup("policy", name, POLICIES, Policy)(layers)
