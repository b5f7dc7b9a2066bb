"""Statistics of a loaded model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from tierlm.engine.counters import Phase, ratio
from tierlm.host import peak_ram
from tierlm.memory.executor import LinkStats
from tierlm.planning.plan import Plan
from tierlm.policies.residency import TierStats
from tierlm.runtime import Runtime


@dataclass(frozen=True)
class Stats:
    """Statistics since the model was loaded. Sizes in bytes, times in seconds, rates in tokens per second.

    ``prefill`` counts prompt tokens; ``decode`` counts new tokens except each prompt's first, which prefill makes.
    ``first_token``: from the latest prompt to its first token. ``links``: bytes moved and seconds busy by link,
    including loading and warm-up. ``experts`` and ``trunks``: records by tier, the compute tier first; a miss is
    demanded from the next tier. ``hit_rate``: share of demanded experts resident in or in flight to the compute tier.
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
        """All fields and derived rates and shares, in plain types except paths and keys."""
        found = asdict(self)
        for name, phase in (("prefill", self.prefill), ("decode", self.decode)):
            derived = ("rate", "compute", "stall_share", "overlap", "disk_bytes_per_token")
            found[name] |= {what: getattr(phase, what) for what in derived}
        return found


def collect(runtime: Runtime) -> Stats:
    """A snapshot of a runtime."""
    compute, counters = runtime.experts[0].stats, runtime.scheduler.counters
    return Stats(
        load_seconds=runtime.load_seconds,
        prompt_tokens=counters.prefill.tokens,
        new_tokens=counters.decode.tokens + counters.first_tokens,
        first_token=counters.first_token,
        prefill=replace(counters.prefill),
        decode=replace(counters.decode),
        hit_rate=ratio(compute.hits + compute.late_hits, compute.hits + compute.late_hits + compute.misses),
        links=runtime.transfer.busy(),
        experts={tier.name: replace(tier.stats) for tier in runtime.experts},
        trunks={tier.name: replace(tier.stats) for tier in runtime.trunk_tiers},
        peak_ram=peak_ram(),
        plan=runtime.plan,
        device=str(runtime.device),
        reader=runtime.reader.name,
        notes=tuple(runtime.notes),
    )
