"""What a loaded model has done, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tierlm.host import peak_ram
from tierlm.memory.transfer import LinkStats
from tierlm.planning.plan import Plan
from tierlm.policies.residency import TierStats
from tierlm.runtime import Meter, Runtime


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
        return _ratio(self.tokens, self.seconds)

    @property
    def compute(self) -> float:
        """Seconds in which computation did not wait."""
        return self.seconds - self.stall

    @property
    def stall_share(self) -> float | None:
        return _ratio(self.stall, self.seconds)

    @property
    def overlap(self) -> float | None:
        """Overlap efficiency, max(reading, compute) / seconds: 1 if the slower of the two never waited."""
        return _ratio(max(self.reading, self.compute), self.seconds)

    @property
    def disk_bytes_per_token(self) -> float | None:
        return _ratio(self.disk_bytes, self.tokens)

    def add(self, tokens: int, seconds: float, spent: Meter) -> None:
        self.tokens += tokens
        self.seconds += seconds
        self.stall += spent.stall
        self.reading += spent.reading
        self.disk_bytes += spent.disk_bytes


@dataclass
class Counters:
    """What the engine has done. ``first_token``: seconds from the last request to its first token."""

    prefill: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)
    requests: int = 0
    first_token: float | None = None


@dataclass(frozen=True)
class Stats:
    """What has happened since the model was loaded. Sizes in bytes, times in seconds, rates in tokens a second.

    ``prefill`` counts prompt tokens, ``decode`` those new tokens that a step of their own has made: all but each
    prompt's first. ``first_token``: from the last request to its first token. ``links``: bytes moved and seconds busy
    on each link, loading and the background included. ``experts`` and ``trunks``: records by tier, the compute tier
    first; demands for one that is not there go on to the next. ``hit_rate``: of the experts demanded, the share that
    was in the compute tier or on its way there.
    """

    load_seconds: float
    prompt_tokens: int
    new_tokens: int
    first_token: float | None
    prefill: Phase
    decode: Phase
    hit_rate: float | None
    links: dict[str, LinkStats]
    experts: dict[str, TierStats]
    trunks: dict[str, TierStats]
    peak_ram: int
    plan: Plan
    device: str
    reader: str
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it, the derived rates and shares included, in plain types but for paths and keys."""
        found = asdict(self)
        for name, phase in (("prefill", self.prefill), ("decode", self.decode)):
            derived = ("rate", "compute", "stall_share", "overlap", "disk_bytes_per_token")
            found[name] |= {what: getattr(phase, what) for what in derived}
        return found


def collect(runtime: Runtime, counters: Counters) -> Stats:
    """A snapshot of a runtime and its counters."""
    compute = runtime.experts[0].stats
    return Stats(
        load_seconds=runtime.load_seconds,
        prompt_tokens=counters.prefill.tokens,
        new_tokens=counters.decode.tokens + counters.requests,
        first_token=counters.first_token,
        prefill=replace(counters.prefill),
        decode=replace(counters.decode),
        hit_rate=_ratio(compute.hits + compute.late_hits, compute.hits + compute.late_hits + compute.misses),
        links=runtime.transfer.busy(),
        experts={tier.name: replace(tier.stats) for tier in runtime.experts},
        trunks={tier.name: replace(tier.stats) for tier in runtime.trunk_tiers},
        peak_ram=peak_ram(),
        plan=runtime.plan,
        device=str(runtime.device),
        reader=runtime.reader.name,
        notes=tuple(runtime.notes),
    )


def _ratio(amount: float, over: float) -> float | None:
    return amount / over if over else None
