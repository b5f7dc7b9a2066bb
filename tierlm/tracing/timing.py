"""How long a run takes in which nothing is prefetched: the disk idles when a layer begins, so that what a layer takes
follows from its own hits and misses, and the same case takes the same time again."""

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
    """``record_bytes``: of an expert. ``layer_seconds``: what one token computes in a layer apart from routed experts;
    ``expert_seconds``: in one expert. ``further``: what each further token of a step costs, as a share of the first.
    ``copy``: from a tier to the one above; by default it takes no time."""

    record_bytes: int
    disk: Speed
    layer_seconds: float
    expert_seconds: float
    further: float = 0.5
    copy: Speed = AT_ONCE

    def layer(self, tokens: int) -> float:
        """Seconds that ``tokens`` compute in a layer before its experts."""
        return self.layer_seconds * (1 + (tokens - 1) * self.further)

    def expert(self, tokens: int, pairs: int, experts: int) -> float:
        """Seconds in one expert, on average, where ``tokens`` have made ``pairs`` choices among ``experts``."""
        rows = 1.0 if tokens == 1 else pairs / max(1, experts)
        return self.expert_seconds * (1 + (rows - 1) * self.further)


@dataclass
class Elapsed:
    """Seconds: of all steps, of the decode steps, and of waiting for the disk."""

    seconds: float = 0.0
    decode: float = 0.0
    stalled: float = 0.0

    def add(self, prefill: bool, seconds: float, stalled: float = 0.0) -> None:
        self.seconds += seconds
        self.decode += 0.0 if prefill else seconds
        self.stalled += stalled


def elapsed(trace: Trace, misses: Misses, machine: Rates) -> Elapsed:
    """What ``trace`` takes on ``machine``. A decode step's records must all have had slots at once."""
    found, demands = Elapsed(), trace.demands
    alone = (demands.tokens == 1) & ~demands.prefill
    needed, missed = demands.counts[alone], misses.counts[alone]
    width = int(needed.max(initial=0)) + 1
    times = np.bincount((needed * width + missed).ravel())  # of each pair
    for case in np.flatnonzero(times).tolist():
        chosen, absent = divmod(case, width)
        seconds, stalled = wait(chosen - absent, [0] * absent, machine, machine.expert(1, chosen, chosen), False)
        found.add(False, times[case] * (machine.layer(1) + seconds), times[case] * stalled)
    bounds, at = list(trace.bounds()), 0  # in misses.behind
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


def wait(held: int, behind: Sequence[int], machine: Rates, expert: float, singly: bool) -> tuple[float, float]:
    """Seconds of a layer's experts, and those of them in which it waits.

    ``held`` records are there; of each of the others, in the order in which they are read, ``behind`` says how many
    were through before it got a slot. A record takes ``expert`` seconds; those that are there are computed together,
    or ``singly``, which frees slots earlier.
    """
    link, now, stalled, there = Link(machine.disk, machine.record_bytes), 0.0, 0.0, held
    keys = [ExpertKey(0, number) for number in range(len(behind))]
    through = begun = 0
    while through < held + len(keys):
        while begun < len(keys) and behind[begun] <= through:
            link.submit(keys[begun], now, prefetch=False)
            begun += 1
        there += len(link.arrived(now))
        if through == there:
            arrival = link.wait(keys)
            now, stalled = arrival, stalled + arrival - now
            continue
        batch = 1 if singly else there - through
        now, through = now + expert * batch, through + batch
    return now, stalled
