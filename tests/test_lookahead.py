"""Which layers are predicted, when, and in which order chosen predictions are read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tierlm.policies.lookahead import Lookahead
from tierlm.policies.prediction import GateLookahead, Predictor
from tierlm.policies.predictors import make_predictor
from tierlm.policies.prefetch import Always, Measured
from tierlm.spec import ExpertKey

LAYERS = (1, 2, 5, 8)  # dense ones between them, and after the last


def keys(layer: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


@pytest.mark.parametrize(
    ("predictor", "layer", "expected"),
    [
        ("gate", 1, [(2, 1), (5, 2)]),
        ("gate", 5, [(8, 1)]),
        ("gate", 8, []),  # no gate can see the next token
        ("ensemble", 2, [(5, 1), (8, 2)]),
        ("ensemble", 8, [(1, 1), (2, 2)]),
        ("none", 1, []),
    ],
)
def test_targets_are_the_moe_layers_that_follow(predictor: str, layer: int, expected: list[tuple[int, int]]) -> None:
    lookahead = Lookahead(make_predictor(predictor, 2), LAYERS, Always())
    assert lookahead.targets(layer, prefill=False) == expected
    assert lookahead.targets(layer, prefill=True) == (expected if predictor == "gate" else [])
    assert lookahead.before_attention(prefill=False) == (predictor == "gate")


def test_what_is_due_is_up_to_the_prefetch() -> None:
    class Near(Always):
        def due(self, ahead: int, prefill: bool) -> bool:
            return ahead == 1

    lookahead = Lookahead(GateLookahead(2), LAYERS, Near())
    assert lookahead.targets(1, prefill=False) == [(2, 1)]
    assert not lookahead.before_attention(prefill=False)


def test_reads_come_in_the_order_of_the_layers_and_once() -> None:
    lookahead, present = Lookahead(GateLookahead(2), LAYERS, Always()), set(keys(2, 7))
    lookahead.plan(2, keys(2, 7, 3), streaming=False)
    lookahead.plan(5, keys(5, 1), streaming=True)
    lookahead.plan(2, keys(2, 7, 4), streaming=False)  # predicted again just before its attention
    assert lookahead.next_read(present) == (ExpertKey(2, 4), False)
    assert lookahead.next_read(present) == (ExpertKey(2, 4), False)  # until it gets a slot
    present.add(ExpertKey(2, 4))
    assert lookahead.next_read(present) == (ExpertKey(5, 1), True)
    lookahead.turn(5, set())
    assert lookahead.next_read(present) is None


def test_nothing_absent_is_nothing_to_judge() -> None:
    class Asked(Measured):
        asked = 0

        def choose(
            self, layer: int, absent: Sequence[ExpertKey], ahead: int, prefill: bool, backlog: float
        ) -> list[ExpertKey]:
            self.asked += 1
            return super().choose(layer, absent, ahead, prefill, backlog)

    prefetch = Asked()
    lookahead = Lookahead(GateLookahead(2), LAYERS, prefetch)
    assert lookahead.choose(2, [], 1, False, 0.0) == [] and prefetch.asked == 0
    lookahead.choose(2, keys(2, 1), 1, False, 0.0)
    assert prefetch.asked == 1


def test_predictions_go_by_layer_number() -> None:
    predictor: Predictor = GateLookahead(2)
    assert Lookahead(predictor, LAYERS).predict(8, [[3, 1]]) == keys(8, 3, 1)
