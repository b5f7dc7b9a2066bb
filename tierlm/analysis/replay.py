"""Hits and misses of a policy over a trace, exactly as the engine would count them; no time, no bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tierlm.analysis.residency import Residency
from tierlm.analysis.trace import Step, Trace
from tierlm.policies import make_policy
from tierlm.policies.belady import Belady
from tierlm.policies.eviction import Policy, Setting
from tierlm.spec import ExpertKey


@dataclass(frozen=True)
class Replayed:
    """Counts of records: a step demands each expert of a layer once, however many of its tokens chose it."""

    demanded: int
    missed: int

    @property
    def hit_rate(self) -> float:
        return 1 - self.missed / self.demanded


def replay(
    trace: Trace, policy: Policy, slots: int, counts: Callable[[int, Step], bool] = lambda number, step: True
) -> Replayed:
    """Run ``trace`` over ``slots`` empty slots under ``policy``, which is used up by it. ``counts``: whether a step,
    by its number from 0, is part of the result.

    Each layer of a step pins what is there, in order of the experts' numbers, and starts the others: by number in a
    decode step, as they lie on the disk in a prefill. Where slots do not suffice, those go on that came first: the
    engine does just this with one transfer thread; with several, records of a prefill may come in another order.
    """
    residency = Residency(policy, slots)
    keys, places = expert_keys(trace), disk_places(trace)
    demanded = missed = 0
    for number, step in enumerate(trace.passes()):
        counted = counts(number, step)
        for layer, needed in enumerate(step.needed):
            wanted = [keys[layer][expert] for expert in needed]
            missing = [key for key in wanted if not residency.demand(key, step.prefill)]
            demanded += counted * len(wanted)
            missed += counted * len(missing)
            if step.prefill and places is not None:
                missing.sort(key=lambda key, place=places[layer]: place[key.expert])  # type: ignore[misc]
            if step.prefill or len(wanted) > slots:
                _bring(residency, wanted, missing, step.prefill)
                continue
            for key in missing:
                residency.start(key, passing=False)
            residency.release_all()
    return Replayed(demanded, missed)


def _bring(residency: Residency, wanted: list[ExpertKey], missing: list[ExpertKey], prefill: bool) -> None:
    """Start all of ``missing``, and release everything: those that are there first, then as they were started."""
    absent = set(missing)
    held = [key for key in wanted if key not in absent]
    batch = len(held) or 1  # a decode step computes all that are there in one go
    released = started = 0
    while released < len(wanted):
        while started < len(missing) and residency.start(missing[started], prefill):
            held.append(missing[started])
            started += 1
        if released == len(held):
            raise RuntimeError("no slot can be had: a bug of tierlm, or fewer than one slot")
        count = 1 if prefill or released else batch
        for key in held[released : released + count]:
            residency.release(key)
        released += count


def setting_of(trace: Trace, slots: int) -> Setting:
    """What a policy would know of the tier."""
    size = trace.info.record_bytes or 1
    return Setting(trace.info.layers, slots, lambda key: size)


def open_policy(name: str, trace: Trace, slots: int, **parameters: float) -> Policy:
    """A policy for ``trace`` by the name that ``make_policy`` knows; "belady" is the oracle. Raises UsageError."""
    setting = setting_of(trace, slots)
    if name != "belady":
        return make_policy(name, setting, **parameters)
    keys = expert_keys(trace)
    passes = trace.passes()
    future = ([keys[layer][e] for e in ids] for step in passes for layer, ids in enumerate(step.needed))
    return Belady(setting, future)


def expert_keys(trace: Trace) -> list[list[ExpertKey]]:
    """The keys of all records, by MoE layer and expert: made once, used a million times."""
    first = trace.info.first_layer
    return [[ExpertKey(first + i, expert) for expert in range(trace.info.experts)] for i in range(trace.moe_layers)]


def disk_places(trace: Trace) -> list[dict[int, int]] | None:
    """By MoE layer, at which place of the disk an expert lies. None: by number."""
    return [{expert: place for place, expert in enumerate(row)} for row in trace.info.order] or None
