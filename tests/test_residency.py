"""Residency alone: any events in any order keep its integrity; each step of a placement."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm.policies import make_policy
from tierlm.policies.eviction import TierInfo
from tierlm.policies.residency import Entry, EntryState, Placement, Purpose, Residency
from tierlm.spec import ExpertKey, Key

LAYERS, EXPERTS = 3, 6
keys = st.builds(ExpertKey, st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))
VERBS = ["demand", "arrive", "fail", "cancel", "release", "lend", "copied", "keep", "stale", "end", "shrink"]
VERBS += ["start"] * 6
events = st.tuples(st.sampled_from(VERBS), keys, st.sampled_from(Purpose), st.booleans())


def size_of(key: Key) -> int:
    """Records of layer 0 are larger."""
    return 2 if key.layer == 0 else 1


def make(sizes: list[int], policy: str = "lru") -> Residency[Entry]:
    return Residency(make_policy(policy, TierInfo(LAYERS, len(sizes))), sizes, size_of)


def bring(residency: Residency[Entry], key: Key, purpose: Purpose, streaming: bool = False) -> Entry | None:
    placement = residency.find(key, purpose, streaming)
    if placement is None:
        return None
    entry = Entry(key, placement.index, purpose, streaming and placement.displaces)
    if placement.cancels:
        assert placement.victim is not None
        residency.cancel(placement.victim)
        placement = Placement(placement.index)
    residency.admit(entry, placement)
    return entry


def resident(residency: Residency[Entry], key: Key, purpose: Purpose = Purpose.DEMAND) -> Entry:
    entry = bring(residency, key, purpose)
    assert entry is not None
    residency.arrived(entry)
    if purpose is Purpose.DEMAND:
        residency.release(entry)
    return entry


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=10),
    policy=st.sampled_from(["lru", "echo", "s3-fifo", "cycle"]),
    events=st.lists(events, min_size=10, max_size=100),
)
def test_any_events_leave_it_whole(sizes: list[int], policy: str, events: list[Any]) -> None:
    residency = make(sizes, policy)
    failed: list[Entry] = []
    lent: list[Entry] = []
    leased: list[Entry] = []
    for verb, key, purpose, flag in events:
        here, loading = list(residency.entries.values()), list(residency.loading.values())
        which = key.layer * EXPERTS + key.expert  # of those there are
        if verb == "demand" and here:
            entry = residency.demand(here[which % len(here)].key, flag)
            assert entry is not None and entry.pins
            leased.append(entry)
        elif verb == "start" and key not in residency.entries:
            started = bring(residency, key, purpose, flag)
            if started is not None and purpose is Purpose.DEMAND:
                leased.append(started)
        elif verb == "arrive":
            for entry in loading:
                residency.arrived(entry)
        elif verb == "fail" and loading:
            failed.append(loading[which % len(loading)])
            residency.discard(failed[-1])
        elif verb == "cancel":
            for entry in [entry for entry in loading if not entry.pins and entry.purpose is not Purpose.DEMAND]:
                residency.cancel(entry)
        elif verb == "release":
            while leased:
                residency.release(leased.pop())
        elif verb == "lend" and here:
            lent.append(here[which % len(here)])
            residency.lend(lent[-1])
        elif verb == "copied":
            while lent:
                residency.copied(lent.pop(0))
        elif verb == "keep":
            residency.keep(key)
        elif verb == "stale":
            residency.protect(key.layer, [key] if flag else [])
            for other in residency.stale(key.layer, {key}):
                residency.waste(other)
        elif verb == "end":
            residency.end_turn(key.layer)
        elif verb == "shrink" and flag and residency.slots > 1 and residency.free:
            residency.retire(residency.free[0])
        elif verb == "shrink" and residency.retired:
            residency.restore()
        residency.check_integrity()
        for pinned in (*leased, *lent):
            assert pinned in failed or residency.entries.get(pinned.key) is pinned, "a pinned record has left"
    stats = residency.stats
    assert stats.useful + stats.wasted + stats.cancelled + len(residency.prefetched) <= stats.prefetched


def test_the_smallest_slot_that_fits_is_taken() -> None:
    residency = make([3, 1, 2])
    assert residency.find(ExpertKey(1, 0), Purpose.DEMAND, False) == Placement(1)
    assert residency.find(ExpertKey(0, 0), Purpose.DEMAND, False) == Placement(2)


def test_a_warm_up_that_has_begun_is_not_given_up() -> None:
    residency = make([1, 1])
    entries = [bring(residency, ExpertKey(1, expert), Purpose.WARM_UP) for expert in range(2)]
    first, second = entries
    assert first is not None and second is not None
    assert residency.find(ExpertKey(2, 0), Purpose.WARM_UP, False) is None
    assert residency.find(ExpertKey(2, 0), Purpose.DEMAND, False) == Placement(second.index, second, cancels=True)
    residency.begun(second)
    assert residency.find(ExpertKey(2, 0), Purpose.DEMAND, False) == Placement(first.index, first, cancels=True)
    residency.demand(first.key, False)
    assert residency.find(ExpertKey(2, 0), Purpose.DEMAND, False) is None


def test_a_wrong_prediction_leaves_before_the_policys_victim() -> None:
    residency = make([1] * 16)
    for expert in range(15):
        resident(residency, ExpertKey(1, expert))
    wrong = resident(residency, ExpertKey(2, 0), Purpose.PREFETCH)
    (stale,) = residency.stale(2, set())
    residency.waste(stale)
    assert residency.find(ExpertKey(2, 1), Purpose.DEMAND, False) == Placement(wrong.index, wrong)
    assert (residency.stats.wasted, residency.stats.useful) == (1, 0)


def test_a_prefetch_spares_its_own_layer_and_what_is_protected() -> None:
    residency = make([1] * 8)
    for expert in range(8):
        resident(residency, ExpertKey(1 if expert < 4 else 2, expert))
    found = residency.find(ExpertKey(1, 9), Purpose.PREFETCH, False)
    assert found is not None and found.victim is not None and found.victim.key == ExpertKey(2, 4) and found.displaces
    residency.protect(2, [ExpertKey(2, expert) for expert in range(4, 8)])
    assert residency.find(ExpertKey(1, 9), Purpose.PREFETCH, False) is None
    residency.protect(1, [ExpertKey(1, expert) for expert in range(4)])
    taken = residency.find(ExpertKey(1, 9), Purpose.DEMAND, False)
    assert taken is not None and taken.victim is not None and taken.victim.key == ExpertKey(1, 0)  # rather than none


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: r.free.append(0), "slots lost or given twice"),
        (lambda r: r.loading.update(r.entries), "loading"),
        (lambda r: r.prefetched.update(r.entries), "prefetched"),
        (lambda r: r.leaving.update({ExpertKey(2, 5): None}), "absent record is to leave"),
        (lambda r: r.policy.on_evict(ExpertKey(1, 0)), "policy has lost track"),
        (lambda r: setattr(r, "_streaming", 1), "streaming"),
        (lambda r: setattr(r.entries[ExpertKey(1, 0)], "pins", -1), "pins"),
        (lambda r: setattr(r.entries[ExpertKey(1, 0)], "state", EntryState.GONE), "gone"),
        (lambda r: r.sizes.__setitem__(0, 0), "larger than its slot"),
    ],
)
def test_what_is_broken_is_told(broken: Any, message: str) -> None:
    residency = make([1, 2])
    resident(residency, ExpertKey(1, 0))
    residency.check_integrity()
    broken(residency)
    with pytest.raises(AssertionError, match=message):
        residency.check_integrity()
