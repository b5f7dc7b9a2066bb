"""Traces of batches: which tokens run together, and that the simulator counts a batch as the engine does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tierlm import LLM, Budget, SamplingParams
from tierlm.cli import app
from tierlm.errors import TraceError
from tierlm.planning.recorded import RecordedHits
from tierlm.tracing.batches import batched
from tierlm.tracing.replay import open_policy, replay
from tierlm.tracing.trace import Trace, TraceInfo
from tierlm.tracing.traceforms import read_trace


def sequences(lengths: list[int]) -> Trace:
    """Decode steps of one token each, sequence by sequence; a token is known by its expert."""
    numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    tokens = np.arange(len(numbers), dtype=np.int32)
    return Trace(
        TraceInfo("toy", 1, (0,), 512),
        tokens.astype(np.int16)[:, None, None],
        numbers,
        tokens,
        np.zeros(len(tokens), bool),
    )


@settings(deadline=None, derandomize=True, max_examples=60)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), size=st.integers(1, 9))
def test_every_step_has_a_token_of_each_of_its_sequences_in_their_order(lengths: list[int], size: int) -> None:
    trace = sequences(lengths)
    if len(trace) < size:
        with pytest.raises(TraceError, match="expected at least"):
            batched(trace, size)
        return
    found = batched(trace, size)
    assert (found.demands.tokens == size).all() and not found.prefill.any()
    together = found.sequences.reshape(-1, size)
    assert all(len(set(row)) == size for row in together.tolist())
    rows = found.experts.ravel().tolist()
    assert len(set(rows)) == len(rows), "a token runs once"
    for number in set(found.sequences.tolist()):
        own = [row for row, sequence in zip(rows, found.sequences.tolist(), strict=True) if sequence == number]
        assert own == list(range(own[0], own[0] + len(own)))


def test_the_next_sequence_takes_the_place_of_one_that_ends() -> None:
    found = batched(sequences([4, 2, 3, 9]), 2)
    assert found.sequences.reshape(-1, 2).tolist() == [[0, 1]] * 2 + [[0, 2]] * 2 + [[3, 2]]
    assert found.experts.ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 9, 8]


def test_prefills_are_left_out_and_steps_of_that_size_stay() -> None:
    trace = sequences([6, 6])
    prompts = replace(trace, prefill=np.arange(12) % 6 < 2)
    assert len(batched(prompts, 2)) == 8
    assert batched(trace, 1) is trace
    with pytest.raises(TraceError, match="a prefill alone"):
        batched(replace(trace, prefill=np.ones(12, bool)), 2)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """Four prompts of the demo model at once, in 40 slots: the trace, and demands and misses of its decode steps."""
    file = tmp_path_factory.mktemp("batch") / "trace"
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    options = {"heat": False, "predictor": "none", "ram_slots": 40, "transfer_threads": 1, "trace": file}
    with LLM.load("demo", budget=Budget("2GiB"), **options) as llm:
        llm.generate([[5, 6], [200, 9], [31, 7], [400, 3]], params)
        tier = llm.stats().experts["ram"]
    return file, [tier.hits + tier.late_hits + tier.misses, tier.misses]


def test_the_simulator_counts_a_batch_as_the_engine_does(recorded: tuple[Path, list[int]]) -> None:
    trace, counts = read_trace(recorded[0]), recorded[1]
    assert set(trace.demands.tokens[1:].tolist()) == {4}
    found = replay(trace, open_policy("default", trace, 40), 40)
    assert [found.demanded, found.missed] == counts
    assert batched(trace, 4) is trace


def test_distinct_experts_and_hit_rates_by_batch(recorded: tuple[Path, list[int]]) -> None:
    """More sequences use more experts in a step, fewer for each, and hits fall as long as slots are few."""
    hits = RecordedHits(read_trace(recorded[0]))
    used = [hits.used(batch) for batch in (1, 2, 4)]
    assert used[0] == 4.0 and 4 < used[1] < 8 and used[1] < used[2] < 2 * used[1]
    assert hits.rate(1.0, 4) > hits.rate(0.2, 4)


def test_the_commands(recorded: tuple[Path, list[int]]) -> None:
    def run(*arguments: str) -> dict[str, float]:
        done = CliRunner().invoke(app, [*arguments, "--json", "-"], catch_exceptions=False)
        assert done.exit_code == 0
        found: dict[str, float] = json.loads(done.stdout)
        return found

    file = str(recorded[0])
    one, two = (run("simulate", file, "--batch", batch, "--cache-fraction", "0.2") for batch in ("1", "2"))
    assert two["demanded"] < one["demanded"] and two["tokens"] == one["tokens"] == 44
    plans = [run("plan", "demo", "--ram", "1GiB", "--batch", n, "--trace", file, "--prompt", "9") for n in ("1", "4")]
    speeds = [found["predicted"]["typical"] for found in plans]  # type: ignore[index]
    assert speeds[1]["decode_tokens_per_second"] > speeds[0]["decode_tokens_per_second"]
    assert speeds[1]["used_experts"] > speeds[0]["used_experts"] == 4.0
    done = CliRunner().invoke(app, ["plan", "demo", "--ram", "1GiB", "--batch", "64"])
    assert "need a context of 32768" in str(done.exception)
