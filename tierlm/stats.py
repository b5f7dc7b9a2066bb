"""What a loaded model has done, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tierlm.analysis.machine import peak_ram
from tierlm.analysis.plan import Plan
from tierlm.memory.tiers import TierStats
from tierlm.memory.transfer import LinkStats
from tierlm.runtime import Runtime


@dataclass
class Counters:
    """Tokens, and seconds spent in the engine. A batched step counts once for each of its sequences' tokens."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    decoded_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token: float | None = None

    def count(self, seconds: float, *, decoded: bool) -> None:
        self.new_tokens += 1
        if decoded:
            self.decoded_tokens += 1
            self.decode_seconds += seconds
        else:
            self.prefill_seconds += seconds


@dataclass(frozen=True)
class Stats:
    """What has happened since the model was loaded. Sizes in bytes, times in seconds, rates in tokens a second.

    ``first_token``: from the last request to its first token. ``stall``: while computation waited for a transfer.
    ``links``: bytes moved and seconds busy on each link. ``experts`` and ``trunks``: records by tier, the compute tier
    first; demands for one that is not there go on to the next. ``hit_rate``: of the experts demanded, the share that
    was in the compute tier or on its way there. ``disk_bytes_per_token``: over prompt and new tokens.
    """

    load_seconds: float
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    first_token: float | None
    prefill_rate: float | None
    decode_rate: float | None
    hit_rate: float | None
    disk_bytes_per_token: float | None
    stall: float
    links: dict[str, LinkStats]
    experts: dict[str, TierStats]
    trunks: dict[str, TierStats]
    peak_ram: int
    plan: Plan
    device: str
    reader: str
    notes: tuple[str, ...]


def collect(runtime: Runtime, counters: Counters) -> Stats:
    """A snapshot of a runtime and its counters."""
    compute = runtime.experts[0].stats
    demanded = compute.hits + compute.late_hits + compute.misses
    links = runtime.transfer.busy()
    tokens = counters.prompt_tokens + counters.new_tokens
    read = links["disk->ram"].bytes - runtime.loaded_bytes
    return Stats(
        load_seconds=runtime.load_seconds,
        prompt_tokens=counters.prompt_tokens,
        new_tokens=counters.new_tokens,
        prefill_seconds=counters.prefill_seconds,
        decode_seconds=counters.decode_seconds,
        first_token=counters.first_token,
        prefill_rate=_rate(counters.prompt_tokens, counters.prefill_seconds),
        decode_rate=_rate(counters.decoded_tokens, counters.decode_seconds),
        hit_rate=_rate(compute.hits + compute.late_hits, demanded),
        disk_bytes_per_token=_rate(read, tokens),
        stall=runtime.store.stall + runtime.trunks.stall,
        links=links,
        experts={tier.name: replace(tier.stats) for tier in runtime.experts},
        trunks={tier.name: replace(tier.stats) for tier in runtime.trunk_tiers},
        peak_ram=peak_ram(),
        plan=runtime.plan,
        device=str(runtime.device),
        reader=runtime.reader.name,
        notes=tuple(runtime.notes),
    )


def _rate(amount: float, over: float) -> float | None:
    return amount / over if over else None
