"""Statistics as a table for people."""

from __future__ import annotations

from rich.table import Table

from tierlm.config import format_size
from tierlm.policies.residency import TierStats
from tierlm.stats import Phase, Stats


def table(stats: Stats) -> Table:
    """What ``--stats`` prints."""
    made = Table(show_header=False, title="what it took", title_justify="left", box=None)
    rows = [
        ("load", f"{stats.load_seconds:.2f} s"),
        ("first token after", f"{_number(stats.first_token)} s"),
        ("prefill", _phase(stats.prefill)),
        ("decode", _phase(stats.decode)),
        ("expert hit rate", "-" if stats.hit_rate is None else f"{stats.hit_rate:.1%}"),
    ]
    for name, link in stats.links.items():
        speed = link.bytes / link.seconds / 1e9 if link.seconds else 0.0
        rows.append((name, f"{format_size(link.bytes)} at {speed:.2f} GB/s while busy"))
    for name, tier in stats.experts.items():
        plan = stats.plan.ram if name == "ram" else stats.plan.vram
        rows.append((f"experts in {name}", f"{plan.expert_slots if plan else 0} slots: {_tier(tier)}"))
    for name, part in (("ram", stats.plan.ram), ("vram", stats.plan.vram)):
        if part is not None:
            used = ", ".join(f"{what} {format_size(size)}" for what, size in part.parts.items() if size)
            rows.append((f"{name} plan", f"{used}; floor {format_size(part.floor)}"))
    rows.append(("peak of the process", format_size(stats.peak_ram)))
    rows += [("note", note) for note in stats.notes]
    for row in rows:
        made.add_row(*row)
    return made


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
        f"{tier.hits} hits, {tier.late_hits} late, {tier.misses} misses; guessed {tier.prefetched}: {tier.useful} "
        f"useful, {tier.wasted} wasted, {tier.cancelled} cancelled; {tier.warmed} in the background"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
