"""The cycle policy: layers run in a cycle, so the next chance of a use is known."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import ClassVar

from tierlm.policies.eviction import Bounds, Policy, TierInfo
from tierlm.policies.ranking import Ranking
from tierlm.spec import ExpertKey, Key


class Cycle(Policy):
    """The victim has the largest score (layers until its layer runs again) / L + 1/p - 1, in tokens, where p is the
    exponential average (``decay`` a token) of its use. All p of a layer decay alike, so each layer ranks its residents
    by log p as of token 0, and only the first of each layer are compared.
    """

    tunable: ClassVar[Bounds] = {"decay": (0.5, 0.999)}
    FLOOR = 1e-6  # of p: below it, all records are equally cold

    def __init__(self, info: TierInfo, *, decay: float = 0.9):
        super().__init__(info)
        self.layers, self.decay = info.layers, decay
        self._token = 0  # passes through the layers
        self._layer = -1  # that ran last
        self._rank: dict[Key, float] = {}  # log p as of token 0, of absent records too
        self._rankings: defaultdict[int, Ranking[float]] = defaultdict(Ranking)  # by layer, of residents
        self._used: dict[ExpertKey, int] = {}  # token of the last use

    def on_insert(self, key: ExpertKey, demanded: bool = True) -> None:
        if demanded:
            self._use(key)
        else:
            self._place(key)

    def on_hit(self, key: ExpertKey) -> None:
        self._use(key)

    def on_evict(self, key: ExpertKey) -> None:
        self._rankings[key.layer].remove(key)

    def expect(self, key: ExpertKey, share: float) -> None:
        if share > 0 and key not in self._used:
            self._rank[key] = math.log(share) - self._token * math.log(self.decay)
            if key in self._rankings[key.layer].ranks:
                self._place(key)

    def victims(self, incoming: ExpertKey | None = None) -> Iterator[Key]:
        runs = {layer: iter(ranking) for layer, ranking in self._rankings.items()}
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
        return self._rank.get(key, -math.inf) + self._token * math.log(self.decay)

    def _use(self, key: ExpertKey) -> None:
        # A new pass begins when an earlier layer runs, or when the layer uses a record again.
        again = self._used.get(key) == self._token
        if key.layer < self._layer or (key.layer == self._layer and again):
            self._token += 1
        self._layer = key.layer
        self._used[key] = self._token
        p = math.exp(self._log_p(key)) + (1 - self.decay)
        self._rank[key] = math.log(p) - self._token * math.log(self.decay)
        self._place(key)

    def _place(self, key: ExpertKey) -> None:
        self._rankings[key.layer].place(key, self._rank.get(key, -math.inf))
