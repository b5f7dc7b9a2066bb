"""The hazard policy: estimates the probability of a use from a record's past uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tierlm.policies.eviction import Bounds, TierInfo
from tierlm.policies.forecast import Floats, Forecast, Indices
from tierlm.spec import ExpertKey

AGES, SHARES = 16, 32  # log buckets, two per doubling
FLOOR = 1e-6  # of a share: below it, all records are equally cold
EVEN = 16  # the bucket of the mean share


@dataclass(slots=True)
class Habits:
    """The use of one layer's records; arrays are [experts]."""

    share: Floats  # of turns that use it, a slow moving average
    age: Indices  # turns since the last use
    bucket: Indices  # in the table, at the last turn
    turns: int = 0


class Hazard(Forecast):
    """The hazard of use: P(used at the layer's next turn | turns since the last use, share of turns that use it), in
    one table of log buckets for all layers, counted online.

    ``slow``: decay of a share, per turn. ``prior``: weight of the share in each cell of the table, in turns. After LHD
    (Beckmann, Chen and Cidon, NSDI 2018), which also ranks by counts over similar records.
    """

    tunable: ClassVar[Bounds] = {"slow": (0.001, 0.1), "prior": (1.0, 50.0)}

    def __init__(self, info: TierInfo, *, slow: float = 0.02, prior: float = 5.0):
        super().__init__(info)
        self.slow, self.prior = slow, prior
        self._seen, self._hits = np.full(AGES * SHARES, prior), np.zeros(AGES * SHARES)  # turns, turns with a use
        self._age_bucket = (2 * np.log2(np.arange(2, 2 ** (AGES // 2) + 2)) - 2).astype(np.intp) * SHARES
        self._habits: dict[int, Habits] = {}
        self._expected: dict[int, dict[int, float]] = {}  # shares of earlier runs, for layers that have not run

    def learn(self, layer: int, used: Indices) -> None:
        self.forecast(layer, np.log(self.hazard(layer, used)))

    def expect(self, key: ExpertKey, share: float) -> None:
        if key.layer not in self._habits:
            self._expected.setdefault(key.layer, {})[key.expert] = share

    def hazard(self, layer: int, used: Indices) -> Floats:
        """[experts] the probability of use at the next turn of ``layer``, which has just used ``used``."""
        habits = self._habits_of(layer, len(used))
        if habits.turns:
            self._seen += np.bincount(habits.bucket, minlength=AGES * SHARES)
            self._hits += np.bincount(habits.bucket[used], minlength=AGES * SHARES)
        habits.turns += 1
        rate = max(self.slow, 1 / (habits.turns + 9))
        share, age = habits.share, habits.age
        share *= 1 - rate
        np.maximum(share, FLOOR, out=share)
        share[used] += rate
        age += 1
        age[used] = 0
        bucket = habits.bucket = self._bucket(age, share)
        found = self._hits.take(bucket)
        found += self.prior * share
        found /= self._seen.take(bucket)
        return np.minimum(np.maximum(found, 1e-6), 1).astype(np.float32)

    def _habits_of(self, layer: int, width: int) -> Habits:
        """The habits of ``layer``, extended to all experts; a new record's share is ``width`` / experts."""
        habits = self._habits.get(layer)
        if habits is None:
            none = np.zeros(0, np.float32)
            habits = self._habits[layer] = Habits(none, none.astype(np.intp), none.astype(np.intp))
        missing = self.experts - len(habits.share)
        if missing:
            habits.share = np.append(habits.share, np.full(missing, width / self.experts, np.float32))
            habits.age = np.append(habits.age, np.full(missing, habits.turns))
            habits.bucket = self._bucket(habits.age, habits.share)
            for expert, share in self._expected.pop(layer, {}).items():
                if expert < self.experts:
                    habits.share[expert] = max(share, FLOOR)
        return habits

    def _bucket(self, age: Indices, share: Floats) -> Indices:
        places = np.log2(share)
        places *= 2
        places += EVEN - 2 * math.log2(np.add.reduce(share) / len(share))
        np.minimum(np.maximum(places, 0, out=places), SHARES - 1, out=places)
        buckets: Indices = self._age_bucket.take(age, mode="clip")
        buckets += places.astype(np.intp)
        return buckets
