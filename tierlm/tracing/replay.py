"""Hits and misses of a policy over a trace, exactly as the engine would count them; no time, no bytes."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tierlm.policies import make_policy
from tierlm.policies.belady import Belady
from tierlm.policies.eviction import Policy, TierInfo
from tierlm.policies.residency import Entry, Purpose, Residency
from tierlm.spec import ExpertKey
from tierlm.tracing import compiled
from tierlm.tracing.trace import Trace

Counts = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Replayed:
    """Counts of records: a step demands each expert of a layer once, however many of its tokens chose it."""

    demanded: int
    missed: int

    @property
    def hit_rate(self) -> float:
        return 1 - self.missed / self.demanded


@dataclass(frozen=True, eq=False)
class Misses:
    """``counts``: int32 [S, L], the records that each layer of each step missed. ``behind``: int32 [n], for each record
    that a prefill missed, in the order in which they are read, how many of its layer were released before it got a
    slot."""

    counts: Counts
    behind: Counts


def replay(trace: Trace, policy: Policy, slots: int, counted: npt.NDArray[np.bool_] | None = None) -> Replayed:
    """Run ``trace`` over ``slots`` empty slots under ``policy``, which is used up by it. ``counted``: [S] which steps
    are part of the result, by default all."""
    which = slice(None) if counted is None else counted
    missed = find_misses(trace, policy, slots).counts[which]
    return Replayed(int(trace.demands.counts[which].sum()), int(missed.sum()))


def find_misses(trace: Trace, policy: Policy, slots: int) -> Misses:
    """Run ``trace`` over ``slots`` empty slots under ``policy``, which is used up by it, or is run compiled.

    Each layer of a step pins what is there, in order of the experts' numbers, and starts the others: by number in a
    decode step, as they lie on the disk in a prefill. Where slots do not suffice, those go on that came first: the
    engine does just this with one transfer thread; with several, records of a prefill may come in another order.
    """
    places = disk_places(trace)
    if slots == policy.info.capacity and compiled.has_twin(policy):
        return Misses(*compiled.replay(policy, trace.demands, trace.info.experts, places))
    residency, keys = Residency[Entry](policy, [1] * slots, lambda key: 1), expert_keys(trace)
    counts, behind = array("i"), array("i")
    for step in trace.passes():
        for layer, needed in enumerate(step.needed):
            held: list[Entry] = []
            missing: list[ExpertKey] = []
            for key in [keys[layer][expert] for expert in needed]:
                if (entry := residency.demand(key, step.prefill)) is None:
                    missing.append(key)
                else:
                    held.append(entry)
            counts.append(len(missing))
            if step.prefill and places is not None:
                missing.sort(key=lambda key, place=places[layer]: place[key.expert])  # type: ignore[misc]
            before = _bring(residency, keys[layer][0].layer, held, missing, step.prefill)
            behind.extend(before if step.prefill else ())
    return Misses(np.array(counts, np.int32).reshape(-1, trace.moe_layers), np.array(behind, np.int32))


def _bring(
    residency: Residency[Entry], layer: int, held: list[Entry], missing: list[ExpertKey], prefill: bool
) -> list[int]:
    """Start all of ``missing``, and release everything: ``held`` first, then as they were started. By record, how many
    had been released before it got a slot."""
    batch = len(held) or 1  # a decode step computes all that are there in one go
    behind: list[int] = []
    released, wanted = 0, len(held) + len(missing)
    while True:
        while len(behind) < len(missing) and (entry := _start(residency, missing[len(behind)], prefill)) is not None:
            held.append(entry)
            behind.append(released)
        if len(behind) == len(missing):
            break
        if released == len(held):
            raise RuntimeError("no slot can be had: this is a bug in tierlm, or there are fewer than one slot")
        count = 1 if prefill or released else batch
        for entry in held[released : released + count]:
            residency.release(entry)
        released += count
    residency.end_turn(layer)
    for entry in held[released:wanted]:
        residency.release(entry)
    return behind


def _start(residency: Residency[Entry], key: ExpertKey, streaming: bool) -> Entry | None:
    """Bring ``key`` in at once, pinned. None: no slot can be had now."""
    placement = residency.find(key, Purpose.DEMAND, streaming)
    if placement is None:
        return None
    entry = Entry(key, placement.index, Purpose.DEMAND, streaming and placement.displaces)
    residency.admit(entry, placement)
    residency.arrived(entry)
    return entry


def tier_info_of(trace: Trace, slots: int) -> TierInfo:
    """What a policy would know of the tier."""
    size = trace.info.record_bytes or 1
    return TierInfo(trace.info.layers, slots, lambda key: size)


def open_policy(name: str, trace: Trace, slots: int, **parameters: float) -> Policy:
    """A policy for ``trace`` by the name that ``make_policy`` knows; "belady" is the oracle. Raises UsageError."""
    info = tier_info_of(trace, slots)
    if name != "belady":
        return make_policy(name, info, **parameters)
    keys = expert_keys(trace)
    passes = trace.passes()
    future = ([keys[layer][e] for e in ids] for step in passes for layer, ids in enumerate(step.needed))
    return Belady(info, future)


def expert_keys(trace: Trace) -> list[list[ExpertKey]]:
    """The keys of all records, by MoE layer and expert: made once, used a million times."""
    return [[ExpertKey(layer, expert) for expert in range(trace.info.experts)] for layer in trace.info.moe_layers]


def disk_places(trace: Trace) -> Counts | None:
    """int32 [L, experts], at which place of the disk an expert lies in its layer. None: by number."""
    return np.argsort(trace.info.order, axis=1).astype(np.int32) if trace.info.order else None
