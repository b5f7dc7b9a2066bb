"""How much of a tier, and of its link, serves what no layer waits for."""

from __future__ import annotations


def prefetch_slots(slots: int) -> int:
    """Slots, of all, in which prefetches may displace warm records."""
    return slots // 8


def streaming_slots(slots: int) -> int:
    """Slots in which a prefill may: one is read while the other is computed."""
    return max(2, slots // 8)


def spare_lanes(lanes: int) -> int:
    """Reads at a time that are not demands: a demand finds most lanes free, the arithmetic most of the memory's
    bandwidth."""
    return min(lanes, max(2, lanes // 4))
