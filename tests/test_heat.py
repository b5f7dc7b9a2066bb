"""Heat: counted, saved, faded, and used to warm up the next run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm import LLM, Budget, SamplingParams, StorageError
from tierlm.memory.heat import REMEMBERED, Heat
from tierlm.spec import ExpertKey

ALL = [ExpertKey(layer, expert) for layer in (1, 2) for expert in range(8)]
RAM = Budget("2GiB")


def test_hottest_are_those_with_the_largest_share_of_their_layers_turns() -> None:
    heat = Heat()
    for turn in range(10):
        heat.note(1, [ExpertKey(1, 3)] + [ExpertKey(1, 5)] * (turn < 5))
    heat.note(2, [ExpertKey(2, 0)])
    assert heat.hottest() == [ExpertKey(1, 3), ExpertKey(2, 0), ExpertKey(1, 5)]
    assert heat.share(ExpertKey(1, 5)) == 0.5
    assert heat.share(ExpertKey(2, 7)) == heat.share(ExpertKey(3, 0)) == 0.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2), st.sets(st.integers(0, 7))), max_size=30))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[int, set[int]]]) -> None:
    file = tmp_path_factory.mktemp("heat") / "new folder" / "heat.json"
    heat = Heat()
    for layer, experts in turns:
        heat.note(layer, [ExpertKey(layer, expert) for expert in experts])
    heat.write(file)
    again = Heat.read(file, ALL)
    assert again.hottest() == heat.hottest()
    assert all(again.share(key) == pytest.approx(heat.share(key), abs=1e-3) for key in ALL)


def test_old_runs_fade(tmp_path: Path) -> None:
    heat = Heat()
    for _ in range(10 * REMEMBERED):
        heat.note(1, [ExpertKey(1, 0)])
    heat.write(tmp_path / "heat")
    heat = Heat.read(tmp_path / "heat", ALL)
    assert heat.share(ExpertKey(1, 0)) == pytest.approx(1.0)
    for _ in range(2 * REMEMBERED):
        heat.note(1, [ExpertKey(1, 1)])
    assert heat.hottest()[0] == ExpertKey(1, 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"version": 99}',
        '{"version": 1}',
        json.dumps({"version": 1, "turns": [[1, 5]], "uses": [[1, 99, 3]]}),
        json.dumps({"version": 1, "turns": [[1, 5]], "uses": [[1, "x", 3]]}),
        json.dumps({"version": 1, "turns": [], "uses": [[1, 1, 3]]}),
        json.dumps({"version": 1, "turns": [[1, 0]], "uses": [[1, 1, 3]]}),
        json.dumps({"version": 1, "turns": [[1, 5]], "uses": [[1, 1, -3]]}),
        '{"version": 1, "turns": [[1, 5]], "uses": [[1, 1, NaN]]}',
        '{"version": 1, "turns": [[1, Infinity]], "uses": [[1, 1, 3]]}',
        '{"version": 1, "turns": [[Infinity, 5]], "uses": [[1, 1, 3]]}',
        '{"version": 1, "turns": [[1, 5]], "uses": [[1, 1, 6]]}',
        '{"version": 1, "turns": [[1, -5]], "uses": [[1, 1, -6]]}',
        '{"version": 1, "turns": ' + "[" * 100_000,
    ],
)
def test_a_file_that_makes_no_sense_is_no_heat(tmp_path: Path, text: str) -> None:
    (tmp_path / "heat").write_text(text)
    assert Heat.read(tmp_path / "heat", ALL).hottest() == []
    assert Heat.read(tmp_path / "nothing", ALL).hottest() == []


def test_the_next_run_begins_with_the_hottest(
    toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompt, params = [[5, 6, 7, 8]], SamplingParams(max_new_tokens=20, ignore_eos=True)
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=20) as llm:
        first = llm.generate(prompt, params)[0].ids
        hottest = llm._runtime.heat.hottest()
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=20) as llm:
        tier = llm._runtime.experts[0]
        assert list(tier.entries) == hottest[:20]
        assert llm.stats().experts["ram"].warmed == 20
        assert llm.generate(prompt, params)[0].ids == first
        hits = llm.stats().hit_rate
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=20, heat=False) as llm:
        assert llm._runtime.experts[0].entries == {}
        assert llm.generate(prompt, params)[0].ids == first
        assert (hits or 0) > (llm.stats().hit_rate or 1)


def test_a_first_start_fills_its_slots_in_the_order_of_the_checkpoint(
    toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=20) as llm:
        assert list(llm._runtime.experts[0].entries) == sorted(llm._runtime.catalog.experts())[:20]


def test_without_warm_up_the_memory_of_slots_is_populated(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=20, heat=False) as llm:
        tier = llm._runtime.experts[0]
        assert tier.entries == {} and all(slot.filled for slot in tier.slots)
        assert len(tier.slots) == 20  # and no more than planned


def test_a_cache_folder_that_cannot_be_written_is_an_error_after_the_run(
    toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    llm = LLM.load(toy_v3[0], budget=RAM)
    llm.generate([[5]], SamplingParams(max_new_tokens=2))
    with pytest.raises(StorageError, match=r"heat \(.*--no-heat.*\): .*file/tierlm/heat/.*json: cannot be written: "):
        llm.close()
    llm.close()
