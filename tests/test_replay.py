"""The engine and the replay of its trace agree, hit for hit, under every policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tierlm import LLM, Budget, SamplingParams
from tierlm.policies import POLICIES
from tierlm.tracing.replay import Replayed, open_policy, replay
from tierlm.tracing.traceforms import read_trace

PROMPTS = [[(37 * i + 11 * j) % 1000 + 2 for i in range(30 * j + 1)] for j in range(4)]


@pytest.mark.parametrize("slots", [8, 40])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_engine_counts_what_the_replay_does(policy: str, slots: int, tmp_path: Path) -> None:
    """Prompts of 1 to 91 tokens in chunks of 32: up to three in one batch, then one alone."""
    file = tmp_path / "trace"
    options: dict[str, Any] = {"predictor": "none", "heat": False, "transfer_threads": 1, "prefill_chunk": 32}
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    with LLM.load("demo", budget=Budget("8GiB"), policy=policy, ram_slots=slots, trace=file, **options) as llm:
        llm.generate(PROMPTS[:2] if slots < 12 else PROMPTS[:3], params)
        llm.generate(PROMPTS[3:], params)
        stats = llm.stats().experts["ram"]
    trace = read_trace(file)
    assert replay(trace, open_policy(policy, trace, slots), slots) == Replayed(stats.hits + stats.misses, stats.misses)
    assert stats.late_hits == 0 and stats.misses and (stats.hits or slots == 8)
