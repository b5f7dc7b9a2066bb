"""The time of a run without prefetch: the disk idles when a layer begins, so a layer's time depends only on its own
hits and misses, and equal cases are computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tierlm.spec import ExpertKey
from tierlm.tracing.link import Link, Speed
from tierlm.tracing.replay import Misses
from tierlm.tracing.trace import Trace

AT_ONCE = Speed(math.inf, 0.0, 1)


@dataclass(frozen=True)
class Rates:
    """``record_bytes``: of an expert. ``layer_seconds``: computation of one token in a layer without routed experts;
    ``expert_seconds``: in one expert. ``further``: cost of each further token of a step, relative to the first.
    ``copy``: from a tier to the one above, by default instant."""

    record_bytes: int
    disk: Speed
    layer_seconds: float
    expert_seconds: float
    further: float = 0.5
    copy: Speed = AT_ONCE

    def layer(self, tokens: int) -> float:
        """Seconds of ``tokens`` in a layer before its experts."""
        return self.layer_seconds * (1 + (tokens - 1) * self.further)

    def expert(self, tokens: int, pairs: int, experts: int) -> float:
        """Mean seconds in one of ``experts``, for ``tokens`` with ``pairs`` (token, expert) pairs."""
        rows = 1.0 if tokens == 1 else pairs / max(1, experts)
        return self.expert_seconds * (1 + (rows - 1) * self.further)


@dataclass
class Elapsed:
    """Seconds of all steps, of decode steps, and of waits for the disk."""

    seconds: float = 0.0
    decode_seconds: float = 0.0
    stall_seconds: float = 0.0

    def add(self, prefill: bool, seconds: float, stalled: float = 0.0) -> None:
        self.seconds += seconds
        self.decode_seconds += 0.0 if prefill else seconds
        self.stall_seconds += stalled


def elapsed(trace: Trace, misses: Misses, machine: Rates) -> Elapsed:
    """The time of ``trace`` on ``machine``. All records of a decode step must fit in the slots at once."""
    found, demands = Elapsed(), trace.demands
    alone = (demands.tokens == 1) & ~demands.prefill
    needed, missed = demands.counts[alone], misses.counts[alone]
    width = int(needed.max(initial=0)) + 1
    times = np.bincount((needed * width + missed).ravel())  # of each (needed, missed)
    for case in np.flatnonzero(times).tolist():
        chosen, absent = divmod(case, width)
        seconds, stalled = wait(chosen - absent, [0] * absent, machine, machine.expert(1, chosen, chosen), False)
        found.add(False, times[case] * (machine.layer(1) + seconds), times[case] * stalled)
    bounds, at = list(trace.bounds()), 0  # index into misses.behind
    for step in np.flatnonzero(~alone).tolist():
        (start, stop), prefill = bounds[step], bool(demands.prefill[step])
        for layer in range(trace.moe_layers):
            chosen, absent = int(demands.counts[step, layer]), int(misses.counts[step, layer])
            behind = misses.behind[at : at + absent].tolist() if prefill else [0] * absent
            at += len(behind) * prefill
            pairs = int((trace.experts[start:stop, layer] >= 0).sum())
            expert = machine.expert(stop - start, pairs, chosen)
            seconds, stalled = wait(chosen - absent, behind, machine, expert, prefill)
            found.add(prefill, machine.layer(stop - start) + seconds, stalled)
    return found


def wait(resident: int, behind: Sequence[int], machine: Rates, expert: float, singly: bool) -> tuple[float, float]:
    """Seconds of a layer's experts, and the part of them spent waiting.

    ``resident``: records present at the start. ``behind``: for each of the others, in reading order, how many records
    were computed before it got a slot. A record takes ``expert`` seconds. Records that are ready are computed together,
    or ``singly``, which frees slots earlier.
    """
    link, now, stalled, there = Link(machine.disk, machine.record_bytes), 0.0, 0.0, resident
    keys = [ExpertKey(0, number) for number in range(len(behind))]
    computed = begun = 0
    while computed < resident + len(keys):
        while begun < len(keys) and behind[begun] <= computed:
            link.submit(keys[begun], now, prefetch=False)
            begun += 1
        there += len(link.arrived(now))
        if computed == there:
            arrival = link.wait(keys)
            now, stalled = arrival, stalled + arrival - now
            continue
        batch = 1 if singly else there - computed
        now, computed = now + expert * batch, computed + batch
    return now, stalled
