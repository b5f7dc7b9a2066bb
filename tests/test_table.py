"""What people see of statistics and plans: in a terminal, and in a notebook."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tierlm import LLM, Budget, SamplingParams
from tierlm.planning.plan import Plan, TierPlan
from tierlm.table import WIDTH, Table


class Odd(Table):
    def rows(self) -> Iterator[tuple[str, str]]:
        yield "a <b> & c", "word " * 60
        yield "", "more"
        yield "path", "/data/[x]/<y>"


def cells(shown: Table) -> list[tuple[str, str]]:
    return [
        (unescape(name), unescape(value))
        for name, value in re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", shown._repr_html_())
    ]


def test_a_table_is_text_and_html() -> None:
    assert cells(Odd()) == list(Odd().rows())
    assert "<b>" not in Odd()._repr_html_() and "<y>" not in Odd()._repr_html_()
    title, *lines = repr(Odd()).splitlines()
    assert title == "Odd"
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].startswith("a <b> & c  word") and lines[1].startswith("           word")
    assert lines[-2:] == ["           more", "path       /data/[x]/<y>"]


@pytest.mark.parametrize("vram", [None, "1GiB"])
def test_stats_and_plan_of_a_run(vram: str | None, toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=Budget("8GiB", vram), ram_slots=9, vram_slots=None if vram is None else 5) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_new_tokens=3, ignore_eos=True))
        stats = llm.stats()
    rows = dict(cells(stats))
    assert rows["prefill"].startswith("3 tokens at ") and rows["decode"].startswith("2 tokens at ")
    assert {"experts in ram", "ram plan", "peak of the process"} <= set(rows)
    assert ("vram plan" in rows) == ("experts in vram" in rows) == (vram is not None)
    plan = cells(stats.plan)
    assert [name for name, _ in plan if name] == (["ram"] if vram is None else ["vram", "ram"])
    assert any(value.startswith("9 expert slots; floor ") for _, value in plan)
    assert repr(stats.plan).startswith("Plan\n") and repr(stats).startswith("Stats\n")


def test_a_plan_says_what_streams() -> None:
    tier = TierPlan((), ring=1 << 20, expert_slots=7, floor=1 << 30, parts={"trunk": 2 << 20, "experts": 0})
    assert [value for _, value in Plan(tier, None).rows()] == [
        "trunk 2.00 MiB",
        "7 expert slots; floor 1.00 GiB",
        "0 trunks stay, 0 B; others stream through two slots of 1.00 MiB",
    ]
