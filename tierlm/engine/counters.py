"""What the engine has done, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from tierlm.memory.meter import Usage


@dataclass
class Phase:
    """Prefill, or decode. ``seconds`` in the engine; of these ``stall`` while computation waited for transfers, and
    ``reading`` while the disk was busy, with ``disk_bytes`` read. A batched step counts each sequence's token."""

    tokens: int = 0
    seconds: float = 0.0
    stall: float = 0.0
    reading: float = 0.0
    disk_bytes: int = 0

    @property
    def rate(self) -> float | None:
        """Tokens a second."""
        return ratio(self.tokens, self.seconds)

    @property
    def compute(self) -> float:
        """Seconds in which computation did not wait."""
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
class Counters:
    """``first_tokens``: sequences that got one. ``first_token``: seconds from the latest such request to it."""

    prefill: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)
    first_tokens: int = 0
    first_token: float | None = None


def ratio(amount: float, over: float) -> float | None:
    """None where there is nothing to compare with."""
    return amount / over if over else None
