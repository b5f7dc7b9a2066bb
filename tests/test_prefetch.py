"""Which predictions are read: the account of their savings and costs, on a manual clock."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm.policies.pace import CLEAR, FAR, NEAR, NONE, REVISIT, TRIAL, TURNS, WAYS, Pace
from tierlm.policies.prefetch import MEMORY, Measured
from tierlm.spec import ExpertKey

READ = 0.010  # seconds for one record


class Layers:
    """A model of two layers, A (0) and B (1). B's experts are predicted while A runs: ``right`` of four come true."""

    def __init__(self, window: float, compute: float, absent: int, cpu: float = 0.0):
        self.now = 0.0
        self.prefetch = Measured(lambda: self.now)
        self.prefetch.read(READ, cpu)
        self.window, self.compute, self.absent = window, compute, absent

    def step(self, right: int, backlog: float = 0.0, prefill: bool = False) -> list[ExpertKey]:
        """One step through both; returns the reads chosen for B."""
        self.prefetch.turn(0, [])
        predicted = [ExpertKey(1, expert) for expert in range(4)]
        chosen = self.prefetch.choose(1, predicted, 1, prefill, backlog / READ)
        self.now += self.window
        self.prefetch.turn(1, predicted[:right])
        self.now += self.compute
        self.prefetch.layer_done(self.absent, self.compute, prefill)
        return chosen


def test_nothing_is_read_before_anything_is_known() -> None:
    assert Layers(1.0, 0.001, 4).step(4) == []


@pytest.mark.parametrize("prefill", [False, True])
def test_right_predictions_are_read_as_far_as_the_window_goes(prefill: bool) -> None:
    layers = Layers(window=2.5 * READ, compute=0.0, absent=8)
    for _ in range(10):
        chosen = layers.step(4, prefill=prefill)
    assert [key.expert for key in chosen] == [0, 1, 2]  # two in full; half of a third is a gain too


def test_a_link_that_is_busy_for_longer_than_the_window_takes_no_prediction() -> None:
    layers = Layers(window=3 * READ, compute=0.0, absent=8)
    for _ in range(10):
        layers.step(4)
    assert len(layers.step(4, backlog=1.5 * READ)) == 2
    assert layers.step(4, backlog=3.01 * READ) == []


def test_a_layer_that_would_not_wait_needs_no_prediction() -> None:
    layers = Layers(window=10 * READ, compute=5 * READ, absent=4)
    for _ in range(10):
        assert layers.step(4) == []


def test_no_more_is_read_than_what_the_layer_would_wait_for() -> None:
    layers = Layers(window=10 * READ, compute=2.5 * READ, absent=4)  # waits for one and a half
    for _ in range(10):
        chosen = layers.step(4)
    assert len(chosen) == 2


def test_wrong_predictions_are_not_read_where_they_would_be_in_the_way() -> None:
    layers = Layers(window=0.3 * READ, compute=0.0, absent=8)
    for _ in range(MEMORY):
        chosen = layers.step(1)
    assert [key.expert for key in chosen] == [0]  # the likeliest is always right, the others never


def test_the_processor_time_of_a_read_can_outweigh_it() -> None:
    layers = Layers(window=10 * READ, compute=0.0, absent=8, cpu=1.01 * READ)
    for _ in range(MEMORY):
        assert layers.step(4) == []


def test_precision_is_learned_from_predictions_that_were_not_read() -> None:
    layers = Layers(window=READ, compute=0.0, absent=8)
    for _ in range(2 * MEMORY):
        chosen = layers.step(0)
    assert chosen == []
    for _ in range(4 * MEMORY):
        chosen = layers.step(4)
    assert [key.expert for key in chosen] == [0]


@settings(derandomize=True, deadline=None)
@given(
    window=st.floats(0, 0.1),
    compute=st.floats(0, 0.1),
    absent=st.integers(0, 10),
    right=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    backlog=st.floats(0, 0.1),
)
def test_what_is_chosen_is_predicted_in_order_and_fits(
    window: float, compute: float, absent: int, right: list[int], backlog: float
) -> None:
    layers = Layers(window, compute, absent)
    for count in right:
        chosen = [key.expert for key in layers.step(count, backlog)]
        assert chosen == sorted(set(chosen))
        assert backlog + READ * (len(chosen) - 1) <= window or not chosen
        assert READ * (len(chosen) - 4) <= max(0.0, absent * READ - compute)


def test_how_far_is_looked_ahead_is_up_to_the_pace_but_for_a_prefill() -> None:
    prefetch = Measured()
    for way, far in ((NONE, []), (NEAR, [1]), (FAR, [0, 1, 2])):
        prefetch.pace.way = way
        assert [ahead for ahead in range(3) if prefetch.due(ahead, False)] == far
        assert all(prefetch.due(ahead, True) for ahead in range(3))


def ways(pace: Pace, steps: int, *cost: float) -> list[int]:
    """The way each step was done. ``cost``: of each way."""
    done = []
    for _ in range(steps):
        done.append(pace.way)
        pace.add(cost[pace.way])
    return done


TRIED = len(TURNS) * (CLEAR - 1) + len(TURNS)  # steps of a trial that tells as soon as it can


@pytest.mark.parametrize("better", WAYS)
def test_the_fastest_way_is_found_kept_and_left_when_it_is_no_longer_the_fastest(better: int) -> None:
    pace = Pace()
    cost = [1.0 if way == better else 1.1 for way in WAYS]
    trial = ways(pace, TRIED, *cost)
    assert trial == list(TURNS) * CLEAR
    done = ways(pace, 20 * REVISIT, *cost)
    assert done.count(better) >= 20 * REVISIT * (REVISIT - 1) // REVISIT - 1
    assert all(done.count(other) >= 9 for other in WAYS if other != better)
    follower = (better + 1) % len(WAYS)
    cost = [1.0 if way == follower else 1.2 for way in WAYS]
    ways(pace, 3 * TRIAL * REVISIT, *cost)
    assert ways(pace, 10 * REVISIT, *cost).count(follower) > 8 * REVISIT


@pytest.mark.parametrize("better", WAYS)
def test_a_way_that_is_much_slower_is_looked_at_seldom_and_taken_up_soon_when_it_is_not(better: int) -> None:
    pace, worse = Pace(), (better + 1) % len(WAYS)
    cost = [2.0] * len(WAYS)
    cost[better] = 1.0
    done = ways(pace, TRIED + 1000, *cost)
    assert CLEAR + 3 <= done.count(worse) <= 2 * CLEAR + 6
    cost[worse] = 0.5
    assert ways(pace, 200 + 2 * TRIAL, *cost)[-TRIAL:] == [worse] * TRIAL


def test_where_the_ways_are_alike_the_trial_takes_its_time_and_ends_without_predictions() -> None:
    pace, costs = Pace(), [itertools.cycle([1.0, 1.1, 1.2]) for _ in WAYS]
    done = []
    for _ in range(len(TURNS) * TRIAL + 10 * REVISIT):
        done.append(pace.way)
        pace.add(next(costs[pace.way]))
    trial = len(TURNS) * TRIAL
    assert done[:trial] == list(TURNS) * TRIAL
    assert done[trial:].count(NONE) > 8 * REVISIT


def test_predictions_that_gain_next_to_nothing_are_not_followed() -> None:
    """One percent is less than noise, and less than a useless read may cost elsewhere."""
    pace = Pace()
    ways(pace, TRIED, 1.0, 0.99, 0.985)
    assert ways(pace, 10 * REVISIT, 1.0, 0.99, 0.985).count(NONE) > 8 * REVISIT
    pace = Pace()
    ways(pace, TRIED, 1.0, 0.96, 0.97)
    assert ways(pace, 10 * REVISIT, 1.0, 0.96, 0.97).count(NEAR) > 8 * REVISIT


def test_one_slow_step_decides_nothing() -> None:
    pace = Pace()
    ways(pace, len(TURNS) * TRIAL, 1.1, 1.0, 1.1)
    while pace.way != NEAR:
        pace.add(1.1)
    pace.add(100.0)
    assert ways(pace, 2 * REVISIT, 1.1, 1.0, 1.1).count(NEAR) >= 2 * REVISIT - 3


def test_steps_are_timed_from_the_first_layer_to_the_last() -> None:
    """Time between two steps, as when a person reads, does not count; a prefill is no step."""
    layers = Layers(window=1.0, compute=0.5, absent=4)
    seen: list[float] = []
    layers.prefetch.pace.add = seen.append  # type: ignore[method-assign]
    layers.step(4, prefill=True)
    for _ in range(3):
        layers.step(4)
        layers.now += 50.0
    layers.step(4)
    assert seen == [1.5, 1.5, 1.5]
