"""The live picture of a server: /live, the page, and ``tierlm top``."""

from __future__ import annotations

import base64
import hashlib
import http.client
import importlib
import io
import json
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tierlm import LLM, SamplingParams, UsageError
from tierlm.cli.top import Frame, fitted
from tierlm.live import look
from tierlm.memory.executor import LinkStats
from tierlm.memory.kvdisk import KvTier
from tierlm.memory.ticket import State
from tierlm.policies.residency import EntryState, TierStats
from tierlm.spec import ExpertKey, TrunkKey

pytest.importorskip("fastapi", reason="needs the server: pip install tierlm[serve]")
pytest.importorskip("openai")
pytest.importorskip("anthropic")
from prometheus_client import Histogram
from test_server import PROMPT, Running, running, wait_for

from tierlm.server import page as page_of
from tierlm.server.figures import Figures, rates
from tierlm.server.metrics import Times
from tierlm.server.service import Limits, Service

PAGE = (Path(page_of.__file__).parent / "page.html").read_text(encoding="utf-8")
SCRIPT = re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)
KEY = "s3cret"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(Limits(requests=8), key=KEY, options={"context": 400, "ram_slots": 60, "heat": False}) as server:
        yield server


def live(server: Running) -> dict[str, Any]:
    status, text = server.get("/live", authorization=f"Bearer {KEY}")
    assert status == 200
    found: dict[str, Any] = json.loads(text)
    return found


# --- the picture


def entry(key: Any, state: EntryState, ticket: State | None = None) -> SimpleNamespace:
    return SimpleNamespace(key=key, state=state, ticket=None if ticket is None else SimpleNamespace(state=ticket))


def test_the_fastest_tier_that_holds_an_expert() -> None:
    def tier(name: str, *entries: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(name=name, entries={one.key: one for one in entries})

    one, two, three, four, five = (ExpertKey(3, expert) for expert in range(5))
    here, loading = EntryState.RESIDENT, EntryState.LOADING
    vram = tier("vram", entry(one, here), entry(two, loading, State.BEGUN), entry(TrunkKey(3), here))
    ram = tier(
        "ram",
        entry(one, here),
        entry(two, here),
        entry(three, loading, State.WAITING),
        entry(four, loading, State.ARRIVED),  # nobody has asked the tier since
        entry(five, loading, State.FAILED),
    )
    runtime: Any = SimpleNamespace(
        experts=(vram, ram),
        catalog=SimpleNamespace(spec=SimpleNamespace(experts=6, moe_layers=(3, 5))),
        scheduler=SimpleNamespace(load=(1, 2), cache=SimpleNamespace(usage=(3, 4))),
        transfer=SimpleNamespace(collect=lambda: None),
        context=9,
        kv_disk=SimpleNamespace(snapshot=lambda: KvTier(tokens=7)),
    )
    found = look(runtime)
    assert found.experts == {3: "vrarad", 5: "dddddd"}
    assert (found.running, found.waiting, found.kv_tokens, found.kv_reserved, found.context) == (1, 2, 3, 4, 9)
    assert found.kv_disk == 7


def test_a_model_at_work(toy_v3: tuple[Path, Any]) -> None:
    """Between two tokens of a stream the engine is in a step: pictures are taken while it moves experts."""
    with LLM.load(toy_v3[0], budget="8GiB", ram_slots=5, context=60, heat=False) as llm:
        seen = []
        for _ in llm.stream([5, 9, 23], SamplingParams(max_new_tokens=20, ignore_eos=True)):
            seen += [llm.live() for _ in range(20)]
        assert {picture.running for picture in seen[:200]} == {1}
        assert seen[0].kv_reserved == 22 and seen[0].kv_tokens < seen[200].kv_tokens <= 22
        assert len({str(picture.experts) for picture in seen}) > 1
        wait_for(lambda: llm.live().running == 0)
        last = llm.live()
        assert 0 < Counter("".join(last.experts.values()))["r"] <= 5 and last.kv_reserved == 0
    with pytest.raises(UsageError, match="closed"):
        llm.live()


# --- the figures


def test_rates() -> None:
    before: Any = SimpleNamespace(prompt_tokens=5, new_tokens=10, links={}, experts={"ram": TierStats(hits=4)})
    after: Any = SimpleNamespace(
        prompt_tokens=9,
        new_tokens=40,
        links={"disk->ram": LinkStats(bytes=600, seconds=1.5)},  # appears with its first transfer
        experts={"ram": TierStats(hits=10, late_hits=2, misses=8)},
    )
    assert rates(before, after, 2.0) == {
        "over": 2.0,
        "prompt_tokens": 2.0,
        "new_tokens": 15.0,
        "links": {"disk->ram": {"bytes": 300.0, "busy": 0.75}},
        "experts": {"ram": {"hits": 3.0, "late_hits": 1.0, "misses": 4.0}},
    }


def test_percentiles() -> None:
    times = Times(Histogram("seconds", "Of a test.", registry=None))
    assert times.percentiles() is None
    for seconds in (3.0, 1.0):
        times.observe(seconds)
    assert times.percentiles() == {"p50": 1.0, "p95": 3.0, "p99": 3.0, "of": 2}
    for seconds in range(1, 1001):
        times.observe(seconds)
    assert times.percentiles() == {"p50": 500, "p95": 950, "p99": 990, "of": 1000}


def test_figures_look_back_and_are_shared(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("tierlm.server.figures.time", SimpleNamespace(monotonic=lambda: clock.now))
    figures = Figures(served.service)
    first = figures.now()
    assert first["rates"] is None
    clock.now += 0.4
    assert figures.now() is first
    steps = ((0.6, 1.0), (3.5, 4.5), (1.0, 4.5), (60.0, None))  # an old sample says nothing of the present
    for seconds, over in steps:
        clock.now += seconds
        found = figures.now()["rates"]
        assert (found and found["over"]) == (over and pytest.approx(over))


def test_while_the_model_loads() -> None:
    service = Service("demo", Limits())
    service.loading = 30, 60
    found = Figures(service).now()
    assert found == {"model": "demo", "status": "loading", "loaded_bytes": 30, "of_bytes": 60}
    assert "demo: loading, 50%" in shown(found)


def test_live(served: Running) -> None:
    live(served)
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 20, "ignore_eos": True}
    assert served.post("/v1/completions", body, authorization=f"Bearer {KEY}")[0] == 200
    wait_for(lambda: (live(served)["rates"] or {"new_tokens": 0})["new_tokens"] > 0)
    found = live(served)
    assert found["model"] == "demo" and found["status"] == "ready"
    assert found["requests"] == {"live": 0, "limit": 8} and found["kv"]["context"] == 400
    assert list(found["experts"]) == ["1", "2", "3", "4", "5", "6"]
    counts = Counter("".join(found["experts"].values()))
    assert sum(counts.values()) == 192 and 0 < counts["r"] <= 60 and set(counts) <= set("dar")
    assert found["seconds"]["first_token"]["of"] >= 1 and found["seconds"]["next_token"]["of"] >= 19
    assert set(found["rates"]["experts"]["ram"]) == {"hits", "late_hits", "misses"}
    assert "disk->ram" in found["rates"]["links"] and found["memory"]["plan"]["ram"]["experts"] > 0
    assert served.get("/live")[0] == 401


# --- the page


def test_the_page_may_run_only_itself(served: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("GET", "/")  # without the key, for which it asks
    reply = connection.getresponse()
    assert reply.status == 200 and reply.read().decode() == PAGE
    policy = reply.headers["content-security-policy"]
    connection.close()
    (script,), (style,) = SCRIPT, re.findall(r"<style>(.*?)</style>", PAGE, re.DOTALL)
    for name, content in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    markup = PAGE.replace(script, "").replace(style, "")
    assert not re.search(r"\son\w+=|\sstyle=|javascript:", markup)
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", markup) == ["data:,"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)
    assert not re.search(r"https?://", script + style)


def test_the_page_is_named_and_whole() -> None:
    """Each field has a label, each section a heading, and the script finds each element that it looks for."""
    ids = re.findall(r"\bid=\"([^\"]+)\"", PAGE)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"\bat\(\"([^\"]+)\"\)", SCRIPT[0])) <= set(ids)
    fields = re.findall(r"<(?:input|textarea)\b[^>]*id=\"([^\"]+)\"", PAGE)
    assert fields and set(fields) == set(re.findall(r"<label for=\"([^\"]+)\"", PAGE))
    sections = re.findall(r"<section aria-labelledby=\"([^\"]+)\"", PAGE)
    assert len(sections) == PAGE.count("<section") and set(sections) <= set(ids)
    assert '<html lang="en">' in PAGE and 'name="viewport"' in PAGE and "prefers-color-scheme: dark" in PAGE


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    with running(Limits()) as server:
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
             "--virtual-time-budget=4000", "--dump-dom", f"{server.url}/"],
            capture_output=True, text=True, timeout=100, check=True,
        )  # fmt: skip
    assert re.search(r'<span id="status"[^>]*>ready</span>', done.stdout), done.stdout[-3000:]
    text = re.sub(r"<[^>]+>", " ", done.stdout.split("<script>")[0])
    assert re.search(r"disk\s+\d", text) and "interpreter and libraries" in text
    assert done.stdout.count("<tr>") == 7


# --- tierlm top


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two frames, just long enough for new figures."""
    monkeypatch.setattr(importlib.import_module("tierlm.cli.top"), "EVERY", 0.6)


def shown(found: dict[str, Any], width: int = 100, height: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(Frame(found))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_top_prints_a_frame(served: Running, tierlm: Any, tmp_path: Path) -> None:
    code, out, err = tierlm("top", f"127.0.0.1:{served.port}", "--once", "--api-key", KEY)
    assert (code, err) == (0, "")
    for part in ("demo", "disk->ram", "experts in ram", "running", "KV cache", "experts: · disk", "\n   6 "):
        assert part in out
    code, out, err = tierlm("top", f"{served.url}/v1", "--json", "-", "--api-key", KEY)
    assert code == 0 and json.loads(out)["rates"]["over"] >= 0.5
    file = tmp_path / "top.json"
    code, out, _ = tierlm("top", f"{served.url}/", "--json", str(file), "--api-key", KEY)
    assert code == 0 and "experts: · disk" in out and len(json.loads(file.read_text())["experts"]) == 6


def test_top_ends_with_an_interrupt(served: Running, tierlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = []

    def sleep(_: float) -> None:
        frames.append(1)
        if len(frames) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("tierlm.cli.top"), "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, _, err = tierlm("top", served.url, "--api-key", KEY)
    assert (code, err, len(frames)) == (0, "", 3)


def test_top_without_a_server(served: Running, tierlm: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    for words, expected, told in (
        ((f"127.0.0.1:{free}",), 1, "does the server run?"),
        (("ftp://127.0.0.1",), 2, "expected the URL of a server"),
        (("http://127.0.0.1:x",), 2, "expected the URL of a server"),
        ((served.url,), 2, "--api-key"),
        ((f"{served.url}/nothing", "--api-key", KEY), 1, "status 404"),
    ):
        code, out, err = tierlm("top", *words, "--once")
        assert (code, out) == (expected, "") and told in err and err.count("\n") == 1


def test_a_frame_fits_the_terminal(served: Running) -> None:
    found = live(served) | {"experts": {str(layer): "d" * 300 + "v" * 84 for layer in range(58)}}
    lines = shown(found, width=80, height=45).splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 80
    assert any(line.startswith("   0 ███") and line.endswith("··") for line in lines)
    assert "experts:" not in shown(found | {"experts": {}})  # a dense model


def test_too_many_experts_keep_their_shares() -> None:
    assert fitted("drvd", 4, "darv") == "drvd"
    assert fitted("ddvrdd" * 10, 6, "darv") == "vrdddd"
