"""The trace of events: complete for a viewer, or not written at all."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tierlm import LLM, Budget, SamplingParams
from tierlm.errors import UsageError
from tierlm.timeline import Timeline, span


def test_spans_by_track_and_thread(tmp_path: Path) -> None:
    timeline = Timeline()
    with span(timeline, "compute", "layer 1"), timeline.span("link", "inner", bytes=7):
        pass
    thread = threading.Thread(target=lambda: timeline.add("link", "other", 1.0, 1.5))
    thread.start()
    thread.join()
    timeline.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert sorted(names.values()) == ["compute", "link"]
    assert {name: names[event["pid"]] for name, event in spans.items()} == {
        "layer 1": "compute",
        "inner": "link",
        "other": "link",
    }
    assert spans["inner"]["tid"] != spans["other"]["tid"]
    assert spans["inner"]["args"] == {"bytes": 7}
    assert spans["other"]["dur"] == pytest.approx(500_000)
    outer, inner = spans["layer 1"], spans["inner"]
    assert outer["ts"] <= inner["ts"] <= inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e-3
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.json"]


def test_no_timeline_no_cost() -> None:
    with span(None, "compute", "layer 1"):
        pass


def test_a_model_writes_reads_waits_and_products(toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    with LLM.load(toy_v3[0], budget=Budget("2GiB"), ram_slots=5, timeline=file, heat=False) as llm:
        llm.generate([[5, 6]], SamplingParams(max_new_tokens=3, ignore_eos=True))
        moved = llm.stats().links["disk->ram"].bytes
    events = json.loads(file.read_text())["traceEvents"]
    tracks = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    reads = [event for event in spans if tracks[event["pid"]] == "disk->ram"]
    assert {"compute", "disk->ram", "wait"} <= set(tracks.values())
    assert sum(event["args"]["bytes"] for event in reads) >= moved > 0
    assert {event["args"]["priority"] for event in reads} <= {"demand", "prefetch", "warm_up"}
    assert {"attention 0", "lm_head"} <= {event["name"] for event in spans}
    assert all(event["dur"] >= 0 for event in spans)


def test_a_folder_that_does_not_exist_is_told_before_loading(toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"timeline: .*no such folder"):
        LLM.load(toy_v3[0], budget=Budget("2GiB"), timeline=tmp_path / "none" / "trace.json")
