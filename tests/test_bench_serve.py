"""The bench of the server: arrivals and their files, percentiles and goodput, and a run against a server that it
starts."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the server: pip install tierlm[serve]")
pytest.importorskip("openai")
sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import itertools

import serve
from arrivals import Arrival, fitted, poisson, read_arrivals
from outcomes import Outcome, summary
from served import Served, tierlm_server


def test_a_poisson_process_is_seeded_and_has_its_rate() -> None:
    found = poisson(5.0, 400.0, 48, 24, seed=3)
    assert found == poisson(5.0, 400.0, 48, 24, seed=3) != poisson(5.0, 400.0, 48, 24, seed=4)
    gaps = [b.at - a.at for a, b in itertools.pairwise(found)]
    assert len(found) / 400 == pytest.approx(5, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.1), "gaps are exponential"
    assert statistics.median(one.prompt for one in found) == pytest.approx(48, rel=0.1)
    assert found[0].at > 0 and found[-1].at < 400


def test_azures_form(tmp_path: Path) -> None:
    file = tmp_path / "conv.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9951690,396,109\r\n2023-11-16 18:16:00,9,1\r\n"
    )
    first, second, third = read_arrivals(file)
    assert first == Arrival(0.0, 374, 44) and (second.prompt, second.output) == (396, 109)
    assert second.at == pytest.approx(4.314579) and third.at == pytest.approx(13.31941)
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,many,44\n")
    with pytest.raises(ValueError, match="line 2: expected TIMESTAMP,ContextTokens,GeneratedTokens"):
        read_arrivals(file)
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    with pytest.raises(ValueError, match="expected requests, found none"):
        read_arrivals(file)


def test_mooncakes_form(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows: list[dict[str, Any]] = [
        {"timestamp": 3000, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]},
        {"timestamp": 1500, "input_length": 700, "output_length": 26, "hash_ids": [46, 2]},
        {"timestamp": 4500, "input_length": 3, "output_length": 1},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = read_arrivals(file)
    assert [one.at for one in found] == [0.0, 1.5, 3.0] and found[1].blocks == (46, 47, 48)
    short, long = (found[at].ids(at, range(5, 1000)) for at in (0, 1))
    assert (len(short), len(long)) == (700, 1100)
    assert short[:512] == long[:512] and short[512:] != long[512:700], "equal hashes are equal blocks"
    file.write_text('{"timestamp": 1500}\n')
    with pytest.raises(ValueError, match="line 1: expected timestamp, input_length, output_length"):
        read_arrivals(file)


def test_a_trace_is_fitted() -> None:
    arrivals = [Arrival(0.0, 900, 5), Arrival(8.0, 30, 500), Arrival(30.0, 1, 1)]
    assert fitted(arrivals, 2.0, 10.0, 512, 64) == [Arrival(0.0, 512, 5), Arrival(4.0, 30, 64)]


def test_prompts_differ_unless_their_blocks_are_known() -> None:
    one = Arrival(0.0, 20, 1)
    assert one.ids(1, range(5, 260)) == one.ids(1, range(5, 260)) != one.ids(2, range(5, 260))


def done(due: float, first: float, last: float, tokens: int, status: str = "ok") -> Outcome:
    return Outcome(due, 10, first, last, tokens, "text", status)


def test_goodput_counts_what_met_both_targets() -> None:
    outcomes = [
        done(0.0, 0.5, 1.5, 11),  # 100 ms a token
        done(1.0, 1.2, 4.2, 11),  # too slow
        done(2.0, 5.0, 5.5, 11),  # too late
        done(3.0, 3.5, 3.5, 1),  # one token has no time between tokens
        done(3.5, 0.0, 0.0, 0, "429"),
    ]
    found = summary(outcomes, 4.0, ttft=1.0, tpot=0.1 + 1e-9)
    assert (found["goodput"], found["good_share"]) == (0.5, 0.4)
    assert found["statuses"] == {"ok": 4, "429": 1} and found["requests_per_second"] == 1.25
    assert found["ttft"] == {"p50": pytest.approx(0.5), "p90": 3.0, "p99": 3.0}
    assert found["tpot"]["p50"] == pytest.approx(0.1) and found["tpot"]["p99"] == pytest.approx(0.3)
    assert found["seconds"] == 5.5 and found["tokens_per_second"] == pytest.approx(34 / 5.5)


def test_nothing_done_has_no_percentiles() -> None:
    found = summary([done(0.0, 0.0, 0.0, 0, "503")], 2.0, 1.0, 1.0)
    assert found["ttft"] is None and found["tpot"] is None and found["goodput"] == 0.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    with Served(tierlm_server("demo", "1GiB", ["--context", "600", "--requests", "6"]), "1GiB", log) as made:
        yield made


def measured(served: Served, monkeypatch: pytest.MonkeyPatch, *options: str, arrivals: list[Arrival]) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["serve.py", "demo", "--prompt", "8", "--output", "30", *options])
    return asyncio.run(serve.measure(serve.parse_arguments(), served.url, arrivals, served))


def test_a_run_counts_answers_refusals_and_clients_that_vanish(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arrivals = [Arrival(0.1 * at, 8, 6) for at in range(5)] + [Arrival(0.7, 8, 60)] * 12
    found = measured(served, monkeypatch, "--vanish", "5", "--seconds", "0.7", arrivals=arrivals)
    assert found["statuses"]["ok"] >= 6 and found["statuses"]["429"] > 0
    assert set(found["statuses"]) == {"ok", "429"} and found["vanished"] == 5
    assert found["all_gone"] and found["same_tokens"]
    assert 0 < found["ttft"]["p50"] < 60 and found["tpot"]["p50"] > 0
    row = {"server": "tierlm", "load": "burst", **found}
    serve.draw(tmp_path / "plot.png", "a run", [row])
    assert (tmp_path / "plot.png").stat().st_size > 0 and "429" in str(serve.table_of("runs", [row]).columns[3]._cells)


def test_a_killed_server_starts_again_and_answers_with_the_same_tokens(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals = [Arrival(0.05 * at, 8, 40) for at in range(12)]
    found = measured(served, monkeypatch, "--kill", "--seconds", "0.6", arrivals=arrivals)
    assert found["same_tokens"] and found["all_gone"]
    assert any(not status.isdigit() and status != "ok" for status in found["statuses"]), "some were cut off"
    assert served.memory[-1][1] > 2**20


def test_other_tokens_than_at_rest_are_noticed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter([["a"], ["b"]])

    async def probe(load: Any) -> list[str]:
        return next(texts)

    monkeypatch.setattr(serve, "probe", probe)
    assert not measured(served, monkeypatch, "--seconds", "0.1", arrivals=[Arrival(0.0, 4, 2)])["same_tokens"]


def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="no such"),
        Served(tierlm_server("/no/such", "1GiB", []), "1GiB", tmp_path / "log"),
    ):
        pass


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["demo", "--url", "http://x"],
        ["demo", "--peer", "x"],
        ["--url", "http://x", "--kill"],
        ["demo", "--rate", "0"],
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    with pytest.raises(SystemExit) as raised:
        serve.parse_arguments()
    assert raised.value.code == 2
