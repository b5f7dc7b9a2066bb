"""What a budget means: properties of the plan over random models and budgets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm.attention_spec import Latent, Rope
from tierlm.config import format_size
from tierlm.errors import BudgetError, TierlmError
from tierlm.planning.plan import SLACK, Plan, Sizes, TierPlan, make_plan, workspace_bytes
from tierlm.spec import Dense, LayerSpec, ModelSpec, Moe, RouterSpec, TrunkKey

SETTINGS = settings(deadline=None, derandomize=True, max_examples=150)
PLENTY = 2**50

amounts = st.integers(0, 5000)
models = st.builds(
    Sizes,
    trunk=st.lists(st.integers(1, 3000), min_size=1, max_size=8).map(
        lambda sizes: {TrunkKey(i): size for i, size in enumerate(sizes)}
    ),
    expert=st.integers(1, 1000),
    experts=st.integers(1, 40),
    resident=amounts,
    kv=amounts,
    workspace=amounts,
    logits=amounts,
)


@st.composite
def option_sets(draw: st.DrawFn) -> dict[str, int | None]:
    """The keywords of make_plan, without the budgets."""
    held = st.none() | st.integers(1, 12)
    return {
        "process": draw(amounts),
        "min_slots": draw(st.integers(1, 8)),
        "ram_slots": draw(held),
        "vram_slots": draw(held),
        "resident_trunks": draw(st.none() | st.integers(0, 9)),
    }


options = option_sets()
extras = st.integers(0, 60_000)


def floor_of(sizes: Sizes, tier: str, vram: int | None, given: dict[str, int | None]) -> int:
    """The floor of a tier, from the error for an empty budget."""
    with pytest.raises(BudgetError) as caught:
        make_plan(sizes, ram=0 if tier == "ram" else PLENTY, vram=0 if tier == "vram" else vram, **given)
    assert caught.value.tier == tier
    assert caught.value.given == 0
    return caught.value.floor


def total(plan: TierPlan) -> int:
    return sum(plan.parts.values())


def trunk_bytes(plan: TierPlan, sizes: Sizes) -> int:
    return sum(sizes.trunk[key] for key in plan.trunk)


def least_slots(sizes: Sizes, wanted: int, most: int | None) -> int:
    return min(wanted, sizes.experts, most or wanted)


def most_slots(sizes: Sizes, most: int | None) -> int:
    return min(sizes.experts, most or sizes.experts)


def check_tier(plan: TierPlan, budget: int, sizes: Sizes, min_slots: int, max_slots: int | None) -> None:
    """What holds in each tier."""
    assert plan.floor <= budget
    assert total(plan) <= budget
    assert least_slots(sizes, min_slots, max_slots) <= plan.expert_slots <= most_slots(sizes, max_slots)
    assert plan.parts["trunk"] == trunk_bytes(plan, sizes) + 2 * plan.ring
    assert plan.parts["experts"] == plan.expert_slots * sizes.expert
    assert all(size >= 0 for size in plan.parts.values())
    full = plan.expert_slots == most_slots(sizes, max_slots)
    assert full or total(plan) + sizes.expert > budget, "there was room for another expert"
    assert len(set(plan.trunk)) == len(plan.trunk)


def check_ring(plan: TierPlan, sizes: Sizes, served: set[TrunkKey], most: int | None) -> None:
    """In a tier that does not hold all trunks: the largest stay, and the ring fits the largest of the others."""
    streamed = [sizes.trunk[key] for key in served - set(plan.trunk)]
    assert set(plan.trunk) <= served
    assert plan.ring == max(streamed, default=0)
    assert all(sizes.trunk[key] >= max(streamed, default=0) for key in plan.trunk)
    assert most is None or len(plan.trunk) <= most


@SETTINGS
@given(sizes=models, given_options=options, extra=extras)
def test_one_tier(sizes: Sizes, given_options: dict[str, int | None], extra: int) -> None:
    budget = floor_of(sizes, "ram", None, given_options) + extra
    plan = make_plan(sizes, ram=budget, vram=None, **given_options)
    assert plan.vram is None
    check_tier(plan.ram, budget, sizes, given_options["min_slots"] or 0, given_options["ram_slots"])
    check_ring(plan.ram, sizes, set(sizes.trunk), given_options["resident_trunks"])
    fixed = {"interpreter and libraries": given_options["process"], "slack": SLACK, "logits": sizes.logits}
    fixed |= {"KV cache": sizes.kv, "activations": sizes.workspace, "routers and norms": sizes.resident}
    assert {name: size for name, size in plan.ram.parts.items() if name in fixed} == fixed
    assert set(plan.ram.parts) == {*fixed, "trunk", "experts"}


@SETTINGS
@given(sizes=models, given_options=options, extra=extras, above=extras)
def test_two_tiers(sizes: Sizes, given_options: dict[str, int | None], extra: int, above: int) -> None:
    vram = floor_of(sizes, "vram", None, given_options) + above
    ram = floor_of(sizes, "ram", vram, given_options) + extra
    plan = make_plan(sizes, ram=ram, vram=vram, **given_options)
    assert plan.vram is not None
    check_tier(plan.vram, vram, sizes, given_options["min_slots"] or 0, given_options["vram_slots"])
    check_ring(plan.vram, sizes, set(sizes.trunk), given_options["resident_trunks"])
    check_tier(plan.ram, ram, sizes, 1, given_options["ram_slots"])
    assert not set(plan.ram.trunk) & set(plan.vram.trunk), "what is resident above needs no room below"
    assert plan.ram.ring == max(sizes.trunk.values()), "all that is resident above is loaded through this ring"
    assert len(plan.ram.trunk) <= len(sizes.trunk) - len(plan.vram.trunk)
    most = given_options["resident_trunks"]
    assert most is None or len(plan.ram.trunk) <= most
    state = {"KV cache", "activations", "routers and norms"}
    assert state < set(plan.vram.parts) and not state & set(plan.ram.parts)
    assert {"interpreter and libraries", "slack", "logits"} < set(plan.ram.parts)


@SETTINGS
@given(sizes=models, given_options=options, above=st.none() | extras)
def test_floor(sizes: Sizes, given_options: dict[str, int | None], above: int | None) -> None:
    """A budget of the floor is enough, one byte less is not; the error says what is needed."""
    vram = None if above is None else floor_of(sizes, "vram", None, given_options) + above
    floor = floor_of(sizes, "ram", vram, given_options)
    plan = make_plan(sizes, ram=floor, vram=vram, **given_options)
    assert plan.ram.floor == floor
    assert total(plan.ram) <= floor
    with pytest.raises(BudgetError) as caught:
        make_plan(sizes, ram=floor - 1, vram=vram, **given_options)
    error = caught.value
    assert (error.tier, error.floor, error.given) == ("ram", floor, floor - 1)
    assert error.dominant in {*plan.ram.parts}
    assert f"floor of {format_size(floor)}" in str(error)
    assert error.dominant in str(error)


@SETTINGS
@given(sizes=models, given_options=options)
def test_floor_of_vram(sizes: Sizes, given_options: dict[str, int | None]) -> None:
    floor = floor_of(sizes, "vram", None, given_options)
    plan = make_plan(sizes, ram=PLENTY, vram=floor, **given_options)
    assert plan.vram is not None and plan.vram.floor == floor
    if floor == 0:
        return
    with pytest.raises(BudgetError, match="vram budget") as caught:
        make_plan(sizes, ram=PLENTY, vram=floor - 1, **given_options)
    assert (caught.value.tier, caught.value.floor, caught.value.given) == ("vram", floor, floor - 1)


@SETTINGS
@given(sizes=models, given_options=options, extra=extras, more=st.integers(1, 20_000))
def test_more_ram_is_never_worse(sizes: Sizes, given_options: dict[str, int | None], extra: int, more: int) -> None:
    """Trunks come first, so more ram may mean more trunks and fewer expert slots, but never fewer trunks."""
    budget = floor_of(sizes, "ram", None, given_options) + extra
    less, plan = (make_plan(sizes, ram=size, vram=None, **given_options).ram for size in (budget, budget + more))
    assert plan.floor == less.floor
    assert set(less.trunk) <= set(plan.trunk)
    rank = [(trunk_bytes(tier, sizes), tier.expert_slots) for tier in (less, plan)]
    assert rank[0] <= rank[1]


@SETTINGS
@given(sizes=models, given_options=options, extra=extras, more=st.integers(1, 20_000))
def test_more_vram_is_never_worse(sizes: Sizes, given_options: dict[str, int | None], extra: int, more: int) -> None:
    budget = floor_of(sizes, "vram", None, given_options) + extra
    plans = [make_plan(sizes, ram=PLENTY, vram=size, **given_options).vram for size in (budget, budget + more)]
    rank = [(trunk_bytes(tier, sizes), tier.expert_slots) for tier in plans if tier is not None]
    assert len(rank) == 2 and rank[0] <= rank[1]


@SETTINGS
@given(sizes=models, given_options=options, extra=extras)
def test_ring_is_zero_exactly_when_nothing_streams(
    sizes: Sizes, given_options: dict[str, int | None], extra: int
) -> None:
    budget = floor_of(sizes, "ram", None, given_options) + extra
    plan = make_plan(sizes, ram=budget, vram=None, **given_options).ram
    assert (plan.ring == 0) == (set(plan.trunk) == set(sizes.trunk))


# Examples to follow by hand


def example(**changes: int) -> Sizes:
    """Four trunks of 100 to 400 bytes, 20 experts of 10."""
    trunk = {TrunkKey(i): 100 * (i + 1) for i in range(4)}
    rest = {"expert": 10, "experts": 20, "resident": 1, "kv": 2, "workspace": 3, "logits": 4}
    return Sizes(trunk=trunk, **{**rest, **changes})


def planned(room: int, **options: int | None) -> TierPlan:
    """The plan of the example with ``room`` for trunks and experts."""
    fixed = SLACK + 5 + 1 + 2 + 3 + 4
    keywords = {"process": 5, "min_slots": 4, **options}
    return make_plan(example(), ram=fixed + room, vram=None, **keywords).ram


def test_everything_fits() -> None:
    plan = planned(1000 + 200)
    assert plan.trunk == tuple(TrunkKey(i) for i in range(4))
    assert (plan.ring, plan.expert_slots) == (0, 20)


def test_the_least_that_runs() -> None:
    plan = planned(2 * 400 + 40)  # a ring of the largest, and one token's experts
    assert (plan.trunk, plan.ring, plan.expert_slots) == ((), 400, 4)
    with pytest.raises(BudgetError):
        planned(2 * 400 + 39)


def test_the_largest_trunks_stay() -> None:
    """Resident ones and a ring of two for the others: 200, 300 + 2 * 100, 400 + 2 * 100, ..., and 800 for all."""
    sizes = Sizes({TrunkKey(i): 300 if i == 2 else 100 for i in range(6)}, 10, 20, 0, 0, 0, 0)

    def plan(room: int) -> tuple[tuple[int, ...], int, int]:
        tier = make_plan(sizes, ram=SLACK + room, vram=None, process=0, min_slots=4).ram
        return tuple(key.layer for key in tier.trunk), tier.ring, tier.expert_slots

    assert plan(40 + 500) == ((2,), 100, 4)  # the floor: less than a ring of two slots of 300
    assert plan(40 + 599) == ((2,), 100, 13)  # no other trunk, but nine experts more
    assert plan(40 + 600) == ((0, 2), 100, 4)  # among equals, the one that runs first
    assert plan(40 + 800) == ((0, 1, 2, 3, 4, 5), 0, 4)  # all: as much as three and the ring
    assert plan(40 + 799) == ((0, 1, 2), 100, 13)
    with pytest.raises(BudgetError):
        plan(40 + 499)


def test_limits_are_respected() -> None:
    plan = planned(5000, ram_slots=7, resident_trunks=2)
    assert (plan.trunk, plan.ring, plan.expert_slots) == ((TrunkKey(2), TrunkKey(3)), 200, 7)
    assert planned(5000, ram_slots=2).expert_slots == 2  # limited below one token's experts, which then take turns
    assert planned(5000, resident_trunks=0).trunk == ()
    assert planned(5000, resident_trunks=99).ring == 0


def test_two_tiers_by_hand() -> None:
    plan: Plan = make_plan(
        example(), ram=SLACK + 5 + 4 + 100 + 2 * 400 + 30, vram=6 + 300 + 400 + 2 * 200 + 45, process=5, min_slots=4
    )
    assert plan.vram is not None
    # All four trunks take 1000 of vram's 1145 - 40: nothing streams there.
    assert (plan.vram.trunk, plan.vram.ring, plan.vram.expert_slots) == (tuple(TrunkKey(i) for i in range(4)), 0, 14)
    assert (plan.ram.trunk, plan.ram.ring, plan.ram.expert_slots) == ((), 400, 13)


def test_model_without_experts() -> None:
    plan = make_plan(example(expert=0, experts=0), ram=PLENTY, vram=None, process=5, min_slots=4).ram
    assert (plan.expert_slots, plan.parts["experts"], plan.ring) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "dominant"),
    [({"kv": 2**30}, "KV cache"), ({"workspace": 2**30}, "activations"), ({"expert": 2**30}, "experts"),
     ({"resident": 2**30}, "routers and norms"), ({"logits": 2**30}, "logits"), ({}, "slack")],
)  # fmt: skip
def test_error_says_what_dominates(changes: dict[str, int], dominant: str) -> None:
    with pytest.raises(BudgetError, match=f"what dominates is {dominant} with ") as caught:
        make_plan(example(**changes), ram=1000, vram=None, process=5, min_slots=4)
    assert caught.value.dominant == dominant
    assert isinstance(caught.value, TierlmError)
    assert "1000 B" in str(caught.value) or format_size(1000) in str(caught.value)
    assert ("lower the context" in str(caught.value)) == (dominant == "KV cache")


def test_trunks_dominate() -> None:
    sizes = Sizes({TrunkKey(0): 2**30, TrunkKey(1): 2**29}, 10, 20, 1, 2, 3, 4)
    with pytest.raises(BudgetError) as caught:
        make_plan(sizes, ram=2**20, vram=None, process=5, min_slots=4)
    assert caught.value.dominant == "trunk"


# Activations


def spec_of(experts: int = 64, hidden: int = 2048) -> ModelSpec:
    attention = Latent(16, None, 512, 128, 64, 128, Rope(10000.0, True))
    moe = Moe(experts, 6, 1408, 2 * 1408, RouterSpec("softmax", 1, 1, False, 1.0))
    layers = [LayerSpec(attention, Dense(4096)), *[LayerSpec(attention, moe)] * 3]
    return ModelSpec("deepseek_v2", 1000, hidden, tuple(layers), 1e-6, 4096, 0, (1,), False)


@SETTINGS
@given(chunk=st.integers(1, 4096), context=st.integers(1, 10**6), more=st.integers(1, 4096))
def test_workspace_grows_with_everything(chunk: int, context: int, more: int) -> None:
    base = workspace_bytes(spec_of(), chunk, context)
    assert base > 4 * chunk * 2048
    assert workspace_bytes(spec_of(), chunk + more, context) > base
    assert workspace_bytes(spec_of(), chunk, context + more) >= base
    assert workspace_bytes(spec_of(hidden=4096), chunk, context) >= base
