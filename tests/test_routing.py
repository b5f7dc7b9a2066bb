"""A router in the kernels, for a few tokens, against torch; and the sum over its choices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toys import TOYS, settings_of
from tierlm.kernels import Groups, Weight, combined, grouped, native, quantise
from tierlm.kernels import routing as routing_kernels
from tierlm.kernels.routing import FEW_ROWS, grouped_reference
from tierlm.models import read_spec, router
from tierlm.models.moe import MixtureOfExperts
from tierlm.models.router import Router
from tierlm.policies.lookahead import Lookahead
from tierlm.policies.prediction import GateLookahead, NoPredictor


def router_of(toy: str, format: str, **changes: Any) -> Router:
    spec = read_spec(settings_of(toy, **changes), "here")
    assert spec.moe is not None
    torch.manual_seed(5)
    resident: dict[str, Weight] = {}
    for layer in spec.moe_layers:
        resident[f"{layer}.norm"] = Weight((1 + 0.2 * torch.randn(spec.hidden)).bfloat16(), "bf16")
        resident[f"{layer}.router"] = quantise(0.5 * torch.randn(spec.experts, spec.hidden), format)
        if spec.moe.router.correction:
            resident[f"{layer}.correction"] = Weight(0.3 * torch.randn(spec.experts), "f32")
        if spec.moe.router.own_norm:
            resident[f"{layer}.router_norm"] = Weight(4 + torch.randn(spec.hidden), "f32")
            resident[f"{layer}.expert_scale"] = Weight(1 + 0.2 * torch.randn(spec.experts), "f32")
    return Router(spec, resident)


@pytest.mark.parametrize("format", ["f32", "bf16"])
@pytest.mark.parametrize("toy", sorted(set(TOYS) - {"gpt-oss"}))  # the kernels have no bias on logits
def test_the_kernels_choose_as_torch_does(toy: str, format: str, monkeypatch: Any) -> None:
    found = router_of(toy, format)
    x, at = torch.randn(FEW_ROWS, found.spec.hidden), found.spec.moe_layers[0]
    few = found.route_ahead(x, at, x, [at, at]), found.rank(x, at, found.spec.experts)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(router, "route_few", lambda *arguments: asked.append(arguments))
        any_rows = found.route_ahead(x, at, x, [at, at]), found.rank(x, at, found.spec.experts)
    assert len(asked) == 4
    assert torch.equal(few[0][1], any_rows[0][1])
    torch.testing.assert_close(few[0][0], any_rows[0][0], rtol=1e-5, atol=1e-7)
    for one, other in zip(few[0][2], any_rows[0][2], strict=True):  # the rankings of the layers ahead
        assert torch.equal(one, other)
    assert torch.equal(few[0][2][0], found.rank(x, at, found.spec.experts_per_token))
    assert found.spec.moe is not None
    rule = found.spec.moe.router
    ranked = found.spec.experts // rule.groups * rule.groups_chosen
    assert torch.equal(few[1][:, :ranked], any_rows[1][:, :ranked])  # masked experts have no defined order
    assert all(sorted(row) == list(range(found.spec.experts)) for row in few[1].tolist())


def test_more_rows_go_to_torch(monkeypatch: Any) -> None:
    found = router_of("v3", "bf16")
    x = torch.randn(FEW_ROWS + 1, found.spec.hidden)
    with monkeypatch.context() as patch:
        patch.setattr(native.load(), "route", None)
        together = found.route(x, 1)
    assert torch.equal(together[1][:FEW_ROWS], found.route(x[:FEW_ROWS], 1)[1])


def test_of_equals_the_lower_number_and_what_is_no_number_last() -> None:
    found = router_of("v2", "f32")
    found._layers[1][0].data.zero_()
    x = torch.ones(2, found.spec.hidden)
    assert found.route(x, 1)[1].tolist() == [[0, 1, 2, 3]] * 2
    x[1, 3] = float("nan")
    weights, experts = found.route(x, 1)
    assert experts[0].tolist() == [0, 1, 2, 3]
    assert weights[1].isnan().all()
    assert experts[1].min() >= 0 and experts[1].max() < found.spec.experts


def test_scores_that_are_far_apart_are_no_trouble_wherever_they_are() -> None:
    """exp(300) overflows float32: the largest score must be subtracted first, in whichever vector lane it is."""
    found = router_of("v2", "f32")
    gate = found._layers[1][0].data
    x = torch.zeros(1, found.spec.hidden)
    x[0, 0] = 1
    for best in range(found.spec.experts):
        gate[:, 0] = torch.linspace(-300, 0, found.spec.experts)
        gate[best, 0] = 300
        weights, experts = found.route(x, 1)
        assert experts[0, 0] == best
        assert weights[0, 0] == 1 and weights[0, 1:].max() < 1e-30


def test_without_shared_experts_nothing_but_the_chosen_is_added() -> None:
    """Unwritten memory may hold anything: here NaN, which torch fills in on request."""
    found = router_of("v2", "f32", n_shared_experts=0)
    spec = found.spec
    shapes = (24, spec.hidden), (24, spec.hidden), (spec.hidden, 24)
    mlps = [[0.1 * torch.randn(shape) for shape in shapes] for _ in range(spec.experts)]
    roles = ("gate_proj", "up_proj", "down_proj")

    class Held(list[Any]):  # the first is resident, the others arrive, two at a time
        def resident(self) -> list[Any]:
            return self[:1]

        def __iter__(self) -> Iterator[Any]:
            return (self[i : i + 2] for i in range(1, len(self), 2))

    class Store:
        lookahead = Lookahead(NoPredictor(spec.experts_per_token), [1])

        @contextmanager
        def acquire(self, layer: int, needed: list[int], streaming: bool) -> Iterator[Any]:
            found = {expert: [Weight(data, "f32") for data in mlps[expert]] for expert in needed}
            yield Held([(expert, dict(zip(roles, found[expert], strict=True))) for expert in needed])

    moe = MixtureOfExperts(spec, found, Store())  # type: ignore[arg-type]
    hidden, x = torch.randn(2, 3, spec.hidden)
    weights, experts = found.route(x, 1)
    expected = hidden.clone()
    for row, (shares, chosen) in enumerate(zip(weights, experts.tolist(), strict=True)):
        for share, expert in zip(shares, chosen, strict=True):
            gated, up, down = mlps[expert]
            expected[row] += share * (torch.nn.functional.silu(x[row] @ gated.T) * (x[row] @ up.T)) @ down.T
    torch.use_deterministic_algorithms(True)
    try:
        given = moe.forward(hidden, x, 1, {}, prefill=True)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_what_most_rows_prediction_comes_first() -> None:
    lookahead = Lookahead(GateLookahead(2), [1])
    assert [key.expert for key in lookahead.predict(1, [[3, 1], [1, 2], [1, 3]])] == [1, 3, 2]
    assert [key.expert for key in lookahead.predict(1, [[3, 1]])] == [3, 1]


def same(one: Groups, other: Groups) -> bool:
    lists = one.experts == other.experts and one.counts == other.counts
    return lists and torch.equal(one.order, other.order) and torch.equal(one.inverse, other.inverse)


@st.composite
def expert_ids(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Ids [T, k], possibly repeated within a row, and the number of experts."""
    rows, chosen, count = draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    used = draw(st.integers(1, count))  # few of many: long groups, and experts without tokens
    ids = st.integers(count - used, count - 1)
    values = draw(st.lists(ids, min_size=rows * chosen, max_size=rows * chosen))
    return torch.tensor(values).view(rows, chosen), count


@settings(deadline=None, derandomize=True)
@given(expert_ids())
def test_pairs_are_grouped_by_expert_in_their_order(drawn: tuple[torch.Tensor, int]) -> None:
    experts, count = drawn
    pairs = experts.flatten().tolist()
    expected = sorted(range(len(pairs)), key=pairs.__getitem__)  # stable
    for groups in (grouped(experts, count), grouped_reference(experts, count)):
        assert groups.experts == sorted(set(pairs))
        assert groups.counts == [pairs.count(expert) for expert in groups.experts]
        assert groups.order.tolist() == expected
        assert groups.order[groups.inverse].tolist() == torch.arange(len(pairs)).view(experts.shape).tolist()


@pytest.mark.parametrize(
    ("rows", "chosen", "count"), [(1, 1, 1), (1, 6, 64), (1, 8, 256), (7, 1, 3), (512, 8, 128), (700, 6, 6)]
)
def test_the_kernels_group_as_torch_does(rows: int, chosen: int, count: int, monkeypatch: Any) -> None:
    torch.manual_seed(7)
    experts = torch.rand(rows, count).topk(chosen, dim=-1).indices
    one = torch.full_like(experts, count - 1)  # one expert takes all
    strided = experts.t().contiguous().t()  # not in the form the kernels need
    reference = grouped_reference(experts, count)
    with monkeypatch.context() as patch:
        patch.setattr(routing_kernels, "grouped_reference", None)  # not requested
        assert same(grouped(experts, count), reference)
        assert same(grouped(one, count), Groups([count - 1], [one.numel()], *ascending(rows, chosen)))
    assert same(grouped(strided, count), reference)
    monkeypatch.setattr(native, "load", lambda: None)
    assert same(grouped(experts, count), reference)


def ascending(rows: int, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and inverse of pairs that are already sorted."""
    pairs = torch.arange(rows * chosen)
    return pairs, pairs.view(rows, chosen)


@pytest.mark.parametrize("compiled", [True, False])
def test_combined_is_the_weighted_sum_beside_the_stream(compiled: bool, monkeypatch: Any) -> None:
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: None)
    hidden, shared = torch.randn(3, 10), torch.randn(3, 10)
    weights, outputs = torch.randn(3, 2), torch.randn(6, 10)
    inverse = torch.tensor([[3, 0], [5, 1], [2, 4]])
    mixed = (weights[..., None] * outputs[inverse]).sum(1)
    torch.testing.assert_close(combined(hidden, shared, weights, outputs, inverse), hidden + shared + mixed)
    torch.testing.assert_close(combined(hidden, None, weights, outputs, inverse), hidden + mixed)
