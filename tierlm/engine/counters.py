"""Counters of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from tierlm.memory.meter import Usage


@dataclass
class Phase:
    """Prefill or decode. Of ``seconds`` in the engine, computation waited for transfers for ``stall``, and the disk was
    busy for ``reading`` and read ``disk_bytes``. ``tokens`` counts each token of a batched step."""

    tokens: int = 0
    seconds: float = 0.0
    stall: float = 0.0
    reading: float = 0.0
    disk_bytes: int = 0

    @property
    def rate(self) -> float | None:
        """Tokens per second."""
        return ratio(self.tokens, self.seconds)

    @property
    def compute(self) -> float:
        """Seconds without stall."""
        return self.seconds - self.stall

    @property
    def stall_share(self) -> float | None:
        return ratio(self.stall, self.seconds)

    @property
    def overlap(self) -> float | None:
        """Overlap efficiency, max(reading, compute) / seconds: 1 if the slower of the two never waited."""
        return ratio(max(self.reading, self.compute), self.seconds)

    @property
    def disk_bytes_per_token(self) -> float | None:
        return ratio(self.disk_bytes, self.tokens)

    def add(self, tokens: int, seconds: float, usage: Usage) -> None:
        self.tokens += tokens
        self.seconds += seconds
        self.stall += usage.stall
        self.reading += usage.reading
        self.disk_bytes += usage.disk_bytes


@dataclass
class Drafts:
    """Speculative decoding: tokens that were ``drafted`` and verified, and those of them that the model ``accepted``.
    ``turns``: decode steps, each counted for every sequence in it."""

    drafted: int = 0
    accepted: int = 0
    turns: int = 0

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that were accepted."""
        return ratio(self.accepted, self.drafted)

    @property
    def tokens_per_step(self) -> float | None:
        """New tokens of a sequence in a decode step; 1 without drafts."""
        return ratio(self.turns + self.accepted, self.turns)


@dataclass
class Counters:
    """``first_tokens``: new tokens that prefill made: the first of each sequence, and the next one after it gave way.
    ``first_token``: the latency of the first in seconds, for the latest sequence. ``preempted``: how often a sequence
    gave way to another."""

    prefill: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)
    drafts: Drafts = field(default_factory=Drafts)
    first_tokens: int = 0
    first_token: float | None = None
    preempted: int = 0


def ratio(amount: float, over: float) -> float | None:
    """``amount / over``; None if ``over`` is 0."""
    return amount / over if over else None
