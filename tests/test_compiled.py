"""The compiled replay decides as the classes of tierlm.policies do, request for request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_traces import traces

from tierlm.policies import POLICIES
from tierlm.policies.eviction import Policy, TierInfo
from tierlm.policies.recency import Lru
from tierlm.tracing import compiled
from tierlm.tracing.replay import disk_places, find_misses, open_policy, replay
from tierlm.tracing.trace import Trace, TraceInfo
from tierlm.tracing.traceforms import read_trace

DEMO = Path(__file__).parent.parent / "bench" / "traces" / "demo.npz"
TWINS = list(compiled.NAMES.values())
PARAMETERS: dict[str, dict[str, list[float]]] = {
    "clock": {"lives": [2, 3]},
    "2q": {"share": [0.05, 0.5], "ghosts": [0.25, 3.0]},
    "s3-fifo": {"share": [0.02, 0.5], "ghosts": [0.25, 3.0], "uses": [1, 3]},
    "lru-k": {"k": [1, 3]},
}

pytestmark = pytest.mark.skipif(compiled.load() is None, reason="needs the compiled replay: a C++ compiler at install")


def without_twin(policy: Policy) -> Policy:
    """The same policy as a new class, which has no twin."""
    policy.__class__ = type("Own", (type(policy),), {})
    assert not compiled.has_twin(policy)
    return policy


def same(trace: Trace, name: str, slots: int, **parameters: float) -> None:
    assert compiled.has_twin(open_policy(name, trace, slots, **parameters))
    found = find_misses(trace, open_policy(name, trace, slots, **parameters), slots)
    expected = find_misses(trace, without_twin(open_policy(name, trace, slots, **parameters)), slots)
    assert found.counts.tolist() == expected.counts.tolist()
    assert found.behind.tolist() == expected.behind.tolist()


@pytest.mark.parametrize("name", TWINS)
@settings(deadline=None, derandomize=True, max_examples=80)
@given(trace=traces(), data=st.data())
def test_a_twin_misses_what_the_policy_misses(name: str, trace: Trace, data: st.DataObject) -> None:
    """Layer by layer of each step, with any number of slots; a step may need more."""
    slots = data.draw(st.integers(1, trace.records + 2))
    chosen = {key: data.draw(st.sampled_from(values)) for key, values in PARAMETERS.get(name, {}).items()}
    same(trace, name, slots, **chosen if data.draw(st.booleans()) else {})


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("slots", [10, 40, 120])
def test_a_twin_misses_what_the_policy_misses_of_the_demos_trace(name: str, slots: int) -> None:
    same(read_trace(DEMO), name, slots)


def test_one_record_at_a_time_is_each_request() -> None:
    """A trace of one layer and one choice: the counts are each request's hit or miss."""
    chance = np.random.default_rng(0)
    ids = np.minimum(chance.geometric(0.05, (2000, 1, 1)) - 1, 59).astype(np.int16)
    tokens = np.arange(2000, dtype=np.int32)
    trace = Trace(TraceInfo("toy", 1, (0,), 60), ids, np.zeros(2000, np.int32), tokens, np.zeros(2000, bool))
    for name in TWINS:
        same(trace, name, 15)


def test_only_the_classes_themselves_have_twins() -> None:
    class Mine(Lru):
        """A user's class."""

    info = TierInfo(3, 8)
    assert compiled.has_twin(Lru(info)) and not compiled.has_twin(Mine(info))
    assert all(POLICIES[name] is kind for kind, name in compiled.NAMES.items() if name != "belady")


def test_a_tier_of_another_size_than_the_policy_knows_is_asked_of_the_policy() -> None:
    trace = read_trace(DEMO)
    found = replay(trace, open_policy("arc", trace, 40), 30)
    assert found == replay(trace, without_twin(open_policy("arc", trace, 40)), 30)
    assert found != replay(trace, open_policy("arc", trace, 30), 30)


def test_without_the_library_the_policies_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = read_trace(DEMO)
    expected = replay(trace, open_policy("sieve", trace, 40), 40)
    monkeypatch.setattr(compiled, "load", lambda: None)
    policy = open_policy("sieve", trace, 40)
    assert replay(trace, policy, 40) == expected and list(policy.victims()), "it has seen the trace"


def test_the_demands_are_what_the_steps_need() -> None:
    trace = read_trace(DEMO)
    demands, experts = trace.demands, trace.info.experts
    flat = [layer * experts + e for step in trace.passes() for layer, ids in enumerate(step.needed) for e in ids]
    assert demands.ids.tolist() == flat and demands.ends[-1, -1] == len(flat)
    assert demands.counts.tolist() == [[len(ids) for ids in step.needed] for step in trace.passes()]
    assert demands.prefill.tolist() == [step.prefill for step in trace.passes()]
    for (start, stop), step in zip(trace.bounds(), trace.passes(), strict=True):
        rows = trace.experts[start:stop]
        assert step.needed == [sorted({e for e in rows[:, i].ravel().tolist() if e >= 0}) for i in range(rows.shape[1])]
        assert step.tokens == stop - start
    assert disk_places(trace) is not None
