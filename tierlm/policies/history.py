"""Predictors that learn online from earlier tokens and need no router."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tierlm.policies.prediction import Predictor
from tierlm.spec import ExpertKey

DEEP = 4  # length of a ranking, in experts per token

Counts = npt.NDArray[Any]


class PreviousToken(Predictor):
    """The experts that the layer used for the previous token, in their order."""

    def __init__(self, width: int):
        super().__init__(width)
        self._last: dict[int, list[int]] = {}

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._last[layer] = list(experts)

    def predict(self, layer: int) -> list[ExpertKey]:
        return [ExpertKey(layer, expert) for expert in self._last.get(layer, ())]


class Frequency(Predictor):
    """The experts that the layer uses most often; older uses weigh less (0.99 a step)."""

    FADE = 0.99

    def __init__(self, width: int):
        super().__init__(width)
        self._counts: dict[int, Counts] = {}  # by layer: float64 [experts seen so far]

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        counts = self._counts.get(layer, np.zeros(0)) * self.FADE
        if experts and max(experts) >= len(counts):
            counts = np.pad(counts, (0, max(experts) + 1 - len(counts)))
        counts[list(experts)] += 1
        self._counts[layer] = counts

    def predict(self, layer: int) -> list[ExpertKey]:
        return _best(layer, self._counts.get(layer, np.zeros(0)), DEEP * self.width)


class Transition(Predictor):
    """Scores a layer's experts by how often they follow an earlier layer's experts: co-occurrence counts, as in the
    expert-to-expert tables of ExFlow (Yao et al., arXiv 2401.08383). Learns from single tokens only."""

    lookahead = 2

    def __init__(self, width: int):
        super().__init__(width)
        self._pairs: dict[tuple[int, int], Counts] = {}  # (layer, later layer) -> float32 [experts, experts]
        self._recent: deque[tuple[int, list[int]]] = deque(maxlen=self.lookahead)  # the latest last

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        chosen = list(experts)
        if not 0 < len(chosen) <= self.width:
            self._recent.clear()
            return
        for earlier, before in self._recent:
            pairs = self._pairs.get((earlier, layer), np.zeros((0, 0), np.float32))
            if max(*before, *chosen) >= len(pairs):
                pairs = np.pad(pairs, (0, max(*before, *chosen) + 1 - len(pairs)))
            pairs[np.array(before)[:, None], chosen] += 1
            self._pairs[earlier, layer] = pairs
        self._recent.append((layer, chosen))

    def predict(self, layer: int) -> list[ExpertKey]:
        if not self._recent:
            return []
        current, chosen = self._recent[-1]
        pairs = self._pairs.get((current, layer), np.zeros((0, 0), np.float32))
        rows = pairs[[expert for expert in chosen if expert < len(pairs)]]
        return _best(layer, (rows / np.maximum(rows.sum(1, keepdims=True), 1)).sum(0), DEEP * self.width)


class Ensemble(Predictor):
    """All of these together: a vote weighs by its rank (reciprocal rank fusion, Cormack et al., SIGIR 2009) and by the
    recent precision of its predictor's first ``width`` predictions."""

    lookahead = 2
    RANK = 4.0  # the first rank counts for 1/4, the second for 1/5

    def __init__(self, width: int):
        super().__init__(width)
        self._members = [PreviousToken(width), Frequency(width), Transition(width)]
        self._right = [0.3] * len(self._members)  # moving average of precision, over about 100 predictions
        self._open: dict[int, list[list[ExpertKey]]] = {}

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        chosen = set(experts)
        for at, predictions in enumerate(self._open.pop(layer, ())):
            first = predictions[: self.width]
            if first:
                share = sum(key.expert in chosen for key in first) / len(first)
                self._right[at] += 0.01 * (share - self._right[at])
        for member in self._members:
            member.observe(layer, experts)

    def predict(self, layer: int) -> list[ExpertKey]:
        predictions = self._open[layer] = [member.predict(layer) for member in self._members]
        votes: dict[ExpertKey, float] = {}
        for right, ranked in zip(self._right, predictions, strict=True):
            for rank, key in enumerate(ranked):
                votes[key] = votes.get(key, 0.0) + right / (self.RANK + rank)
        return sorted(votes, key=lambda key: (-votes[key], key))[: DEEP * self.width]


def _best(layer: int, scores: Counts, most: int) -> list[ExpertKey]:
    """The experts with the highest positive scores, at most ``most``."""
    order = np.argsort(-scores, kind="stable")[:most]
    return [ExpertKey(layer, int(expert)) for expert in order if scores[expert] > 0]
