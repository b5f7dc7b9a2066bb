"""Statistics as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from tierlm.cli.output import pairs
from tierlm.config import format_size

if TYPE_CHECKING:
    from tierlm.engine.counters import Phase
    from tierlm.policies.residency import TierStats
    from tierlm.stats import Stats


def table(stats: Stats) -> Table:
    """The table that ``--stats`` prints."""
    rows = {
        "load": f"{stats.load_seconds:.2f} s",
        "first token after": f"{_number(stats.first_token)} s",
        "prefill": _phase(stats.prefill),
        "decode": _phase(stats.decode),
        "expert hit rate": "-" if stats.hit_rate is None else f"{stats.hit_rate:.1%}",
    }
    for name, link in stats.links.items():
        speed = link.bytes / link.seconds / 1e9 if link.seconds else 0.0
        rows[name] = f"{format_size(link.bytes)} at {speed:.2f} GB/s while busy"
    plans = {"ram": stats.plan.ram, "vram": stats.plan.vram}
    for name, tier in stats.experts.items():
        plan = plans[name]
        rows[f"experts in {name}"] = f"{plan.expert_slots if plan else 0} slots: {_tier(tier)}"
    for name, plan in plans.items():
        if plan is not None:
            used = ", ".join(f"{what} {format_size(size)}" for what, size in plan.parts.items() if size)
            rows[f"{name} plan"] = f"{used}; floor {format_size(plan.floor)}"
    rows["peak of the process"] = format_size(stats.peak_ram)
    return pairs([*rows.items(), *(("note", note) for note in stats.notes)], "what it took")


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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
