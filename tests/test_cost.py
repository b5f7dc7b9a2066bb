"""The cost model: what follows from its definition, and that more of a resource is never slower."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm import BudgetError, UsageError
from tierlm.models.outline import Outline, sizes_of, work_of
from tierlm.planning.cost import (
    Accelerator,
    Formats,
    Machine,
    decode_seconds,
    prefill_seconds,
    side_by_side,
)
from tierlm.planning.forecast import GIB, Question, forecast
from tierlm.planning.known import find_config
from tierlm.planning.routing import Skewed, Uniform
from tierlm.profiling.profile import KernelRate, Profile, Spread, machine_of, percentiles, read_profile, spread

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
MACHINE = Machine(
    disk=4e9, latency=1e-3, weights={"bf16": 10e9, "f32": 5e9, "int8": 20e9, "int4": 40e9},
    products={name: {1: 10e9, 64: 40e9} for name in ("bf16", "f32")} | {name: {2: 90e9} for name in ("int8", "int4")},
    beside=(0.7, 0.5), beside_many=(0.6, 0.4), layer=1e-3, record=1e-4, touch=(1e-9, 4e-9), start=2.0,
)  # fmt: skip
seconds = st.floats(1e-6, 100)
shares = st.floats(0.05, 1.0)


def lite(layers: int | None = None) -> Outline:
    config = dict(find_config("DeepSeek-V2-Lite").config)
    return Outline(config | ({"num_hidden_layers": layers} if layers else {}), "", "bf16")


OUTLINE = lite(12)
WORK, SIZES = work_of(OUTLINE), sizes_of(OUTLINE, 1024, 512, 4)


@SETTINGS
@given(compute=seconds, reading=seconds, arithmetic=shares, disk=shares)
def test_side_by_side(compute: float, reading: float, arithmetic: float, disk: float) -> None:
    """Never faster than the slower of the two alone; equal to it if neither slows the other."""
    both = side_by_side(compute, reading, (arithmetic, disk))
    assert both >= max(compute, reading) * (1 - 1e-9)
    assert side_by_side(compute, reading, (1.0, 1.0)) == pytest.approx(max(compute, reading))
    if arithmetic + disk >= 1:
        assert both <= (compute + reading) * (1 + 1e-9)


def test_side_by_side_by_hand() -> None:
    # Together until the arithmetic's 1 s has taken 2 s at half speed; the disk has done 1 s of its 3 by then.
    assert side_by_side(1.0, 3.0, (0.5, 0.5)) == pytest.approx(4.0)
    assert side_by_side(1.0, 3.0, (0.5, 1.0)) == pytest.approx(3.0)


@SETTINGS
@given(share=st.floats(0, 1), more=st.floats(0, 1))
def test_hit_rates(share: float, more: float) -> None:
    for routing in (Uniform(64, 6), Skewed(64, 6)):
        for batch in (1, 4, 32):
            low, high = routing.rate(min(share, more), batch), routing.rate(max(share, more), batch)
            assert 0 <= low <= high <= 1
    assert Skewed(64, 6).rate(1.0) == pytest.approx(1.0, abs=0.05)
    assert Skewed(64, 6).rate(0.0) == 0.0


@pytest.mark.parametrize("routing", [Uniform(64, 6), Skewed(64, 6), Skewed(8, 2, skew=2.0)])
def test_sequences_share_experts(routing: Uniform | Skewed) -> None:
    """One token uses its own; each further sequence adds fewer; none adds more than its own."""
    used = [routing.used(batch) for batch in (1, 2, 3, 1000)]
    assert used[0] == pytest.approx(routing.chosen) and used[3] <= routing.experts
    assert used[0] > used[1] - used[0] > used[2] - used[1] > 0
    assert used[1] <= Uniform(routing.experts, routing.chosen).used(2) + 1e-9, "popular experts are shared more often"


def test_hit_rates_of_one_sequence_as_documented() -> None:
    """The row "typical, 64 experts" of docs/planning.md."""
    rates = [Skewed(64, 8).rate(share) for share in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)]
    assert rates == pytest.approx([0.08, 0.17, 0.38, 0.56, 0.64, 0.77, 0.90], abs=0.006)


def test_hit_rates_of_a_batch_are_those_of_drawn_sequences() -> None:
    """Each of 8 sequences draws experts by Zipf's law; the popular half is in the slots."""
    chance, routing = np.random.default_rng(0), Skewed(64, 6, stickiness=0.0)
    weights = np.arange(1, 65) ** -0.5
    draws = chance.random((4000, 8, 64)) < 6 * weights / weights.sum()
    demanded = draws.any(1)
    assert routing.used(8) == pytest.approx(demanded.sum(1).mean(), rel=0.01)
    assert routing.rate(0.5, 8) == pytest.approx(demanded[:, :32].sum() / demanded.sum(), abs=0.005)


def test_a_batch_reads_each_expert_once_and_computes_each_row() -> None:
    one = decode_seconds(WORK, MACHINE, (0.5, 0.5), (0, 0), 100)
    eight = decode_seconds(WORK, MACHINE, (0.5, 0.5), (0, 0), 100, 8, used=24.0)
    assert eight.disk_bytes == pytest.approx(4 * one.disk_bytes)
    rate = MACHINE.product_rate("bf16", 2), MACHINE.product_rate("bf16", 8)  # rows of an expert, of the trunk
    trunk = WORK.trunk_weights + WORK.shared_weights + WORK.head_weights
    expected = WORK.routed_weights / rate[0] + trunk / rate[1] + WORK.attention * 100 / 5e9
    assert eight.compute == pytest.approx(8 * expected)
    assert eight.overhead == one.overhead
    mixture = 8 * (WORK.routed_weights / rate[0] + WORK.shared_weights / rate[1])
    beside_reads = side_by_side(mixture, eight.disk, MACHINE.beside)
    assert eight.total == pytest.approx(eight.compute - mixture + one.overhead + beside_reads)
    card = dataclasses.replace(MACHINE, accelerator=Accelerator(memory=500e9, link=5e9, products=1e13))
    assert decode_seconds(WORK, card, (0.5, 0.5), (0, 0), 0, 8, 24.0).link == pytest.approx(
        4 * decode_seconds(WORK, card, (0.5, 0.5), (0, 0), 0).link
    )


@pytest.mark.parametrize("accelerator", [None, Accelerator(memory=500e9, link=5e9, products=1e13)])
def test_more_sequences_are_more_tokens_a_second_and_fewer_bytes_a_token(accelerator: Accelerator | None) -> None:
    machine = dataclasses.replace(MACHINE, accelerator=accelerator)
    found = [
        forecast(SIZES, WORK, machine, dataclasses.replace(ask(6 * GIB, vram=accelerator and 2 * GIB), batch=batch))
        for batch in (1, 2, 4, 8)
    ]
    speeds = [one.worst.decode for one in found]  # few slots may hold what one sticky sequence reuses, and no more
    assert speeds == sorted(speeds) and all(b < 2 * a for a, b in itertools.pairwise(speeds))
    read = [one.worst.step.disk_bytes / batch for one, batch in zip(found, (1, 2, 4, 8), strict=True)]
    assert read == sorted(read, reverse=True)
    assert all(one.low <= one.worst.decode <= one.typical.decode <= one.high for one in found)


def test_a_decode_step_by_hand() -> None:
    step = decode_seconds(WORK, MACHINE, (0.25, 0.25), (0, 0), 0)
    missed = 11 * 6 * 0.75
    assert step.disk_bytes == pytest.approx(missed * WORK.expert_bytes)
    assert step.disk == pytest.approx(missed * WORK.expert_bytes / 4e9 + 11e-3)
    assert step.compute == pytest.approx(WORK.active_weights / 10e9)
    assert step.overhead == pytest.approx(12e-3)
    assert step.total == pytest.approx(step.compute + step.overhead + step.exposed)
    assert step.bound == "disk"
    resident = decode_seconds(WORK, MACHINE, (1.0, 1.0), (0, 0), 0)
    assert (resident.disk, resident.bound) == (0, "compute")
    assert resident.total == pytest.approx(step.compute + step.overhead)


def test_a_prefill_reads_each_record_once_a_chunk() -> None:
    one = prefill_seconds(WORK, MACHINE, 0.0, (0, 0), 512, 512)
    everything = WORK.moe_layers * WORK.experts * WORK.expert_bytes
    assert one.disk_bytes == pytest.approx(everything, rel=0.01)
    two = prefill_seconds(WORK, MACHINE, 0.0, (0, 0), 1024, 512)
    assert two.disk_bytes == pytest.approx(2 * everything, rel=0.01)
    first = prefill_seconds(WORK, MACHINE, 0.0, (0, 0), 512, 512, slot_bytes=10**9, workspace=10**8)
    assert first.total == pytest.approx(one.total + 1.0 + 0.4), "memory that is written to for the first time"
    single = prefill_seconds(WORK, MACHINE, 0.0, (0, 0), 1, 512)
    assert single.disk_bytes == pytest.approx(11 * 6 * WORK.expert_bytes)
    assert single.overhead == pytest.approx(12 * 1e-3 + 11 * 6 * 1e-4), "a layer's, and that of each expert"


def test_each_part_at_the_rate_of_its_format() -> None:
    work = dataclasses.replace(WORK, formats=Formats("int4", "int8", "bf16"))
    step = decode_seconds(work, MACHINE, (1.0, 1.0), (0, 0), 0)
    parts = work.routed_weights / 40e9, (work.shared_weights + work.trunk_weights) / 20e9, work.head_weights / 10e9
    assert step.compute == pytest.approx(sum(parts))
    prompt = prefill_seconds(work, MACHINE, 1.0, (0, 0), 64, 512)
    whole = 64 * (work.routed_weights + work.shared_weights + work.trunk_weights) / 90e9 + work.head_weights / 10e9
    assert prompt.compute == pytest.approx(whole + work.attention * 64 * 32 / 40e9)


def test_product_rates_between_those_measured() -> None:
    assert [MACHINE.product_rate("bf16", rows) for rows in (0.5, 1, 8, 64, 500)] == [10e9, 10e9, 25e9, 40e9, 40e9]


def ask(ram: int, machine: Machine = MACHINE, vram: int | None = None) -> Question:
    return Question(ram=ram, vram=vram, context=1024, prompt=128, chunk=512)


@SETTINGS
@given(ram=st.integers(2, 20), more=st.integers(1, 8), disk=st.floats(1, 4))
def test_more_of_anything_is_never_slower(ram: int, more: int, disk: float) -> None:
    less = forecast(SIZES, WORK, MACHINE, ask(ram * GIB))
    roomier = forecast(SIZES, WORK, MACHINE, ask((ram + more) * GIB))
    faster = forecast(SIZES, WORK, dataclasses.replace(MACHINE, disk=4e9 * disk), ask(ram * GIB))
    for found in (roomier, faster):
        assert found.typical.decode >= less.typical.decode * (1 - 1e-9)
    for found in (less, roomier, faster):
        assert found.low <= found.worst.decode <= found.typical.decode * (1 + 1e-9)
        assert found.typical.decode <= found.high * (1 + 1e-9)
        assert all(speed >= found.typical.decode * (1 - 1e-9) for speed in found.more.values())


def test_a_card_computes_and_its_link_may_bind() -> None:
    card = Accelerator(memory=500e9, link=5e9, products=1e13)
    machine = dataclasses.replace(MACHINE, accelerator=card)
    found = forecast(SIZES, WORK, machine, ask(20 * GIB, vram=3 * GIB))
    assert found.plan.vram is not None
    assert found.typical.step.disk_bytes < 1e7 and found.typical.step.bound == "link"
    assert found.more["a link twice as fast"] > 1.5 * found.typical.decode
    assert "1 GiB more vram" in found.more


def test_cliffs_are_told() -> None:
    tight = forecast(SIZES, WORK, MACHINE, ask(1536 * 2**20))
    assert any("do not fit and are read again" in warning for warning in tight.warnings)
    assert any("fewer than the 66 experts of one token" in warning for warning in tight.warnings)
    assert forecast(SIZES, WORK, MACHINE, ask(8 * GIB), ram_free=16 * GIB).warnings == ()
    (warning,) = forecast(SIZES, WORK, MACHINE, ask(8 * GIB), ram_free=8 * GIB).warnings
    assert "less than a tenth" in warning
    with pytest.raises(BudgetError, match="below the floor"):
        forecast(SIZES, WORK, MACHINE, ask(GIB // 2))


def test_rates_say_where_they_are_from(tmp_path: Path) -> None:
    assert set(machine_of(None, False).origins.values()) == {"assumed"}
    assert machine_of(None, True).accelerator is not None
    profile = Profile("today", "a processor", 2, 2**34, 2**33, beside=(0.5, 0.25), layer=2e-3, record=3e-4)
    machine = machine_of(profile, False)
    assert (machine.beside, machine.layer, machine.record) == ((0.5, 0.25), 2e-3, 3e-4)
    assert machine.origins["layer"] == "measured today" and machine.origins["disk"] == "assumed"
    profile.write(tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == dataclasses.replace(
        profile, memory=[], disks=[], kernels=[], missing=[]
    )
    (tmp_path / "other.json").write_text(json.dumps({"version": 99}))
    for name, why in (("other.json", "version 99"), ("absent.json", "cannot be read")):
        with pytest.raises(UsageError, match=why):
            read_profile(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        {"cores": 0},
        {"cores": "2"},
        {"cores": 2.5},
        {"ram": -1},
        {"beside": [0.0, 0.5]},
        {"beside": [0.5]},
        {"layer": math.inf},
        {"record": math.nan},
        {"touch": 3},
        {"disk_capacity": None},
        {"kernels": [{"format": "bf16", "rows": 0, "threads": 1, "rate": {"median": 1.0, "low": 1.0, "high": 1.0}}]},
        {"links": {"device memory": {"median": 0, "low": 1, "high": 1}}},
        {"links": {"device memory": {"median": 1, "low": 1}}},
        {"memory": [None]},
        {"when": ["today"]},
    ],
)
def test_a_profile_with_values_that_nothing_measures(change: dict[str, Any], tmp_path: Path) -> None:
    profile = Profile("today", "a processor", 2, 2**34, 2**33)
    (tmp_path / "p.json").write_text(json.dumps(dataclasses.asdict(profile) | change))
    with pytest.raises(UsageError, match="expected a file from `tierlm profile --json`, found"):
        read_profile(tmp_path / "p.json")


def test_a_model_without_experts_hits_always() -> None:
    assert Skewed(0, 0).rate(0.0) == 1.0 and Skewed(0, 0).used(4) == Uniform(0, 0).used(4) == 0.0


def test_a_format_that_was_not_measured_is_taken_to_be_bound_by_memory() -> None:
    def kernel(format: str, rows: int, rate: float) -> KernelRate:
        return KernelRate(format, rows, 2, Spread(rate, rate, rate))

    kernels = [kernel("bf16", 1, 9e9), kernel("bf16", 64, 45e9), kernel("int4", 1, 40e9), kernel("int4", 64, 100e9)]
    machine = machine_of(Profile("today", "a processor", 2, 2**34, 2**33, kernels=kernels), False)
    assert (machine.weights["int4"], machine.product_rate("int4", 64)) == (40e9, 100e9)
    assert machine.weights["int8"] == pytest.approx(9e9 * 16 / 8.5)
    assert machine.product_rate("int8", 64) == 45e9 and machine.product_rate("int8", 1) == machine.weights["int8"]
    assert machine.origins["int4"] == "measured today" and machine.origins["int8"] == "bf16's, by the bytes of a weight"


@dataclasses.dataclass(frozen=True)
class Always:
    """Routing with one hit rate."""

    hits: float

    def used(self, batch: int) -> float:
        return Uniform(64, 6).used(batch)

    def rate(self, share: float, batch: int = 1) -> float:
        return self.hits


@pytest.mark.parametrize("vram", [None, 3 * GIB])
def test_a_recorded_hit_rate_takes_the_place_of_the_assumed_one(vram: int | None) -> None:
    machine = dataclasses.replace(MACHINE, accelerator=None if vram is None else Accelerator(5e11, 5e9, 1e13))
    assumed = forecast(SIZES, WORK, machine, ask(4 * GIB, vram=vram))
    none = forecast(SIZES, WORK, machine, ask(4 * GIB, vram=vram), recorded=Always(0.0))
    every = forecast(SIZES, WORK, machine, ask(4 * GIB, vram=vram), recorded=Always(1.0))
    assert (none.typical.hit_rate, every.typical.hit_rate) == (0.0, 1.0)
    assert none.typical.decode < assumed.typical.decode < every.typical.decode
    assert none.worst == assumed.worst == every.worst
    for found in (none, every):  # even if recorded routing is worse than uniform
        assert found.low <= min(found.worst.decode, found.typical.decode) <= found.high


def test_medians_and_percentiles() -> None:
    assert spread([3, 1, 2]) == Spread(2, 1, 3)
    assert spread([4, 1, 2, 3]) == Spread(2.5, 1, 4)
    assert percentiles([float(i) for i in range(1, 101)]) == (50, 90, 99)
    assert percentiles([7.0]) == (7, 7, 7)
