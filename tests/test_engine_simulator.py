"""The engine and the simulator of its trace agree, count for count, with a predictor and with two tiers above the disk.

Both complete reads at once and find every prediction worth a read, so no decision depends on time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from at_once import AtOnce

from tierlm import LLM, Budget, SamplingParams
from tierlm.memory.transfer import Transfer
from tierlm.policies import POLICIES
from tierlm.policies.predictors import make_predictor
from tierlm.policies.prefetch import Always
from tierlm.tracing.replay import Replayed, open_policy, replay
from tierlm.tracing.simulate import replay_tiers, simulate
from tierlm.tracing.timing import AT_ONCE, Rates
from tierlm.tracing.trace import Trace
from tierlm.tracing.traceforms import read_trace

PROMPTS = [[(37 * i + 11 * j) % 1000 + 2 for i in range(30 * j + 1)] for j in range(3)]
INSTANT = Rates(1, AT_ONCE, 0.0, 0.0)


def run_engine(
    file: Path, policy: str, predictor: str, slots: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, int]]:
    """What each tier of ``slots``, the top first, has counted; the trace goes to ``file``."""
    monkeypatch.setattr("tierlm.memory.opening.Transfer", lambda *arguments: Transfer(*arguments, executor=AtOnce()))
    options: dict[str, Any] = {"predictor": predictor, "heat": False, "prefill_chunk": 32, "ram_slots": slots[-1]}
    budget = Budget("8GiB")
    if len(slots) > 1:
        budget, options = Budget("8GiB", "8GiB"), options | {"vram_slots": slots[0], "device": "cpu"}
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    with LLM.load("demo", budget=budget, policy=policy, trace=file, trace_scores=True, **options) as llm:
        llm._runtime.store.lookahead.prefetch = Always()
        llm.generate(PROMPTS[1], params)
        llm.generate([PROMPTS[0], PROMPTS[2]], params)
        return [asdict(stats) for stats in llm.stats().experts.values()]


def run_simulator(trace: Trace, policy: str, predictor: str, slots: Sequence[int]) -> list[dict[str, int]]:
    tiers = [(open_policy(policy, trace, count), count) for count in slots]
    asked = make_predictor(predictor, trace.experts.shape[2])
    below = tiers[1] if len(tiers) > 1 else None
    found = simulate(trace, tiers[0][0], asked, slots[0], INSTANT, below=below, prefetch=Always())
    return [asdict(stats) for stats in found.tiers]


@pytest.mark.parametrize("slots", [(24,), (40,), (24, 40), (40, 24), (16, 8)], ids=str)
@pytest.mark.parametrize(
    ("policy", "predictor"),
    [("echo", "gate"), ("lru", "gate"), ("s3-fifo", "gate"), ("cycle", "gate"), ("echo", "ensemble"), ("lru", "none")],
)
def test_the_simulator_counts_what_the_engine_does(
    policy: str, predictor: str, slots: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt alone, then two in one batch, in chunks of 32; decode steps of one and of two tokens."""
    found = run_engine(tmp_path / "trace", policy, predictor, slots, monkeypatch)
    assert policy in POLICIES and found[0]["misses"]
    if predictor == "gate":
        assert found[0]["useful"] and found[0]["wasted"]
    trace = read_trace(tmp_path / "trace", scores=True)
    if predictor == "none":
        counted = replay_tiers(trace, [(open_policy(policy, trace, count), count) for count in slots])
        assert counted == [Replayed(tier["hits"] + tier["misses"], tier["misses"]) for tier in found]
    else:
        assert run_simulator(trace, policy, predictor, slots) == found


@pytest.mark.parametrize("policy", ["echo", "lru", "arc"])
def test_one_tier_of_several_is_the_replay_of_one(policy: str) -> None:
    trace = read_trace(Path(__file__).parent.parent / "bench" / "traces" / "demo.npz").part(0, 300)
    for slots in (4, 40):
        (found,) = replay_tiers(trace, [(open_policy(policy, trace, slots), slots)])
        assert found == replay(trace, open_policy(policy, trace, slots), slots)
