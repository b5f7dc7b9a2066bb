"""Hits and misses of a policy over a trace, exactly as the engine counts them; no time, no bytes."""

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
    """Counts of records: a step demands each expert of a layer once, however many of its tokens use it."""

    demanded: int
    missed: int

    @property
    def hit_rate(self) -> float:
        return 1 - self.missed / self.demanded


@dataclass(frozen=True, eq=False)
class Misses:
    """``counts``: int32 [S, L], records that each layer of each step missed. ``behind``: int32 [n], for each record
    that a prefill missed, in reading order, how many records of its layer were released before it got a slot."""

    counts: Counts
    behind: Counts


def replay(trace: Trace, policy: Policy, slots: int, counted: npt.NDArray[np.bool_] | None = None) -> Replayed:
    """Run ``trace`` over ``slots`` empty slots under the new ``policy``. ``counted``: [S] the steps that count, by
    default all."""
    which = slice(None) if counted is None else counted
    missed = find_misses(trace, policy, slots).counts[which]
    return Replayed(int(trace.demands.counts[which].sum()), int(missed.sum()))


def find_misses(trace: Trace, policy: Policy, slots: int) -> Misses:
    """Run ``trace`` over ``slots`` empty slots under the new ``policy``, compiled where possible.

    Each layer of a step pins the resident records by expert number, then starts the others: by number in a decode step,
    in disk order in a prefill. If slots run out, records are released in order of arrival. This is the engine with one
    transfer thread; with several, records of a prefill may arrive in another order.
    """
    places = disk_places(trace)
    if slots == policy.info.capacity and compiled.has_twin(policy):
        return Misses(*compiled.replay(policy, trace.demands, trace.info.experts, places))
    residency, keys = Residency[Entry](policy, [1] * slots, lambda key: 1), expert_keys(trace)
    counts, behind = array("i"), array("i")
    for step in trace.passes():
        for layer, needed in enumerate(step.needed):
            leased: list[Entry] = []
            missing: list[ExpertKey] = []
            for key in [keys[layer][expert] for expert in needed]:
                if (entry := residency.demand(key, step.prefill)) is None:
                    missing.append(key)
                else:
                    leased.append(entry)
            counts.append(len(missing))
            if step.prefill and places is not None:
                missing.sort(key=lambda key, place=places[layer]: place[key.expert])  # type: ignore[misc]
            before = _bring(residency, keys[layer][0].layer, leased, missing, step.prefill)
            behind.extend(before if step.prefill else ())
    return Misses(np.array(counts, np.int32).reshape(-1, trace.moe_layers), np.array(behind, np.int32))


def _bring(
    residency: Residency[Entry], layer: int, leased: list[Entry], missing: list[ExpertKey], prefill: bool
) -> list[int]:
    """Start all of ``missing`` and release everything: ``leased`` first, then in starting order. Returns, for each
    missing record, how many were released before it got a slot."""
    batch = len(leased) or 1  # a decode step computes all resident records together
    behind: list[int] = []
    released, wanted = 0, len(leased) + len(missing)
    while True:
        while len(behind) < len(missing) and (entry := _start(residency, missing[len(behind)], prefill)) is not None:
            leased.append(entry)
            behind.append(released)
        if len(behind) == len(missing):
            break
        if released == len(leased):
            raise RuntimeError("no slot is available: this is a bug in tierlm, or the tier has no slots")
        count = 1 if prefill or released else batch
        for entry in leased[released : released + count]:
            residency.release(entry)
        released += count
    residency.end_turn(layer)
    for entry in leased[released:wanted]:
        residency.release(entry)
    return behind


def _start(residency: Residency[Entry], key: ExpertKey, streaming: bool) -> Entry | None:
    """Bring ``key`` in at once, pinned. None: no slot is available now."""
    placement = residency.find(key, Purpose.DEMAND, streaming)
    if placement is None:
        return None
    entry = Entry(key, placement.index, Purpose.DEMAND, streaming and placement.displaces)
    residency.admit(entry, placement)
    residency.arrived(entry)
    return entry


def open_policy(name: str, trace: Trace, slots: int, **parameters: float) -> Policy:
    """A policy for ``trace`` by a name of ``make_policy`` or "belady", the oracle. Raises UsageError."""
    size = trace.info.record_bytes or 1
    info = TierInfo(trace.info.layers, slots, lambda key: size)
    if name != "belady":
        return make_policy(name, info, **parameters)
    keys, passes = expert_keys(trace), trace.passes()
    return Belady(info, ([keys[at][e] for e in ids] for step in passes for at, ids in enumerate(step.needed)))


def expert_keys(trace: Trace) -> list[list[ExpertKey]]:
    """The keys of all records, by MoE layer and expert."""
    return [[ExpertKey(layer, expert) for expert in range(trace.info.experts)] for layer in trace.info.moe_layers]


def disk_places(trace: Trace) -> Counts | None:
    """int32 [L, experts], the place of an expert on the disk within its layer. None: ordered by number."""
    return np.argsort(trace.info.order, axis=1).astype(np.int32) if trace.info.order else None
