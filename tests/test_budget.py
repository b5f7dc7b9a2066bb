"""The budget is the whole process: real memory cgroups, and the refusals below the floor."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import make_toy

from tierlm import LLM, Budget, BudgetError, SamplingParams, load_request

BENCH = Path(__file__).parent.parent / "bench"
LIMIT = 480 * 2**20


def load_bench(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


limited, slow_disk = load_bench("limited"), load_bench("slow_disk")
needs_cgroup = pytest.mark.skipif(not limited.available(), reason="memory cgroups cannot be made here")


@pytest.fixture(scope="module")
def larger_than_the_limit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 580 MB, nearly all of it experts of 1.5 MB."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 92, "vocab_size": 500}
    make_toy("v2", folder, torch.bfloat16, num_hidden_layers=5, **sizes)
    assert sum(file.stat().st_size for file in folder.iterdir()) > 1.1 * LIMIT
    return folder


API = """
import json, sys
from tierlm import LLM, Budget, SamplingParams
with LLM.load(sys.argv[1], budget=Budget("480MiB", vram=sys.argv[2] or None), context=256) as llm:
    llm.generate([[7] * 200, [9, 30, 4]], SamplingParams(max_new_tokens=24, ignore_eos=True))
    llm.logits(list(range(100)))
    stats = llm.stats()
print(json.dumps({"slots": stats.plan.ram.expert_slots, "evictions": stats.experts["ram"].evictions}))
"""


@needs_cgroup
@pytest.mark.parametrize("vram", ["", "72MiB"])
def test_never_killed_in_a_cgroup_of_the_budgets_size(vram: str, larger_than_the_limit: Path) -> None:
    limit = LIMIT + (72 * 2**20 if vram else 0)  # the device here is host memory too
    command = [sys.executable, "-c", API, str(larger_than_the_limit), vram]
    process, report = limited.run_limited(command, limit, capture_output=True, env=os.environ)
    assert process.returncode == 0, process.stderr
    assert report["killed"] == 0
    assert report["peak"] <= limit
    seen = json.loads(process.stdout)
    assert 6 <= seen["slots"] < 4 * 92
    assert seen["evictions"] > 0


@needs_cgroup
def test_auto_takes_what_the_cgroup_leaves(larger_than_the_limit: Path) -> None:
    command = [sys.executable, "-m", "tierlm", "run", "demo", "-p", "The", "-n", "4", "--json", "-"]
    process, report = limited.run_limited(command, LIMIT, capture_output=True, env=os.environ)
    assert process.returncode == 0, process.stderr
    assert report["killed"] == 0
    plan = json.loads(process.stdout)["stats"]["plan"]["ram"]
    assert sum(plan["parts"].values()) <= LIMIT


def test_below_the_floor_says_floor_budget_and_what_dominates(toy_v3: tuple[Path, Any]) -> None:
    with pytest.raises(BudgetError, match=r"ram budget of 1\.00 MiB is below the floor of .* dominates is") as caught:
        LLM.load(toy_v3[0], budget=Budget("1MiB"))
    error = caught.value
    assert error.given == 2**20 < error.floor
    assert error.dominant == "interpreter and libraries"
    with pytest.raises(BudgetError, match=r"vram budget of 1\.00 KiB is below the floor"):
        LLM.load(toy_v3[0], budget=Budget("8GiB", vram=1024))


def test_one_byte_above_the_floor_of_vram_works(toy_v3: tuple[Path, Any]) -> None:
    """The floor is a promise: the model runs at the floor."""
    with pytest.raises(BudgetError) as caught:
        LLM.load(toy_v3[0], budget=Budget("8GiB", vram=0))
    with LLM.load(toy_v3[0], budget=Budget("8GiB", vram=caught.value.floor)) as llm:
        assert len(llm.generate([[5, 6, 7]], SamplingParams(max_new_tokens=5, ignore_eos=True))[0].ids) == 5
    with pytest.raises(BudgetError):
        LLM.load(toy_v3[0], budget=Budget("8GiB", vram=caught.value.floor - 1))


def test_logits_that_do_not_fit_are_refused(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=Budget("8GiB"), prefill_chunk=2) as llm:
        nothing_left = sum(llm._runtime.plan.ram.parts.values())
        llm._runtime = dataclasses.replace(llm._runtime, ram_budget=nothing_left)
        with pytest.raises(BudgetError, match=r"logits_tokens=3, whose least .* ask for at most 2 tokens"):
            llm.logits([3, 4, 5])
        assert llm.logits([3, 4]).shape == (2, 131)


def test_the_budget_that_the_error_names_does_for_the_logits(toy_v3: tuple[Path, Any]) -> None:
    """As large as the context, and planned for: no more is planned than the least."""
    ids, options = [7] * 200, {"prefill_chunk": 2, "context": 200}
    with LLM.load(toy_v3[0], budget=Budget("8GiB"), **options) as llm:  # type: ignore[arg-type]
        llm._runtime = dataclasses.replace(llm._runtime, ram_budget=sum(llm._runtime.plan.ram.parts.values()))
        with pytest.raises(BudgetError) as caught:
            llm.logits(ids)
        before, floor = llm.stats().plan.ram, caught.value.floor
        assert floor == before.floor - before.parts["logits"] + 200 * 131 * 4
    more = 64 * 2**20  # the interpreter has grown meanwhile
    with LLM.load(toy_v3[0], budget=Budget(floor + more), logits_tokens=200, **options) as llm:  # type: ignore[arg-type]
        assert llm.stats().plan.ram.parts["logits"] == 200 * 131 * 4
        assert llm.logits(ids).shape == (200, 131)


def test_more_than_this_process_can_have_is_refused(toy_v3: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is planned: a budget may be larger than the machine, if the model is not."""
    with LLM.load(toy_v3[0], budget=Budget("8GiB")) as llm:
        planned = sum(llm.stats().plan.ram.parts.values())
    monkeypatch.setattr(load_request, "total_ram", lambda: planned // 2)
    with pytest.raises(BudgetError, match=r"ram budget of 8\.00 GiB leads to a plan of .* would be killed") as caught:
        LLM.load(toy_v3[0], budget=Budget("8GiB"))
    assert caught.value.given == 8 * 2**30
    monkeypatch.setattr(load_request, "total_ram", lambda: 2 * planned)
    with LLM.load(toy_v3[0], budget=Budget("8GiB")) as llm:
        assert llm._runtime.logits_room < 2 * planned


def test_more_than_is_free_is_warned_of(toy_v3: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_request, "available_ram", lambda: -(2**30))
    with pytest.warns(UserWarning, match="of host memory and .* are free"):
        LLM.load(toy_v3[0], budget=Budget("8GiB")).close()


@needs_cgroup
def test_a_budget_above_the_cgroup_is_refused_by_run(larger_than_the_limit: Path) -> None:
    command = [sys.executable, "-m", "tierlm", "run", str(larger_than_the_limit), "-p", "x", "--ram", "8GiB"]
    process, report = limited.run_limited(command, LIMIT, capture_output=True, env=os.environ)
    assert process.returncode == 1 and report["killed"] == 0
    assert process.stderr.startswith("error: BudgetError: a ram budget of 8.00 GiB leads to a plan of")


def test_a_disk_is_held_to_a_rate_and_let_go(tmp_path: Path) -> None:
    try:
        with slow_disk.held(tmp_path, 10**8) as folder:
            limit = (folder / "blkio.throttle.read_bps_device").read_text().split()
            assert limit == [slow_disk.device_of(tmp_path), "100000000"]
    except OSError as error:
        pytest.skip(f"no disk can be held to a rate here: {error}")
    assert not folder.exists()
