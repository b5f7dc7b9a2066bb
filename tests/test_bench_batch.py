"""The bench of batches, on the embedded model: measured, simulated and planned alike."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tierlm.checkpoints.hub import DEMO
from tierlm.profiling.profile import Profile, machine_of

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import batch

MACHINE = machine_of(Profile("today", "a processor", 2, 2**34, 2**34), vram=False)


def case(tmp_path: Path, **more: Any) -> dict[str, Any]:
    fixed = {"model": str(DEMO), "ram": "2GiB", "slots": 60, "tokens": 6, "seed": 0, "predictor": "none"}
    return fixed | {"routing": "typical", "batch": 3, "trace": str(tmp_path / "trace.npz")} | more


def test_prompts_differ_and_are_seeded() -> None:
    found = batch.prompts_of(4, 1024, 0)
    assert len({tuple(ids) for ids in found}) == 4 and found == batch.prompts_of(4, 1024, 0) != batch.prompts_of(
        4, 1024, 1
    )
    assert all(5 <= token < 1024 for ids in found for token in ids)


def test_the_simulation_reads_what_the_run_read(tmp_path: Path) -> None:
    """The replay of the recorded routing has the bytes of the steps that count, which several sequences share."""
    one = case(tmp_path)
    found = batch.measure(one)
    simulated = batch.simulated(one, found, MACHINE)
    assert found["slots"] == 60 and found["bytes_per_token"] > 0
    assert simulated["simulated_bytes"] == pytest.approx(found["bytes_per_token"])
    assert 4 < simulated["used"] < 12
    planned = batch.planned(one, found, MACHINE)
    assert 4 < planned["planned_used"] < 12 and planned["planned"] > 0
    row = one | found | simulated | planned
    batch.draw(tmp_path / "plot.png", "demo", [row])
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert batch.table_of("demo", [row]).row_count == 1


def test_the_bench_ends_with_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Profile("today", "a processor", 2, 2**34, 2**34).write(tmp_path / "profile.json")
    options = ["--ram", "2GiB", "--batch", "2", "--tokens", "3", "--profile", str(tmp_path / "profile.json")]
    monkeypatch.setattr(sys, "argv", ["batch.py", "demo", *options])
    batch.main()
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    assert row["batch"] == 2 and row["hit_rate"] > 0.95 and row["simulated_hit_rate"] > 0.95
