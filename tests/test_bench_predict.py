"""The bench that compares predictions with measurements, on the embedded model; the table of machines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tierlm.checkpoints.hub import DEMO
from tierlm.profiling.profile import Profile

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import machines
import predict


def test_a_case_is_measured_and_predicted_alike() -> None:
    case = {"model": str(DEMO), "ram": "2GiB", "tokens": 6, "prompt": 20, "routing": "uniform"}
    found = predict.measure(case)
    assert found["hit_rate"] == 1.0 and found["slots"] == 192 and found["decode"] > 0
    prediction = predict.predict(case, Profile("today", "p", 2, 2**34, 2**34), found)
    assert prediction["predicted_slots"] == found["slots"] and prediction["predicted_hit_rate"] == 1.0
    assert prediction["predicted_decode"] == pytest.approx(prediction["predicted_decode_at_bytes"], rel=0.01)
    assert all(value >= 0 for value in prediction.values())


def test_the_table_has_a_cell_for_each_machine_and_more_is_never_slower() -> None:
    rows = machines.speeds("DeepSeek-V3", "int4")
    assert len(rows) == len(machines.CARDS) * len(machines.RAMS)
    for row in rows:
        worst = [pair[0] for pair in row["decode"]]
        typical = [pair[1] for pair in row["decode"]]
        assert len(typical) == 3 and worst == sorted(worst) and typical == sorted(typical)
        assert all(low <= high for low, high in row["decode"])
    by_ram = [row["decode"][0][1] for row in rows[: len(machines.RAMS)]]
    assert by_ram == sorted(by_ram)
