"""The share of a tier and of its link that reads without a waiting layer may use."""

from __future__ import annotations

import os


def prefetch_slots(slots: int) -> int:
    """Slots in which prefetches may displace warm records."""
    return slots // 8


def streaming_slots(slots: int) -> int:
    """Slots in which a prefill may displace warm records: at least two, to read one and compute with the other."""
    return max(2, slots // 8)


def spare_lanes(lanes: int) -> int:
    """Concurrent reads that are not demands. Few, to leave lanes to demands and memory bandwidth to the arithmetic."""
    return min(lanes, max(2, lanes // 4))


def touch_lanes() -> int:
    """Threads that populate memory on idle processors: a page fault takes one processor, and more than these wait for
    the system's locks."""
    return min(len(os.sched_getaffinity(0)), 8)
