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
MARGIN = 0.05  # of a row's gain, at least: less may be noise
ALLOWANCE = 0.01  # of the time may be lost to drafts that do not pay
SAVED, OWED = 2.0, 4.0  # steps: the largest balance of that allowance, and its largest debt


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
    the time of steps without drafts, by the number of sequences. What steps with drafts have lost or gained against
    those is kept as a balance, which grows by an ALLOWANCE of the time. A debt stops drafts until it is paid back, and
    savings pay for a draft that should not pay, to measure it again: drafts that are never right cost the allowance at
    most, and a cache that warms up is noticed.
    """

    def __init__(self) -> None:
        self._plain: dict[int, Average] = defaultdict(Average)  # seconds of a step without drafts
        self._row = Average()  # seconds that a draft adds
        self._since = 0  # steps with drafts since the last without
        self._balance = 0.0  # seconds

    def choose(self, chances: Sequence[Sequence[float]], room: int) -> list[int]:
        counts = [0] * len(chances)
        plain = self._plain[len(chances)]
        if plain.count < FIRST or self._since >= REFRESH or self._balance < 0:
            return counts
        row = max(0.0, self._row.value if self._row.count else ROW * plain.value)
        room = min(room, 1 + self._row.count)  # the first trials are small
        tokens, seconds = float(len(chances)), plain.value
        best = [(-each[0], at) for at, each in enumerate(chances) if each]  # of each sequence, its next draft
        heapq.heapify(best)
        for _ in range(room):
            if not best:
                break
            chance, at = -best[0][0], best[0][1]
            loss = row - chance * seconds / tokens
            trial = not any(counts) and loss <= self._balance
            if not trial and chance * seconds < (1 + MARGIN) * row * tokens:
                break
            counts[at] += 1
            tokens, seconds = tokens + chance, seconds + row
            if counts[at] < len(chances[at]):
                heapq.heapreplace(best, (-chance * chances[at][counts[at]], at))
            else:
                heapq.heappop(best)
        return counts

    def add(self, sequences: int, drafts: int, tokens: int, seconds: float) -> None:
        plain = self._plain[sequences]
        self._balance += ALLOWANCE * seconds
        if drafts:
            self._since += 1
            self._row.add((seconds - plain.value) / drafts)
            one = plain.value / sequences  # seconds of a token without drafts, and the most that a draft can cost
            self._balance += max(tokens * one - seconds, -drafts * one)
        else:
            self._since = 0
            plain.add(seconds)
        self._balance = min(max(self._balance, -OWED * plain.value), SAVED * plain.value)
