"""Statistics of a loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from tierlm.config import format_size
from tierlm.engine.counters import Drafts, Phase, ratio
from tierlm.host import peak_ram
from tierlm.memory.executor import LinkStats
from tierlm.memory.kvdisk import KvTier
from tierlm.planning.plan import Plan
from tierlm.policies.residency import TierStats
from tierlm.runtime import Runtime
from tierlm.table import Table


@dataclass(frozen=True, repr=False)
class Stats(Table):
    """Statistics since the model was loaded. Sizes in bytes, times in seconds, rates in tokens per second.

    ``prefill`` counts prompt tokens; ``decode`` counts new tokens except each prompt's first, which prefill makes.
    ``first_token``: from the latest prompt to its first token. ``links``: bytes moved and seconds busy by link,
    including loading and warm-up. ``experts`` and ``trunks``: records by tier, the compute tier first; a miss is
    demanded from the next tier. ``hit_rate``: share of demanded experts resident in or in flight to the compute tier.
    ``preempted``: how often a sequence gave way to another for lack of room in the KV cache.
    ``kv``: KV values by tier, "ram" and, with ``kv_disk``, "disk".
    ``drafts``: of speculative decoding.
    ``arrived``: bytes of weights that are here, and all, of a model that was loaded while it arrived from the Hub.
    """

    load_seconds: float
    prompt_tokens: int
    new_tokens: int
    first_token: float | None
    prefill: Phase
    decode: Phase
    drafts: Drafts
    hit_rate: float | None
    preempted: int
    links: dict[str, LinkStats]
    experts: dict[str, TierStats]
    trunks: dict[str, TierStats]
    kv: dict[str, KvTier]
    peak_ram: int
    plan: Plan
    device: str
    reader: str
    arrived: tuple[int, int] | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """All fields and derived rates and shares, in plain types except paths and keys."""
        found = asdict(self)
        for name, phase in (("prefill", self.prefill), ("decode", self.decode)):
            derived = ("rate", "compute", "stall_share", "overlap", "disk_bytes_per_token")
            found[name] |= {what: getattr(phase, what) for what in derived}
        found["drafts"] |= {what: getattr(self.drafts, what) for what in ("acceptance", "tokens_per_step")}
        return found

    def rows(self) -> Iterator[tuple[str, str]]:
        """The table that ``--stats`` prints."""
        yield "load", f"{self.load_seconds:.2f} s"
        yield "first token after", f"{_number(self.first_token)} s"
        yield "prefill", _phase(self.prefill)
        yield "decode", _phase(self.decode)
        if self.preempted:
            yield "gave way", f"{self.preempted} times a sequence, for lack of room in the KV cache"
        if (drafts := self.drafts).drafted:
            share, tokens = drafts.acceptance or 0.0, _number(drafts.tokens_per_step)
            yield "speculation", f"{drafts.drafted} drafts, {share:.0%} accepted; {tokens} tokens a step"
        yield "expert hit rate", "-" if self.hit_rate is None else f"{self.hit_rate:.1%}"
        for name, link in self.links.items():
            speed = link.bytes / link.seconds / 1e9 if link.seconds else 0.0
            yield name, f"{format_size(link.bytes)} at {speed:.2f} GB/s while busy"
        for name, tier in self.experts.items():
            yield f"experts in {name}", _tier(tier)
        for name, kept in self.kv.items():
            yield f"KV values in {name}", _kv(kept)
        for name, value in self.plan.rows():
            yield name and f"{name} plan", value
        yield "peak of the process", format_size(self.peak_ram)
        if self.arrived is not None:
            yield "weights from the Hub", "{} of {} are here".format(*map(format_size, self.arrived))
        for note in self.notes:
            yield "note", note


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
        drafts=replace(counters.drafts),
        hit_rate=ratio(compute.hits + compute.late_hits, compute.hits + compute.late_hits + compute.misses),
        preempted=counters.preempted,
        links=runtime.transfer.busy(),
        experts={tier.name: replace(tier.stats) for tier in runtime.experts},
        trunks={tier.name: replace(tier.stats) for tier in runtime.trunk_tiers},
        kv=runtime.scheduler.kv_tiers(),
        peak_ram=peak_ram(),
        plan=runtime.plan,
        device=str(runtime.device),
        reader=runtime.reader.name,
        arrived=runtime.reader.arrived,
        notes=tuple(runtime.notes),
    )


def _phase(phase: Phase) -> str:
    if not phase.seconds:
        return "-"
    read = format_size(phase.disk_bytes_per_token or 0)
    return (
        f"{phase.tokens} tokens at {_number(phase.rate)} tokens/s; {read} a token from disk; computed "
        f"{phase.compute / phase.seconds:.0%}, waited {phase.stall / phase.seconds:.0%} of {phase.seconds:.2f} s; disk "
        f"busy {phase.reading / phase.seconds:.0%}; overlap {_number(phase.overlap)}"
    )


def _tier(tier: TierStats) -> str:
    return (
        f"{tier.hits} hits, {tier.late_hits} late hits, {tier.misses} misses; {tier.prefetched} prefetched: "
        f"{tier.useful} useful, {tier.wasted} wasted, {tier.cancelled} cancelled; {tier.warmed} by warm-up"
    )


def _kv(tier: KvTier) -> str:
    counted = {"stored": tier.stored, "evicted": tier.evicted, "dropped": tier.dropped}
    counted |= {"damaged": tier.damaged, "computed instead": tier.skipped}
    more = "".join(f", {count} {what}" for what, count in counted.items() if count)
    return f"{tier.tokens} tokens; {tier.hit_tokens} found by prompts, {format_size(tier.hit_bytes)}{more}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
