"""bench/speculation.py forces its texts, and finds the same tokens with and without speculation."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import speculation


def test_every_text_is_measured_both_ways() -> None:
    case = {"model": "demo", "ram": "2GiB", "mtp": False, "tokens": 8, "turns": 1, "settle": 0.0}
    turns = speculation.measure({**case, "texts": ["copy", "edit", "novel"]})
    assert [(turn["kind"], turn["on"]) for turn in turns] == [
        (kind, on) for kind in ("copy", "edit", "novel") for on in (False, True)
    ]
    assert all(turn["tokens_per_step"] >= 1 and turn["hit_rate"] <= 1 for turn in turns)
    assert all(turn["drafted_per_token"] == 0 for turn in turns if not turn["on"])


def test_an_edited_text_differs_now_and_then() -> None:
    own = list(range(30))
    found = speculation.texts(own, 100)
    forced = found["edit"][1]
    assert forced is not None
    constraint = forced()
    answer: list[int] = []
    while len(answer) < len(own):
        mask = constraint.mask(answer)
        assert mask is not None and int(mask.sum()) == 1
        answer.append(int(mask.nonzero()))
    assert [at for at in own if answer[at] != own[at]] == [11, 23]
