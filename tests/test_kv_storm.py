"""A short storm over a store of KV blocks: bench/kv_storm.py has the long one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "kv_storm.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("kv_storm", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kv_storm", module)  # to be found by the processes it starts
    monkeypatch.syspath_prepend(str(BENCH.parent))
    spec.loader.exec_module(module)
    return module


def test_three_kills_lose_nothing(bench: Any, tmp_path: Path) -> None:
    found = bench.storm(tmp_path, 3, seed=1, prompts=8)
    assert found["wrong"] == [] and all(found["hit_bytes"])


def test_a_process_that_hangs_is_an_error(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first word takes longer than it may."""
    monkeypatch.setattr(bench, "SILENT", 0.01)
    with pytest.raises(TimeoutError, match="hangs: expected a word within"):
        bench.Storm(Path()).run(None, [0])
