"""Hit rates from a trace: which steps count, and a trace of another model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tierlm.errors import TraceError
from tierlm.planning.cost import Work
from tierlm.planning.recorded import RecordedHits
from tierlm.policies import DEFAULT
from tierlm.tracing.replay import open_policy, replay
from tierlm.tracing.trace import Trace, TraceInfo

LAYERS, EXPERTS, CHOSEN, TOKENS = 3, 8, 2, 60
WORK = Work(LAYERS, LAYERS, EXPERTS, CHOSEN, 1, 1, 0, 0, 0, 0, 0)


def routing(early: list[int], late: list[int], prefill: Any = False) -> Trace:
    """Every layer chooses ``early`` in the first half of the tokens, then ``late``."""
    experts = np.array([early] * (TOKENS // 2) + [late] * (TOKENS // 2), np.int16)[:, None].repeat(LAYERS, 1)
    flags = np.full(TOKENS, prefill) if isinstance(prefill, bool) else prefill
    steps = np.arange(TOKENS, dtype=np.int32)
    return Trace(
        TraceInfo("toy", LAYERS, tuple(range(LAYERS)), EXPERTS), experts, np.zeros(TOKENS, np.int32), steps, flags
    )


def test_the_first_half_only_fills_the_slots() -> None:
    hits = RecordedHits(routing([0, 1], [0, 1]))
    assert hits.rate(1.0) == 1.0, "what is missed at first does not count"
    hits = RecordedHits(routing([0, 1], [2, 3]))
    assert hits.rate(1.0) == pytest.approx(1 - 1 / (TOKENS // 2)), "what the second half misses does"


def test_fewer_slots_than_a_tokens_experts_are_not_asked_for() -> None:
    assert RecordedHits(routing([0, 1], [0, 1])).rate(0.0) == 0.0


def test_prefills_do_not_count() -> None:
    last = np.arange(TOKENS) == TOKENS - 1
    assert RecordedHits(routing([0, 1], [0, 1], prefill=~last)).rate(0.25) in (0.0, 1.0)
    with pytest.raises(TraceError, match="a prefill alone"):
        RecordedHits(routing([0, 1], [0, 1], prefill=True))


def test_it_is_the_replays_count_of_those_steps() -> None:
    chance = np.random.default_rng(0)
    experts = np.argsort(chance.random((TOKENS, LAYERS, EXPERTS)), axis=2)[:, :, :CHOSEN].astype(np.int16)
    trace = dataclasses.replace(routing([0, 1], [0, 1]), experts=experts)
    counts = [replay(part, open_policy(DEFAULT, part, 12), 12) for part in (trace, trace.part(0, TOKENS // 2))]
    demanded, missed = counts[0].demanded - counts[1].demanded, counts[0].missed - counts[1].missed
    assert RecordedHits(trace).rate(0.5) == pytest.approx(1 - missed / demanded)


def test_it_says_whose_trace_it_is() -> None:
    hits = RecordedHits(routing([0, 1], [0, 1]))
    assert "60 tokens of toy" in hits.describe(WORK) and "another" not in hits.describe(WORK)
    other = dataclasses.replace(WORK, experts=64)
    assert "another model, 3 layers with 2 of 8 experts, at the same share of slots" in hits.describe(other)
