"""The compiled kernels where random numbers seldom go: halves, row ends, and memory beside the output."""

from __future__ import annotations

import pytest
import torch
from test_kernels import PRODUCTS, TILES, some_mlp, some_weight, taken

from tierlm.kernels import Weight, from_latent, gated_mlps, into_latent, linear, native, widen
from tierlm.kernels.linear import can_absorb
from tierlm.kernels.quantised import quantise, quantise_reference, rounded

HALVES = torch.tensor([[127.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5, 126.5, -126.5]])  # of a scale of one


def test_halves_of_activations_go_to_the_even_number() -> None:
    even = torch.tensor([[127.0, 0, 2, 2, 4, 0, -2, -2, -4, 126, -126]])
    assert torch.equal(rounded(HALVES), even)
    columns = quantise(127 * torch.eye(HALVES.shape[1]), "int8")  # scales of one
    assert torch.equal(linear(HALVES, columns), 127 * even)


def test_halves_of_weights_go_to_the_even_number() -> None:
    """In int8, and in int4, where the largest value is best stored as -8."""
    eights = torch.tensor([[-8.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5, *[-8.0] * 10, *[6.0] * 10]])
    for values, format in ((HALVES, "int8"), (eights, "int4")):
        found, reference = quantise(values, format), quantise_reference(values, format)
        assert torch.equal(found.data, reference.data)
        assert found.scale is not None and reference.scale is not None
        assert torch.equal(found.scale, reference.scale)
    assert torch.equal(widen(quantise(HALVES, "int8")), torch.tensor([[127.0, 0, 2, 2, 4, 0, -2, -2, -4, 126, -126]]))


def test_halves_of_scales_go_to_the_even_float16() -> None:
    step = 2.0**-10
    scales = torch.tensor([1 + step / 2, 1 + 3 * step / 2, 1 + 0.75 * step, 1 + 0.25 * step])
    found = quantise(127 * scales[:, None], "int8").scale
    assert found is not None
    assert found.flatten()[:4].tolist() == [1, 1 + 2 * step, 1 + step, 1]


@pytest.mark.parametrize("format", PRODUCTS)
@pytest.mark.parametrize("column", [0, 40, 69])
def test_what_is_no_number_stays_in_its_row(format: str, column: int) -> None:
    """Rows end within a vector and within a group, and the next row starts right there."""
    weight, x = some_weight(20, 70, format), torch.ones(6, 70)
    x[2, column] = float("nan")
    found = linear(x, weight)
    assert found[2].isnan().all() and found[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("format", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_nothing_is_written_beside_the_output(format: str, rows: int) -> None:
    """The last block of outputs and the last vector of inner values are not full."""
    hidden, width = 21, 13
    mlp = some_mlp(hidden, width, format)
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(8)) / 60
    around = torch.full((rows * hidden + 32,), 7.0)
    gated_mlps([(x, around[16:-16].view(rows, hidden), mlp)])
    assert around[:16].eq(7).all() and around[-16:].eq(7).all()
    assert around[16:-16].isfinite().all() and around[16:-16].ne(7).all()


@pytest.mark.parametrize("format", TILES)
def test_each_group_has_its_own_scale(format: str) -> None:
    """Columns and rows of very different size, which a common scale would lose."""
    sizes = torch.tensor([1e-3, 1.0, 1e2]).repeat_interleave(32)
    values = torch.randn(24, 96, generator=torch.Generator().manual_seed(9)) * sizes
    weight = quantise(values * torch.logspace(-2, 2, 24)[:, None], format)
    for group in range(3):
        x = torch.zeros(5, 96)
        x[:, 32 * group : 32 * group + 32] = torch.randn(5, 32, generator=torch.Generator().manual_seed(group))
        exact = taken(x, weight).double() @ widen(weight).double().t()
        bound = 1e-6 * (x.abs().double() @ widen(weight).abs().double().t())
        assert ((linear(x, weight) - exact).abs() <= bound).all()


@pytest.mark.parametrize("format", PRODUCTS)
def test_latents_of_several_blocks_and_groups(format: str) -> None:
    """Heads and ranks beyond one block of float8 scales, and beyond many groups."""
    heads, nope, value, rank, rows = 5, 40, 24, 300, 3
    kv_b = some_weight(heads * (nope + value), rank, format)
    assert can_absorb(kv_b, rows, nope, value) and native.load() is not None
    exact = widen(kv_b).double().view(heads, nope + value, rank)
    generator = torch.Generator().manual_seed(10)
    q, mixed = torch.randn(rows, heads, nope, generator=generator), torch.randn(heads, rows, rank, generator=generator)
    for found, left, right in (
        (into_latent(q, kv_b, 0, heads), q.transpose(0, 1), exact[:, :nope]),
        (from_latent(mixed, kv_b, 0, heads, value).transpose(0, 1), mixed, exact[:, nope:].transpose(1, 2)),
    ):
        bound = 2e-6 * left.double().abs() @ right.abs()
        assert ((found - left.double() @ right).abs() <= bound).all()


def test_a_sum_at_its_largest() -> None:
    """All numbers at the ends of their range, where 16-bit sums are closest to overflow."""
    for sign in (1.0, -1.0):
        x = sign * torch.full((5, 64), 127.0)
        four = Weight(torch.full((1, 2, 128), 0xFF, dtype=torch.uint8), "int4", torch.ones(1, 2, 8).half(), (8, 64))
        low = Weight(torch.zeros(1, 2, 128, dtype=torch.uint8), "int4", torch.ones(1, 2, 8).half(), (8, 64))
        eight = Weight(torch.full((1, 2, 256), -127, dtype=torch.int8), "int8", torch.ones(1, 2, 8).half(), (8, 64))
        for weight, number in ((four, 7), (low, -8), (eight, -127)):
            assert linear(x, weight).eq(sign * 127 * 64 * number).all()
