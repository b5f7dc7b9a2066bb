"""The oracle: nobody hits more often."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator

from tierlm.policies.eviction import Policy, TierInfo
from tierlm.policies.ranking import Ranking
from tierlm.spec import Key


class Belady(Policy):
    """The one whose next use is farthest leaves (Belady, IBM Systems Journal 5, 1966). For simulations: ``future`` is
    all that will be demanded, a group of keys for each layer that runs. What is used together has one time.

    Raises ValueError if something else is demanded.
    """

    def __init__(self, info: TierInfo, future: Iterable[Iterable[Key]]):
        super().__init__(info)
        self._future: Iterable[Iterable[Key]] | None = future  # until it is needed
        self._times: dict[Key, array[int]] = {}  # of the uses
        self._done: dict[Key, int] = {}  # how many of them are past
        self._ranking = Ranking[float]()  # - time of the next use

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._note(key, demanded)

    def on_hit(self, key: Key) -> None:
        self._note(key, demanded=True)

    def on_evict(self, key: Key) -> None:
        self._ranking.remove(key)

    def victims(self, incoming: Key | None = None) -> Iterator[Key]:
        return iter(self._ranking)

    def _note(self, key: Key, demanded: bool) -> None:
        if self._future is not None:
            for time, keys in enumerate(self._future):
                for other in keys:
                    self._times.setdefault(other, array("q")).append(time)
            self._future = None
        times, done = self._times.get(key, ()), self._done.get(key, 0) + demanded
        if done > len(times):
            raise ValueError(f"belady: use {done} of {key} is demanded, but the trace has {len(times)}")
        self._done[key] = done
        self._ranking.place(key, -times[done] if done < len(times) else -math.inf)
