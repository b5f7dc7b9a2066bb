"""Eviction policies: what all must do, each against a slow reference, and lookup by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm.errors import UsageError
from tierlm.policies import DEFAULT, POLICIES, make_policy, write_policy
from tierlm.policies.belady import Belady
from tierlm.policies.cycle import Cycle
from tierlm.policies.eviction import Policy, TierInfo
from tierlm.policies.forecast import Forecast
from tierlm.policies.frequency import Lfu
from tierlm.policies.recency import Lru
from tierlm.spec import ExpertKey, HeadKey, Key, ResidentKey, TrunkKey

LAYERS, EXPERTS = 3, 4
SETTING = TierInfo(LAYERS, LAYERS * EXPERTS)
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
DECAY = 0.9  # of the policy cycle
SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)

every_policy = pytest.mark.parametrize("name", POLICIES)
# (event, key): an absent key is inserted whatever is drawn; a present key leaves or is used.
traces = st.lists(st.tuples(st.sampled_from(["use", "use", "prediction", "evict", "discard"]), st.sampled_from(KEYS)))


class Mine(Lru):
    """A policy of someone else's, by "module:Class"."""


class NotOne:
    """No policy."""


@dataclass
class Reference:
    """The full history of a trace: ``uses`` are times since the insertion, ``tokens`` all tokens so far."""

    clock: int = 0
    token: int = 0
    layer: int = -1
    last: dict[Key, int] = field(default_factory=dict)
    uses: dict[Key, int] = field(default_factory=dict)
    tokens: dict[Key, set[int]] = field(default_factory=dict)

    def apply(self, policy: Policy, what: str, key: Key) -> None:
        """Apply one event to both."""
        self.clock += 1
        present = key in self.uses
        if what in ("evict", "discard"):
            if present:
                del self.uses[key], self.last[key]
                (policy.on_evict if what == "evict" else policy.on_discard)(key)
            return
        if present:
            policy.on_hit(key)
        else:
            policy.on_insert(key, demanded=what == "use")
        self.uses[key] = self.uses.get(key, 0) + (present or what == "use")
        if present or what == "use":
            self._pass(key)
        self.last[key] = self.clock

    def _pass(self, key: Key) -> None:
        """Count tokens: a token ends where a layer comes before the last one, or a record comes again."""
        again = self.token in self.tokens.get(key, ())
        self.token += key.layer < self.layer or again
        self.layer = key.layer
        self.tokens.setdefault(key, set()).add(self.token)

    def cycle_score(self, key: Key) -> float:
        """The documented score: layers until the next chance / L + 1/p - 1."""
        share = sum((1 - DECAY) * DECAY ** (self.token - token) for token in self.tokens.get(key, ()))
        distance = next(n for n in range(1, LAYERS + 1) if (self.layer + n) % LAYERS == key.layer)
        return distance / LAYERS + 1 / max(share, Cycle.FLOOR) - 1


def order(policy: Policy) -> list[Key]:
    """All victims in order; a repeated key counts at its first place."""
    return list(dict.fromkeys(policy.victims()))


def replay(name: str, trace: list[tuple[str, Key]]) -> Iterator[tuple[Policy, Reference]]:
    """The policy and the reference after each event of ``trace``."""
    policy, reference = make_policy(name, SETTING), Reference()
    for what, key in trace:
        reference.apply(policy, what, key)
        yield policy, reference


# Every policy


@every_policy
@SETTINGS
@given(trace=traces)
def test_victims_are_the_keys_that_have_a_slot(name: str, trace: list[tuple[str, Key]]) -> None:
    for policy, reference in replay(name, trace):
        assert set(order(policy)) == set(reference.uses)


@every_policy
@SETTINGS
@given(trace=traces, looks=st.lists(st.integers(0, len(KEYS)), max_size=4))
def test_looking_changes_nothing(name: str, trace: list[tuple[str, Key]], looks: list[int]) -> None:
    """Stopping the iteration anywhere loses no key; the next one sees the same order."""
    for policy, _ in replay(name, trace):
        before = order(policy)
        for count in looks:
            assert set(islice(policy.victims(), count)) <= set(before)
        assert order(policy) == before


@every_policy
@SETTINGS
@given(trace=traces, skips=st.lists(st.integers(0, 3), min_size=1))
def test_evicting_while_looking(name: str, trace: list[tuple[str, Key]], skips: list[int]) -> None:
    """As the tier does: skip some victims, evict the next inside the loop, and stop."""
    policy, reference = make_policy(name, SETTING), Reference()
    for step, (what, key) in enumerate(trace):
        reference.apply(policy, what, key)
        if step % 3 == 2:
            for position, victim in enumerate(policy.victims()):
                if position >= skips[step % len(skips)]:
                    reference.apply(policy, "evict", victim)
                    break
        assert set(order(policy)) == set(reference.uses)


@every_policy
def test_evicted_key_comes_again_only_when_reinserted(name: str) -> None:
    policy = make_policy(name, SETTING)
    for key in KEYS:
        policy.on_insert(key)
    gone = set()
    for _ in KEYS:
        victim = order(policy)[0]
        assert victim not in gone
        gone.add(victim)
        policy.on_evict(victim)
    assert order(policy) == []
    policy.on_insert(KEYS[0])
    assert order(policy) == [KEYS[0]]


@every_policy
@pytest.mark.parametrize("demanded", [True, False])
def test_discarded_key_is_gone(name: str, demanded: bool) -> None:
    policy = make_policy(name, SETTING)
    policy.on_insert(KEYS[0], demanded=demanded)
    policy.on_insert(KEYS[1])
    policy.on_discard(KEYS[0])
    assert order(policy) == [KEYS[1]]
    policy.on_insert(KEYS[0], demanded=demanded)
    assert set(order(policy)) == set(KEYS[:2])


@every_policy
def test_prediction_that_comes_back_again_and_again(name: str) -> None:
    """The same key, predicted and dropped many times: one slot, one key."""
    policy = make_policy(name, SETTING)
    policy.on_insert(KEYS[1])
    for _ in range(50):
        policy.on_insert(KEYS[0], demanded=False)
        assert set(order(policy)) == set(KEYS[:2])
        policy.on_evict(KEYS[0])
        assert order(policy) == [KEYS[1]]


def test_lru_takes_keys_of_every_kind() -> None:
    """It is the policy of trunks. Keys of different kinds with equal numbers are different keys."""
    keys: list[Key] = [*map(TrunkKey, range(LAYERS)), *map(HeadKey, range(2)), ResidentKey(), ExpertKey(0, 0)]
    policy = Lru(SETTING)
    for at, key in enumerate(keys):
        policy.on_insert(key, demanded=at % 2 == 0)
    policy.on_hit(TrunkKey(0))
    assert order(policy) == [*keys[1:], TrunkKey(0)]


@every_policy
def test_memory_stays_bounded(name: str) -> None:
    """A policy remembers some records of the model, not its history, however long the run."""
    policy = make_policy(name, SETTING)
    for step in range(5000):
        key = KEYS[step * 7 % len(KEYS)]
        (policy.on_hit if step >= len(KEYS) else policy.on_insert)(key)
        if step % 11 == 10 and step >= len(KEYS):
            policy.on_evict(key)
            policy.on_insert(key, demanded=False)
    held = sum(_members(value) for value in vars(policy).values())
    assert held < 10 * (8 * len(KEYS) + 64 * LAYERS)


def _members(value: object) -> int:
    """The number of items in a container, at any depth."""
    if isinstance(value, dict):
        return sum(1 + _members(item) for item in value.values())
    if isinstance(value, list | set):
        return sum(1 + _members(item) for item in value if not isinstance(item, tuple)) + len(value)
    return 0


# Each against its reference


@SETTINGS
@given(trace=traces)
def test_lru_order(trace: list[tuple[str, Key]]) -> None:
    for policy, reference in replay("lru", trace):
        assert list(policy.victims()) == sorted(reference.last, key=lambda key: reference.last[key])


@SETTINGS
@given(trace=traces)
def test_lfu_order(trace: list[tuple[str, Key]]) -> None:
    for policy, reference in replay("lfu", trace):
        expected = sorted(reference.uses, key=lambda key: (reference.uses[key], reference.last[key]))
        assert list(policy.victims()) == expected


@SETTINGS
@given(
    tokens=st.lists(
        st.tuples(
            st.lists(st.sets(st.integers(0, EXPERTS - 1)), min_size=LAYERS, max_size=LAYERS),
            st.sampled_from(
                [1, 1, 1, 2, 40, 200]
            ),  # repetitions in a row; 200 takes everything else below the floor of p
        ),
        max_size=8,
    ),
    predictions=st.lists(st.sampled_from(KEYS), min_size=1),
    slots=st.integers(1, len(KEYS) - 1),
)
def test_cycle_takes_the_best_score(
    tokens: list[tuple[list[set[int]], int]], predictions: list[Key], slots: int
) -> None:
    policy, reference = make_policy("cycle", SETTING), Reference()
    steps = 0

    def use(what: str, key: Key) -> None:
        if key not in reference.uses and len(reference.uses) == slots:
            _check_cycle(policy, reference)
            reference.apply(policy, "evict", next(iter(order(policy))))
        if key not in reference.uses or what == "use":
            reference.apply(policy, what, key)

    for chosen, repeats in tokens:
        for _ in range(repeats):
            for layer, experts in enumerate(chosen):
                for expert in sorted(experts):
                    use("use", ExpertKey(layer, expert))
                steps += 1
                if steps % 3 == 0:
                    use("prediction", predictions[steps % len(predictions)])
    _check_cycle(policy, reference)


def _check_cycle(policy: Policy, reference: Reference) -> None:
    """Scores fall along the policy's order, and the largest comes first."""
    scores = [reference.cycle_score(key) for key in order(policy)]
    assert len(scores) == len(reference.uses)
    for found, expected in zip(scores, sorted(scores, reverse=True), strict=True):
        assert math.isclose(found, expected, rel_tol=1e-9)


@SETTINGS
@given(trace=traces)
def test_cycle_on_any_trace(trace: list[tuple[str, Key]]) -> None:
    """Even if layers do not come in order."""
    for policy, reference in replay("cycle", trace):
        _check_cycle(policy, reference)


def test_cycle_prefers_what_runs_soon_and_what_is_popular() -> None:
    policy = Cycle(SETTING)
    for _ in range(5):
        for layer in range(LAYERS):
            key = ExpertKey(layer, 0)
            (policy.on_hit if key in set(policy.victims()) else policy.on_insert)(key)
    assert order(policy) == [ExpertKey(2, 0), ExpertKey(1, 0), ExpertKey(0, 0)]  # layer 2 has just run
    policy.on_insert(ExpertKey(0, 1))  # used once: colder than records that all tokens use
    assert order(policy)[0] == ExpertKey(0, 1)


@pytest.mark.parametrize("kind", [Lfu, Cycle])
def test_heaps_stay_bounded(kind: type[Policy]) -> None:
    policy = kind(SETTING)
    for key in KEYS:
        policy.on_insert(key)
    for _ in range(2000):
        for key in KEYS:
            policy.on_hit(key)
    heaps = [policy._ranking._heap] if isinstance(policy, Lfu) else [r._heap for r in policy._rankings.values()]
    residents = len(KEYS) // len(heaps)
    assert all(len(heap) <= 8 * residents + 65 for heap in heaps)


def _hits(name: str, slots: int, tokens: int) -> int:
    """Hits of a run through 8 layers of 16 experts. Each token uses expert 0 of each layer and one other in turn."""
    layers, hits = 8, 0
    policy = make_policy(name, TierInfo(layers, slots))
    resident: set[Key] = set()
    for token in range(tokens):
        for layer in range(layers):
            for expert in (0, 1 + token % 15):
                key = ExpertKey(layer, expert)
                if key in resident:
                    hits += 1
                    policy.on_hit(key)
                    continue
                if len(resident) == slots:
                    victim = next(iter(policy.victims()))
                    policy.on_evict(victim)
                    resident.remove(victim)
                policy.on_insert(key)
                resident.add(key)
    return hits


def test_cycle_hits_where_lru_cannot() -> None:
    """Below one token's working set (16 records), lru has always just dropped the next record."""
    assert _hits("lru", 12, tokens=60) == 0
    assert _hits("cycle", 12, tokens=60) > 60 * 4  # more than half of the eight that are always used


def run(policy: Policy, tokens: list[list[set[int]]], slots: int) -> int:
    """The hits of a run as the engine counts them: a token's layers in turn; records that a layer needs are not
    evicted."""
    resident: set[Key] = set()
    hits = 0
    for chosen in tokens:
        for layer, experts in enumerate(chosen):
            needed = [ExpertKey(layer, expert) for expert in sorted(experts)]
            missing = [key for key in needed if key not in resident]
            for key in needed:
                if key in resident:
                    policy.on_hit(key)
            hits += len(needed) - len(missing)
            for key in missing:
                if len(resident) == slots:
                    victim = next(other for other in policy.victims(key) if other not in needed)
                    policy.on_evict(victim)
                    resident.remove(victim)
                policy.on_insert(key)
                resident.add(key)
    return hits


tokens_of_four = st.lists(
    st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=4), min_size=LAYERS, max_size=LAYERS), max_size=40
)


@every_policy
@SETTINGS
@given(tokens=tokens_of_four, slots=st.integers(4, 20))
def test_belady_is_never_beaten(name: str, tokens: list[list[set[int]]], slots: int) -> None:
    future = [[ExpertKey(layer, e) for e in ids] for token in tokens for layer, ids in enumerate(token)]
    info = TierInfo(LAYERS, slots)
    assert run(make_policy(name, info), tokens, slots) <= run(Belady(info, future), tokens, slots)


def test_belady_refuses_another_future() -> None:
    policy = Belady(SETTING, [[KEYS[0]], [KEYS[1]]])
    policy.on_insert(KEYS[0])
    with pytest.raises(ValueError, match=r"use 2 of .* is demanded, but the trace has 1"):
        policy.on_hit(KEYS[0])


def test_layers_of_one_slot_share_keep_to_it() -> None:
    """Per-layer lru takes the victim from the layer that asks if it has its share, otherwise from the largest."""
    policy = make_policy("layer-lru", TierInfo(2, 4))
    for key in [ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(0, 2), ExpertKey(1, 0)]:
        policy.on_insert(key)
    assert next(policy.victims(ExpertKey(1, 1))) == ExpertKey(0, 0)
    policy.on_evict(ExpertKey(0, 0))
    policy.on_insert(ExpertKey(1, 1))
    assert next(policy.victims(ExpertKey(1, 2))) == ExpertKey(1, 0)
    assert set(policy.victims(ExpertKey(1, 2))) == {ExpertKey(0, 1), ExpertKey(0, 2), ExpertKey(1, 0), ExpertKey(1, 1)}


@pytest.mark.parametrize(("power", "leaves"), [(1.0, ExpertKey(0, 0)), (0.0, ExpertKey(0, 0)), (-1.0, ExpertKey(0, 1))])
def test_gdsf_weighs_sizes(power: float, leaves: Key) -> None:
    """If any record fits the slot, the small one leaves: it is cheap to read again."""
    policy = make_policy("gdsf", TierInfo(1, 2, lambda key: 1 + 9 * key[-1]), power=power)
    for expert in (0, 1):
        policy.on_insert(ExpertKey(0, expert))
    assert next(policy.victims()) == leaves


def _periodic(tokens: int) -> list[list[set[int]]]:
    """A token's choices follow from the last one's alone: six kinds of token, in turn."""
    return [
        [{(5 * (token % 6) + layer + n) % 32 for n in range(2)} for layer in range(LAYERS)] for token in range(tokens)
    ]


def test_echo_knows_what_followed() -> None:
    """All are used equally often, and the most recent one is used again last: hazard learns that; echo also learns the
    successor."""
    tokens, slots = _periodic(120), 18
    rates = {name: run(make_policy(name, TierInfo(LAYERS, slots)), tokens, slots) for name in ("lru", "hazard", "echo")}
    assert rates["lru"] == 0
    assert rates["echo"] > rates["hazard"]
    future = [[ExpertKey(layer, e) for e in ids] for token in tokens for layer, ids in enumerate(token)]
    assert rates["echo"] > 0.8 * run(Belady(TierInfo(LAYERS, slots), future), tokens, slots)


def test_echo_looks_further_ahead_where_slots_last_longer() -> None:
    """Of two equally frequent records, the one three tokens ahead gains on the next one."""
    lead = {}
    for slots in (2, 40):
        policy, present = POLICIES["echo"](TierInfo(1, slots)), set[Key]()
        for token in range(102):  # the last but one, all of which is learnt, is a 0
            for key in (ExpertKey(0, 20), ExpertKey(0, token % 10)):  # 20 begins a turn
                (policy.on_hit if key in present else policy.on_insert)(key)
                present.add(key)
        assert isinstance(policy, Forecast)
        lead[slots] = policy._waits[0, 3] - policy._waits[0, 1]
    assert 0 < lead[40] < 0.7 * lead[2]


def test_echo_outlives_its_memory() -> None:
    """More tokens than it remembers, turns too wide to remember, and late new experts."""
    tokens = _periodic(100)
    tokens[40] = [set(range(40))] * LAYERS
    tokens[70] = [{200, 201}] * LAYERS
    policy = make_policy("echo", TierInfo(LAYERS, 50), memory=64, neighbours=4)
    assert 0 < run(policy, tokens, 50) < sum(len(ids) for token in tokens for ids in token)


@pytest.mark.parametrize("name", ["hazard", "echo"])
def test_what_is_never_used_again_stays_a_number(name: str) -> None:
    policy = make_policy(name, TierInfo(1, 4))
    for expert in range(4):
        policy.on_insert(ExpertKey(0, expert))
    for turn in range(9000):  # a share that only shrank would be 0 by now
        policy.on_hit(ExpertKey(0, turn % 2))
    assert set(list(policy.victims())[:2]) == {ExpertKey(0, 2), ExpertKey(0, 3)}


@pytest.mark.parametrize("name", ["hazard", "echo"])
def test_hazard_takes_earlier_runs_into_account(name: str) -> None:
    policy = make_policy(name, SETTING)
    for key in KEYS:
        policy.expect(key, 0.9 if key.expert == 1 else 0.1)
    for layer in range(LAYERS):  # each layer runs once, unrelated to the others
        for expert in (1, 2, 3, 0):
            policy.on_insert(ExpertKey(layer, expert), demanded=expert == 0)
    policy.on_hit(KEYS[0])
    assert {key.expert for key in list(policy.victims(KEYS[0]))[-LAYERS:]} <= {0, 1}


# By name


def test_default_is_a_name() -> None:
    assert type(make_policy("default", SETTING)) is POLICIES[DEFAULT]


@every_policy
def test_parameters_are_arguments_with_defaults_within_bounds(name: str) -> None:
    kind = POLICIES[name]
    arguments = inspect.signature(kind.__init__).parameters
    for parameter, (low, high) in kind.tunable.items():
        default = arguments[parameter].default
        assert arguments[parameter].kind is inspect.Parameter.KEYWORD_ONLY
        assert low <= default <= high
        assert isinstance(default, int) == (isinstance(low, int) and isinstance(high, int))
        for bound in (low, high):
            policy = make_policy(name, SETTING, **{parameter: bound})
            run(policy, _periodic(12), len(KEYS))


@every_policy
def test_policy_of_a_file(name: str, tmp_path: Path) -> None:
    """The result of a search is saved, and loaded by file name; arguments take precedence."""
    parameters = {parameter: low for parameter, (low, _) in POLICIES[name].tunable.items()}
    write_policy(tmp_path / "best.json", name, parameters)
    policy = make_policy(str(tmp_path / "best.json"), SETTING)
    assert type(policy) is POLICIES[name]
    assert state(policy) == state(make_policy(name, SETTING, **parameters))


def state(policy: Policy) -> dict[str, object]:
    """The parameters of a policy."""
    return {name: value for name, value in vars(policy).items() if isinstance(value, (int, float))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "policy file .*expected an object"),
        ("[]", "policy file .*expected an object"),
        ('{"policy": "lru"}', "policy file .*'parameters'"),
        ('{"policy": 3, "parameters": {}}', "expected the name of a policy"),
        ('{"policy": "x.json", "parameters": {}}', "expected the name of a policy"),
        ('{"policy": "lru", "parameters": []}', "expected the name of a policy"),
        ('{"policy": "best", "parameters": {}}', "unknown policy 'best'"),
        ('{"policy": "cycle", "parameters": {"decoy": 1}}', "unknown parameter 'decoy'; known are decay"),
        ('{"policy": "cycle", "parameters": {"decay": 2}}', r"decay: expected a number from 0.5 to 0.999, found 2"),
        ('{"policy": "cycle", "parameters": {"decay": "0.9"}}', "expected a number"),
        ('{"policy": "lru-k", "parameters": {"k": 2.0}}', "expected an integer from 1 to 8"),
        ('{"policy": "lru-k", "parameters": {"k": true}}', "expected an integer from 1 to 8"),
        ('{"policy": "lru", "parameters": {"k": 1}}', "unknown parameter 'k'; known are none"),
    ],
)
def test_policy_file_that_makes_no_sense(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        make_policy(str(tmp_path / "bad.json"), SETTING)


def test_policy_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.json"):
        make_policy(str(tmp_path / "none.json"), SETTING)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        make_policy("belady", SETTING)
    assert "'belady'" in str(caught.value)
    assert all(name in str(caught.value) for name in POLICIES)


@every_policy
def test_known_name(name: str) -> None:
    policy = make_policy(name, SETTING)
    assert type(policy) is POLICIES[name]
    assert policy.info == SETTING


def test_own_class_by_module_and_name() -> None:
    assert type(make_policy(f"{__name__}:Mine", SETTING)) is Mine


@pytest.mark.parametrize(
    "name", ["no.such.module:Lru", "math:NoSuchClass", ":Lru", "math:", ":", ".relative:Lru", "", "math:sqrt", "LRU"]
)
def test_name_that_leads_nowhere(name: str) -> None:
    with pytest.raises(UsageError):
        make_policy(name, SETTING)


def test_class_that_is_no_policy_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected a complete subclass of tierlm\.policies.*found .*NotOne"):
        make_policy(f"{__name__}:NotOne", SETTING)
