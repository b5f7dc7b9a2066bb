"""How many drafts are worth verifying. No machine constants: the times of steps are measured while running."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

from tierlm.policies.prefetch import Average

FIRST = 3  # steps without drafts before the first with them
REFRESH = 24  # of so many steps with drafts, one runs without them, so that its time stays known
ROW = 0.5  # of a step's time: what a row is taken to add before it is measured
LEAST = 0.02  # of a step's time: what a row adds at least, whatever noise says
MARGIN = 0.05  # of a row's gain, at least: less may be noise
ALLOWANCE = 0.01  # of the time may be spent on trials, and as much is paid back on a debt
TRIALS = 2.0  # steps: the most that is saved for trials
SAVED, OWED = 16.0, 4.0  # steps: the most that counts of what drafts have gained and lost: luck, but not a change


class Gate(Protocol):
    """Decides how many drafts a step verifies."""

    def choose(self, chances: Sequence[Sequence[float]], room: int) -> list[int]:
        """How many drafts of each sequence in the step to verify, ``room`` at most in all. ``chances``: of each, how
        likely each of its drafts is right, given that those before it are."""

    def add(self, sequences: int, drafts: int, tokens: int, seconds: float) -> None:
        """A step of ``sequences`` and ``drafts`` gave ``tokens`` and took ``seconds``."""


class Always:
    """Verifies what there is room for, so that no decision depends on time."""

    def choose(self, chances: Sequence[Sequence[float]], room: int) -> list[int]:
        counts = [0] * len(chances)
        for _ in range(room):
            more = [at for at, each in enumerate(chances) if counts[at] < len(each)]
            if more:
                counts[min(more, key=counts.__getitem__)] += 1
        return counts

    def add(self, sequences: int, drafts: int, tokens: int, seconds: float) -> None:
        pass


class Measured:
    """Verifies drafts while each is expected to give more tokens a second than the step without it.

    A draft is one more row of the step. What a row adds to the time, experts that it reads and all, is averaged; so is
    the time of steps without drafts, by the number of sequences. Now and then a draft that should not pay is tried, to
    measure it again: a cache that warms up is noticed. Where steps with drafts have lost more time than they have
    gained, drafts stop until this debt is paid back by an ALLOWANCE of the time.
    """

    def __init__(self) -> None:
        self._plain: dict[int, Average] = defaultdict(Average)  # seconds of a step without drafts
        self._row = Average()  # seconds that a draft adds
        self._since = 0  # steps with drafts since the last without
        self._trials = 0.0  # seconds saved for trials
        self._balance = 0.0  # seconds gained by drafts

    def choose(self, chances: Sequence[Sequence[float]], room: int) -> list[int]:
        counts = [0] * len(chances)
        plain = self._plain[len(chances)]
        if plain.count < FIRST or self._since >= REFRESH or self._balance < 0:
            return counts
        row = max(LEAST * plain.value, self._row.value if self._row.count else ROW * plain.value)
        room = min(room, 1 + self._row.count)  # the first trials are small
        tokens, seconds = float(len(chances)), plain.value
        best = [(-each[0], at) for at, each in enumerate(chances) if each]  # of each sequence, its next draft
        heapq.heapify(best)
        for _ in range(room):
            if not best:
                break
            chance, at = -best[0][0], best[0][1]
            loss = row - chance * seconds / tokens
            if chance * seconds < (1 + MARGIN) * row * tokens:
                if any(counts) or loss > self._trials:
                    break
                self._trials -= max(0.0, loss)
            counts[at] += 1
            tokens, seconds = tokens + chance, seconds + row
            if counts[at] < len(chances[at]):
                heapq.heapreplace(best, (-chance * chances[at][counts[at]], at))
            else:
                heapq.heappop(best)
        return counts

    def add(self, sequences: int, drafts: int, tokens: int, seconds: float) -> None:
        plain = self._plain[sequences]
        spare = ALLOWANCE * seconds
        self._trials = min(self._trials + spare, TRIALS * plain.value)
        if drafts:
            self._since += 1
            self._row.add((seconds - plain.value) / drafts)
            one = plain.value / sequences  # seconds of a token without drafts, and the most that a draft can cost
            spare += max(tokens * one - seconds, -drafts * one)
        else:
            self._since = 0
            plain.add(seconds)
        self._balance = min(max(self._balance + spare, -OWED * plain.value), SAVED * plain.value)
