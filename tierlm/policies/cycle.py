"""The policy of the layer cycle."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

from tierlm.policies.eviction import Bounds, Policy, TierInfo
from tierlm.spec import ExpertKey

T = TypeVar("T", bound=tuple[Any, ...])


class Cycle(Policy):
    """Layers run in a cycle, so a record's next chance of use is known: when its layer runs again.

    Score = (layers until then) / L + 1/p - 1, in tokens, where p is the exponential average (``decay`` a token) of
    whether a token used the record; the largest leaves. p decays alike for all records of a layer, so that each layer
    keeps a heap by the logarithm of p, normalised to one time, and only the heads of the heaps are compared.
    """

    tunable: ClassVar[Bounds] = {"decay": (0.5, 0.999)}
    FLOOR = 1e-6  # of p: below it, records are equally cold

    def __init__(self, info: TierInfo, *, decay: float = 0.9):
        super().__init__(info)
        self.layers, self.decay = info.layers, decay
        self._token = 0  # counts the passes through the layers
        self._layer = -1  # the one that ran last
        self._rank: dict[ExpertKey, float] = {}  # log p, as of token 0; kept for absent records too
        self._heaps: dict[int, list[tuple[float, ExpertKey]]] = {}
        self._resident: dict[int, set[ExpertKey]] = {}  # by layer
        self._used: dict[ExpertKey, int] = {}  # token of the last use

    def on_insert(self, key: ExpertKey, demanded: bool = True) -> None:
        self._resident.setdefault(key.layer, set()).add(key)
        if demanded:
            self._use(key)
        else:
            self._push(key)

    def on_hit(self, key: ExpertKey) -> None:
        self._use(key)

    def on_evict(self, key: ExpertKey) -> None:
        self._resident[key.layer].remove(key)

    def expect(self, key: ExpertKey, share: float) -> None:
        if share > 0 and key not in self._used:
            self._rank[key] = math.log(share) - self._token * math.log(self.decay)
            if key in self._resident.get(key.layer, ()):
                self._push(key)

    def victims(self, incoming: ExpertKey | None = None) -> Iterator[ExpertKey]:
        runs = {layer: _drain(heap, self._fresh) for layer, heap in self._heaps.items()}
        heads: list[tuple[float, int, ExpertKey]] = []
        for layer, run in runs.items():
            self._offer(heads, layer, run)
        while heads:
            _, layer, key = heapq.heappop(heads)
            yield key
            self._offer(heads, layer, runs[layer])

    def _offer(self, heads: list[tuple[float, int, ExpertKey]], layer: int, run: Iterator[ExpertKey]) -> None:
        key = next(run, None)
        if key is not None:
            distance = ((layer - self._layer - 1) % self.layers + 1) / self.layers
            p = math.exp(self._log_p(key))
            heapq.heappush(heads, (-(distance + 1 / max(p, self.FLOOR) - 1), layer, key))

    def _log_p(self, key: ExpertKey) -> float:
        return self._rank.get(key, -math.inf) + self._token * math.log(self.decay)

    def _use(self, key: ExpertKey) -> None:
        # A pass has ended where a layer comes before the last one, or where one record comes twice in a row.
        again = self._used.get(key) == self._token
        if key.layer < self._layer or (key.layer == self._layer and again):
            self._token += 1
        self._layer = key.layer
        self._used[key] = self._token
        p = math.exp(self._log_p(key)) + (1 - self.decay)
        self._rank[key] = math.log(p) - self._token * math.log(self.decay)
        self._push(key)

    def _push(self, key: ExpertKey) -> None:
        heap = self._heaps.setdefault(key.layer, [])
        heapq.heappush(heap, (self._rank.get(key, -math.inf), key))
        residents = self._resident.get(key.layer, ())
        if len(heap) > 8 * len(residents) + 64:
            self._heaps[key.layer] = [(self._rank.get(other, -math.inf), other) for other in residents]
            heapq.heapify(self._heaps[key.layer])

    def _fresh(self, item: tuple[float, ExpertKey]) -> bool:
        rank, key = item
        return key in self._resident.get(key.layer, ()) and rank == self._rank.get(key, -math.inf)


def _drain(heap: list[T], fresh: Callable[[T], bool]) -> Iterator[ExpertKey]:
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
