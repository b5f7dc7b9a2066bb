"""Recording: the trace matches the run, and nothing is recorded unless requested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tierlm import LLM, Budget, SamplingParams
from tierlm.cli import app
from tierlm.errors import UsageError
from tierlm.policies.prediction import GateLookahead
from tierlm.spec import ExpertKey
from tierlm.tracing.foresight import foresee
from tierlm.tracing.recorder import AHEAD, Recorder
from tierlm.tracing.trace import Trace, TraceInfo
from tierlm.tracing.traceforms import read_trace

CHOSEN = 4
PARAMS = SamplingParams(max_new_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The demo model: two prompts in one batch, in chunks of 8 tokens, then the logits of a third."""
    file = tmp_path_factory.mktemp("recorded") / "trace"
    options = {"heat": False, "prefill_chunk": 8, "trace": file, "trace_scores": True}
    with LLM.load("demo", budget=Budget("8GiB"), **options) as llm:
        llm.generate([list(range(5, 15)), [7]], PARAMS)
        llm.logits([9, 10, 11])
        assert not file.exists()
    return read_trace(file, scores=True)


def test_steps_sequences_and_phases(recorded: Trace) -> None:
    expected = [(0, 0, True)] * 8 + [(1, 0, True)] * 2 + [(1, 1, True)]  # prompts share a chunk
    expected += [(2 + step, sequence, False) for step in range(4) for sequence in (0, 1)] + [(6, 2, True)] * 3
    found = zip(recorded.steps.tolist(), recorded.sequences.tolist(), recorded.prefill.tolist(), strict=True)
    assert list(found) == expected


def test_of_which_model(recorded: Trace) -> None:
    info = recorded.info
    assert (info.model, info.layers, info.moe_layers, info.experts) == ("demo", 7, tuple(range(1, 7)), 32)
    assert info.record_bytes == 77824 and len(info.order) == recorded.moe_layers == 6
    assert all(sorted(row) == list(range(32)) for row in info.order)


def test_scores_rank_first_what_was_chosen_and_gates_prediction_it(recorded: Trace) -> None:
    assert recorded.scores is not None and recorded.predictions is not None
    ranked = np.take_along_axis(recorded.scores, recorded.experts.astype(int), axis=2)
    assert (np.diff(ranked, axis=2) <= 0).all()  # in the router's order
    best = np.argmax(recorded.scores, axis=2)[..., None]
    assert (best == recorded.experts).any(2).mean() > 0.8  # except in masked groups
    assert recorded.predictions.shape[2:] == (AHEAD, 4 * CHOSEN)
    for ahead in range(AHEAD):
        asked = recorded.predictions[:, ahead:, ahead]
        assert (recorded.predictions[:, :ahead, ahead] == -1).all() and (asked >= 0).all()
        assert all(len(set(ranked)) == len(ranked) for ranked in asked.reshape(-1, asked.shape[2]).tolist())
        hits = (asked[..., :CHOSEN, None] == recorded.experts[:, ahead:, None, :]).any(2).mean()
        assert hits > 3 * CHOSEN / 32  # by chance, their share


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t", TraceInfo("toy", 1, (0,), 8), 2, scores=False)
    for step, fails in enumerate((False, True, False)):
        recorder.begin([(0, step, 1)], prefill=False)
        recorder.choose(0, np.array([[step, step + 1]]))
        if not fails:
            recorder.end()
    recorder.close()
    trace = read_trace(tmp_path / "t")
    assert trace.experts.tolist() == [[[0, 1]], [[2, 3]]] and trace.steps.tolist() == [0, 1]


def test_tokens_are_the_same_when_recorded(tmp_path: Path) -> None:
    ids = []
    for options in ({}, {"trace": tmp_path / "t", "trace_scores": True}):
        with LLM.load("demo", budget=Budget("8GiB"), heat=False, **options) as llm:
            ids.append(llm.generate([[5, 6, 7]], PARAMS)[0].ids)
    assert ids[0] == ids[1]


def test_what_cannot_be_is_told_before_loading(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trace: .*no such folder"):
        LLM.load("demo", trace=tmp_path / "none" / "t")
    with pytest.raises(UsageError, match="trace_scores"):
        LLM.load("demo", trace_scores=True)


def test_the_commands(tmp_path: Path) -> None:
    prompts, file = tmp_path / "prompts", tmp_path / "t"
    prompts.write_text("The Congress\n\nof the United States\n")
    record = ["trace", "record", "demo", "--prompts", str(prompts), "-o", str(file), "-n", "3"]
    done = CliRunner().invoke(app, record, catch_exceptions=False)
    assert done.exit_code == 0 and "sequences" in done.stdout
    done = CliRunner().invoke(app, ["trace", "info", str(file), "--json", "-"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["sequences"] == 2 and found["model"] == "demo" and not found["scores"]
    assert found["tokens"] - found["prefill_tokens"] == 4
    CliRunner().invoke(
        app, ["trace", "convert", str(file), str(tmp_path / "u"), "--to", "jsonl"], catch_exceptions=False
    )
    assert list(read_trace(tmp_path / "u").passes()) == list(read_trace(file).passes())
    prompts.write_text("\n")
    assert isinstance(CliRunner().invoke(app, record).exception, UsageError)


def test_a_dense_layer_between_moe_layers(toy_qwen3: tuple[Path, Any], tmp_path: Path) -> None:
    """Traces number MoE layers by their place, and remember which they are; gates look one MoE layer ahead."""
    options = {"heat": False, "trace": tmp_path / "t", "trace_scores": True, "predictor": "gate", "ram_slots": 9}
    with LLM.load(toy_qwen3[0], budget=Budget("8GiB"), **options) as llm:
        llm.generate([[7, 8, 9]], PARAMS)
    trace = read_trace(tmp_path / "t", scores=True)
    assert trace.info.moe_layers == (0, 2, 3) and trace.info.layers == 4 and trace.moe_layers == 3
    assert (trace.experts >= 0).all() and trace.predictions is not None
    assert (trace.predictions[:, 1:, 1] >= 0).all() and (trace.predictions[:, 0, 1] == -1).all()
    asked: list[int] = []

    class Asked(GateLookahead):
        def predict(self, layer: int) -> list[ExpertKey]:
            asked.append(layer)
            return super().predict(layer)

    one = [each for each in foresee(trace, Asked(CHOSEN), [CHOSEN]) if each.ahead == 1]
    assert set(asked) == {0, 2, 3} and one[0].recall > 0.3
