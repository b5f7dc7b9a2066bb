"""Predictors: what all must do, and gate lookahead."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm.errors import UsageError
from tierlm.policies.prediction import GateLookahead, NoPredictor, Predictor
from tierlm.policies.predictors import PREDICTORS, make_predictor
from tierlm.spec import ExpertKey

LAYERS, EXPERTS = 4, 8
SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)

every_predictor = pytest.mark.parametrize("name", PREDICTORS)
choices = st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=EXPERTS)
events = st.lists(st.tuples(st.sampled_from(["observe", "gate"]), st.integers(0, LAYERS - 1), choices), max_size=20)


class Mine(NoPredictor):
    """A predictor of someone else's, by "module:Class"."""


def keys(layer: int, experts: list[int]) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


@every_predictor
@SETTINGS
@given(trace=events, width=st.integers(1, EXPERTS))
def test_predictions_are_records_of_the_layer(name: str, trace: list[tuple[str, int, list[int]]], width: int) -> None:
    """Whatever it has seen: distinct keys of the requested layer, the same when asked again."""
    predictor = make_predictor(name, width)
    assert predictor.width == width
    assert predictor.lookahead >= 0
    for what, layer, experts in trace:
        (predictor.observe if what == "observe" else predictor.observe_gate)(layer, experts)
        for asked in range(LAYERS):
            predicted = predictor.predict(asked)
            assert all(type(key) is ExpertKey and key.layer == asked for key in predicted)
            assert len(set(predicted)) == len(predicted)
            assert all(0 <= key.expert < EXPERTS for key in predicted)
            assert predictor.predict(asked) == predicted


@every_predictor
def test_knows_nothing_at_first(name: str) -> None:
    predictor = make_predictor(name, 2)
    assert [predictor.predict(layer) for layer in range(LAYERS)] == [[]] * LAYERS


def test_none_never_predictions() -> None:
    predictor = make_predictor("none", 2)
    predictor.observe(1, [1, 2])
    predictor.observe_gate(1, [1, 2])
    assert predictor.lookahead == 0
    assert predictor.predict(1) == []


@SETTINGS
@given(trace=events, width=st.integers(1, EXPERTS))
def test_gate_returns_what_was_observed(trace: list[tuple[str, int, list[int]]], width: int) -> None:
    """The last outcome reported for a layer since it ran, likeliest first, at most ``width`` of it."""
    predictor = GateLookahead(width)
    known: dict[int, list[int]] = {}
    for what, layer, experts in trace:
        if what == "gate":
            predictor.observe_gate(layer, experts)
            known[layer] = experts
        else:
            predictor.observe(layer, experts)
            known.pop(layer, None)
        for asked in range(LAYERS):
            assert predictor.predict(asked) == keys(asked, known.get(asked, []))


def test_gate_forgets_a_layer_that_has_run() -> None:
    predictor = GateLookahead(2)
    predictor.observe_gate(1, [5, 3, 4])
    predictor.observe_gate(2, [7])
    assert predictor.predict(1) == keys(1, [5, 3, 4])
    predictor.observe(1, [5, 4])
    assert predictor.predict(1) == []
    assert predictor.predict(2) == keys(2, [7])


def test_gate_asks_for_the_gates_of_the_next_layers() -> None:
    assert GateLookahead(2).gates
    assert GateLookahead(2).lookahead >= 1


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        make_predictor("oracle", 2)
    assert "predictor 'oracle'" in str(caught.value)
    assert all(name in str(caught.value) for name in PREDICTORS)


def test_own_class_by_module_and_name() -> None:
    assert type(make_predictor(f"{__name__}:Mine", 2)) is Mine


def test_class_that_is_no_predictor_is_refused() -> None:
    with pytest.raises(UsageError, match="Predictor"):
        make_predictor("tierlm.policies.recency:Lru", 2)


@every_predictor
def test_known_name(name: str) -> None:
    predictor = make_predictor(name, 3)
    assert type(predictor) is PREDICTORS[name]
    assert isinstance(predictor, Predictor)
