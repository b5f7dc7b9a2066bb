"""A router by the kernels, for a few tokens, against the same in torch; and the sum over what it chose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.toys import TOYS, settings_of
from tierlm.checkpoints.formats import MAKERS
from tierlm.kernels import Weight, combined, native
from tierlm.kernels.routing import FEW_ROWS
from tierlm.models import read_spec, router
from tierlm.models.moe import MixtureOfExperts
from tierlm.models.router import Router
from tierlm.policies.prediction import GateLookahead, NoPredictor


def router_of(toy: str, format: str, **changes: Any) -> Router:
    spec = read_spec(settings_of(toy, **changes), "here")
    assert spec.moe is not None
    torch.manual_seed(5)
    resident: dict[str, Weight] = {}
    for layer in spec.moe_layers:
        resident[f"{layer}.norm"] = Weight((1 + 0.2 * torch.randn(spec.hidden)).bfloat16())
        resident[f"{layer}.router"] = MAKERS[format](0.5 * torch.randn(spec.experts, spec.hidden))
        if spec.moe.router.correction:
            resident[f"{layer}.correction"] = Weight(0.3 * torch.randn(spec.experts))
    return Router(spec, resident)


@pytest.mark.parametrize("format", ["f32", "bf16"])
@pytest.mark.parametrize("toy", TOYS)
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
    for one, other in zip(few[0][2], any_rows[0][2], strict=True):  # what the layers ahead make of it
        assert torch.equal(one, other)
    assert torch.equal(few[0][2][0], found.rank(x, at, found.spec.experts_per_token))
    assert found.spec.moe is not None
    rule = found.spec.moe.router
    ranked = found.spec.experts // rule.groups * rule.groups_chosen
    assert torch.equal(few[1][:, :ranked], any_rows[1][:, :ranked])  # the order of what is closed is anybody's
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
    """exp(300) is no float32: the largest score has to be taken off before, whichever lane of a vector has it."""
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
    """Memory that is not written to holds anything: here, as torch makes it on request, no numbers."""
    found = router_of("v2", "f32", n_shared_experts=0)
    spec = found.spec
    shapes = (24, spec.hidden), (24, spec.hidden), (spec.hidden, 24)
    mlps = [[0.1 * torch.randn(shape) for shape in shapes] for _ in range(spec.experts)]
    roles = ("gate_proj", "up_proj", "down_proj")

    class Store:
        prefetch = SimpleNamespace(due=lambda ahead, prefill: False)

        @contextmanager
        def acquire(self, layer: int, needed: list[int], streaming: bool) -> Iterator[Any]:
            yield [[(expert, dict(zip(roles, map(Weight, mlps[expert]), strict=True))) for expert in needed]]

    moe = MixtureOfExperts(spec, found, Store(), NoPredictor(spec.experts_per_token))  # type: ignore[arg-type]
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


def test_what_most_rows_guess_comes_first() -> None:
    hints: list[list[int]] = []
    store = SimpleNamespace(hint=lambda layer, keys, ahead, streaming: hints.append([key.expert for key in keys]))
    spec = router_of("v2", "f32").spec
    moe = MixtureOfExperts(spec, None, store, GateLookahead(2))  # type: ignore[arg-type]
    moe._hint(1, 1, True, torch.tensor([[3, 1], [1, 2], [1, 3]]))
    moe._hint(1, 1, False, torch.tensor([[3, 1]]))
    assert hints == [[1, 3, 2], [3, 1]]


@pytest.mark.parametrize("compiled", [True, False])
def test_combined_is_the_weighted_sum_beside_the_stream(compiled: bool, monkeypatch: Any) -> None:
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: None)
    hidden, shared = torch.randn(3, 10), torch.randn(3, 10)
    weights, outputs = torch.randn(3, 2), torch.randn(6, 10)
    places = [3, 0, 5, 1, 2, 4]
    expected = hidden + shared + (weights[..., None] * outputs[torch.tensor(places).view(3, 2)]).sum(1)
    torch.testing.assert_close(combined(hidden, shared, weights, outputs, places), expected)
