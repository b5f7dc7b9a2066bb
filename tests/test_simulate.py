"""The simulator: its counts equal the replay's, its times follow from the machine, prefetch pays where it can."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_traces import traces

from tierlm.errors import UsageError
from tierlm.policies import POLICIES
from tierlm.policies.prediction import NoPredictor
from tierlm.policies.predictors import PREDICTORS, make_predictor
from tierlm.spec import ExpertKey
from tierlm.tracing.foresight import foresee
from tierlm.tracing.link import Link, Speed
from tierlm.tracing.replay import open_policy, replay
from tierlm.tracing.simulate import Simulated, simulate
from tierlm.tracing.timing import Rates
from tierlm.tracing.trace import Trace, TraceInfo
from tierlm.tracing.tracefile import write_trace

LAYERS, CHOSEN, EXPERTS = 4, 3, 12
MACHINE = Rates(1000, Speed(1e6, 1e-5, 4), layer_seconds=1e-3, expert_seconds=1e-4)


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Routing that lasts for a while; a prefill of 20 tokens, then 200 decode steps; gates that predict correctly."""
    chance = np.random.default_rng(1)
    experts = np.argsort(chance.random((220, LAYERS, EXPERTS)), axis=2)[:, :, :CHOSEN].astype(np.int16)
    for token in range(1, 220):
        stay = chance.random(LAYERS) < 0.6
        experts[token, stay] = experts[token - 1, stay]
    steps = np.maximum(np.arange(220) - 19, 0).astype(np.int32)
    predictions = np.repeat(experts[:, :, None], 3, axis=2)
    info = TraceInfo("toy", LAYERS, tuple(range(LAYERS)), EXPERTS)
    return Trace(info, experts, np.zeros(220, np.int32), steps, steps == 0, predictions=predictions)


def run(
    trace: Trace, policy: str = "lru", predictor: str = "none", slots: int = 20, machine: Rates = MACHINE
) -> Simulated:
    return simulate(trace, open_policy(policy, trace, slots), make_predictor(predictor, CHOSEN), slots, machine)


class Silent(NoPredictor):
    """Is asked, so that each event is simulated, and predicts nothing."""

    lookahead = 1


def same(trace: Trace, policy: str, slots: int, machine: Rates) -> None:
    """The time computed from the misses equals the time of simulating each event."""
    found = simulate(trace, open_policy(policy, trace, slots), NoPredictor(CHOSEN), slots, machine).as_json()
    expected = simulate(trace, open_policy(policy, trace, slots), Silent(CHOSEN), slots, machine).as_json()
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value), name


@pytest.mark.parametrize("policy", [*POLICIES, "belady"])
@pytest.mark.parametrize("slots", [3, 20])
def test_without_predictions_it_misses_what_the_replay_misses(policy: str, slots: int, trace: Trace) -> None:
    result, counts = run(trace, policy, slots=slots), replay(trace, open_policy(policy, trace, slots), slots)
    assert (result.demanded, result.missed) == (counts.demanded, counts.missed)
    assert result.reads == result.missed and result.hit_rate == counts.hit_rate
    same(trace, policy, slots, MACHINE)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    trace=traces(),
    slots=st.integers(1, 50),
    speed=st.sampled_from([2e5, 1e6, 2e7]),
    latency=st.sampled_from([0.0, 3e-4, 1e-2]),
    depth=st.sampled_from([1, 2, 8]),
    computing=st.sampled_from([0.0, 1e-4, 7e-3]),
)
def test_the_time_without_predictions_is_that_of_its_events(
    trace: Trace, slots: int, speed: float, latency: float, depth: int, computing: float
) -> None:
    """Prefills that wait for slots, several tokens a step, fewer slots than records, fast and slow disks."""
    same(trace, "lru", slots, Rates(1000, Speed(speed, latency, depth), 3e-4, computing))


def test_everything_resident_takes_the_computation_alone(trace: Trace) -> None:
    result = run(trace, slots=LAYERS * EXPERTS)
    resident = run(trace, slots=LAYERS * EXPERTS, machine=replace(MACHINE, disk=Speed(1e15, 0.0, 4)))
    assert result.reads == LAYERS * EXPERTS
    assert resident.stall_seconds < 1e-9
    decode = 200 * LAYERS * (MACHINE.layer_seconds + CHOSEN * MACHINE.expert_seconds)
    assert resident.decode_seconds == pytest.approx(decode)
    assert resident.tokens_per_second == pytest.approx(200 / decode)


def test_a_slow_disk_is_the_whole_time(trace: Trace) -> None:
    result = run(trace, machine=replace(MACHINE, disk=Speed(1e3, 0.0, 4)))
    assert result.seconds == pytest.approx(result.bytes_read / 1e3, rel=0.01)
    assert result.stall_seconds / result.seconds > 0.95


def test_latencies_overlap_up_to_the_depth() -> None:
    for depth, expected in ((1, 8 * 1.5), (2, 3 * 1.5 + 2.0), (8, 1 + 8 * 0.5)):
        link = Link(Speed(2.0, 1.0, depth), 1)
        keys = [ExpertKey(0, expert) for expert in range(8)]
        for key in keys:
            link.submit(key, 0.0, prefetch=False)
        link.run(1e9)
        assert max(link.done.values()) == pytest.approx(expected), depth


def test_demands_go_ahead_of_predictions_that_wait() -> None:
    link = Link(Speed(1.0, 0.0, 1), 1)
    first, prediction, demand = (ExpertKey(0, expert) for expert in range(3))
    link.submit(first, 0.0, prefetch=False)
    link.submit(prediction, 0.0, prefetch=True)
    link.run(0.5)
    link.submit(demand, 0.5, prefetch=False)
    assert link.wait({demand}) == 2.0 and prediction not in link.done
    assert link.wait({prediction}) == 3.0
    assert not link.cancel(prediction, 1.0)


def test_right_predictions_turn_waiting_into_late_hits_or_hits(trace: Trace) -> None:
    plain, predicted = run(trace), run(trace, predictor="gate")
    assert predicted.missed < plain.missed and predicted.useful > 100
    assert predicted.seconds < plain.seconds and predicted.wasted < predicted.useful / 10
    assert predicted.reads <= predicted.missed + predicted.prefetched


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_every_predictor_runs_and_its_account_adds_up(predictor: str, trace: Trace) -> None:
    result = run(trace, predictor=predictor)
    assert result.demanded == run(trace).demanded
    begun = result.prefetched - result.cancelled
    assert result.missed <= result.reads <= result.missed + begun
    assert result.useful + result.wasted <= begun


def test_recall_and_precision(trace: Trace) -> None:
    gate = foresee(trace, make_predictor("gate", CHOSEN), [1, CHOSEN])
    assert {row.ahead for row in gate} == {0, 1, 2}
    right = [row for row in gate if row.ahead == 0]
    assert [row.precision for row in right] == [1.0, 1.0]
    assert [row.recall for row in right] == [pytest.approx(1 / CHOSEN), 1.0]
    previous = foresee(trace, make_predictor("previous", CHOSEN), [CHOSEN])[0]
    chosen, before = trace.experts[20:], trace.experts[19:-1]
    same = np.mean(
        [len(set(a) & set(b)) / CHOSEN for t, u in zip(chosen, before, strict=True) for a, b in zip(t, u, strict=True)]
    )
    assert previous.recall == pytest.approx(same, abs=0.01) and previous.recall > 0.5
    assert foresee(trace, make_predictor("none", CHOSEN), [CHOSEN]) == []


def test_gates_need_what_was_recorded_on_request(trace: Trace) -> None:
    for ask in (lambda t: run(t, predictor="gate"), lambda t: foresee(t, make_predictor("gate", CHOSEN), [1])):
        with pytest.raises(UsageError, match="--scores"):
            ask(replace(trace, predictions=None))


# The command


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line: Sequence[str] = [sys.executable, "-m", "tierlm", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def file(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    write_trace(path, trace)
    return path


def test_the_command_prints_one_object(file: Path, trace: Trace) -> None:
    done = command("simulate", file, "--policy", "lru", "--cache-fraction", "0.25", "--json", "-")
    assert done.returncode == 0, done.stderr
    found, counts = json.loads(done.stdout), replay(trace, open_policy("lru", trace, 12), 12)
    assert found["slots"] == 12 and found["demanded"] == counts.demanded and found["missed"] == counts.missed
    assert found["hit_rate"] == counts.hit_rate and found["bytes_read"] == counts.missed * 8 * 2**20
    assert found["tokens_per_second"] > 0


def test_the_command_needs_no_torch(file: Path) -> None:
    script = f"""
import sys
from tierlm.cli import app
try:
    app(["simulate", {str(file)!r}, "--predictor", "gate", "--ram", "160MiB"], standalone_mode=False)
finally:
    assert "torch" not in sys.modules and "optuna" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "20 of 48 experts" in done.stdout and "cold start included" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--cache-fraction", "0"], 2, "cache-fraction"),
        (["--cache-fraction", "0.5", "--ram", "1GiB"], 2, "give one of them"),
        (["--ram", "1MiB"], 2, "fewer than the 3 experts"),
        (["--policy", "nonsense"], 2, "unknown policy"),
        (["--predictor", "nonsense"], 2, "unknown predictor"),
        (["--disk-bandwidth", "0"], 2, "disk-bandwidth"),
        (["--disk-latency", "-1"], 2, "disk-latency"),
        (["--tune", "3"], 2, "go together"),
    ],
)
def test_what_cannot_be_is_told(arguments: list[str], code: int, message: str, file: Path) -> None:
    from typer.testing import CliRunner

    from tierlm.cli import app
    from tierlm.errors import TierlmError

    result = CliRunner().invoke(app, ["simulate", str(file), *arguments])
    assert isinstance(result.exception, TierlmError) and result.exception.exit_code == code
    assert message in str(result.exception)


def test_a_bad_trace_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "t").write_text('{"layers": [[1]]}\n{"layers": [[1]')
    done = command("simulate", tmp_path / "t", "--json", "-")
    assert done.returncode == 1 and done.stdout == ""
    assert "TraceError" in done.stderr and "line 2" in done.stderr and "Traceback" not in done.stderr


def test_tuning_finds_no_worse_than_the_defaults_and_is_loaded_again(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs optuna: pip install tierlm[tune]")
    tuned = tmp_path / "tuned.json"
    done = command("simulate", file, "--policy", "lru-k", "--tune", "4", "-o", tuned, "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["policy"] == "lru-k" and 0 < found["test"] < 1 and found["file"] == str(tuned)
    again = command("simulate", file, "--policy", tuned, "--json", "-")
    assert again.returncode == 0 and json.loads(again.stdout)["missed"] > 0
