"""The oracle: no policy hits more often."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable

from tierlm.policies.eviction import TierInfo
from tierlm.policies.ranking import Ranked
from tierlm.spec import Key


class Belady(Ranked[float]):
    """The victim is the record whose next use is farthest (Belady, IBM Systems Journal 5, 1966). For simulations.

    ``future``: all demands, one group of keys for each layer that runs; keys of a group share one time. Rank: minus the
    time of the next use. Raises ValueError for any other demand.
    """

    def __init__(self, info: TierInfo, future: Iterable[Iterable[Key]]):
        super().__init__(info)
        self._future: Iterable[Iterable[Key]] | None = future  # until the first demand
        self._times: dict[Key, array[int]] = {}  # of uses
        self._done: dict[Key, int] = {}  # uses that are past

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        self._note(key, demanded)

    def on_hit(self, key: Key) -> None:
        self._note(key, demanded=True)

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
