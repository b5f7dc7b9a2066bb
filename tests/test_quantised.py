"""int8 and int4 weights: the order in a tile, the rounding, and the error."""

from __future__ import annotations

import pytest
import torch

from tierlm.formats import FORMATS
from tierlm.kernels import Weight, quantise
from tierlm.kernels.linear import widen_reference
from tierlm.kernels.quantised import quantise_reference, rounded

TILES = ["int8", "int4"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square, relative."""
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("format", TILES)
def test_every_byte_is_where_the_format_says(format: str) -> None:
    """Random bytes in random places, against the format's definition."""
    outs, ins = 21, 70
    (_, (blocks, groups, size)), (_, scales) = FORMATS[format].parts((outs, ins)).values()
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (blocks, groups, size), generator=generator, dtype=torch.uint8)
    data = data.view(torch.int8) if format == "int8" else data
    scale = torch.rand(scales, generator=generator).half()
    found = widen_reference(Weight(data, format, scale, (outs, ins)))
    assert found.shape == (outs, ins)
    for row in range(outs):
        for column in range(ins):
            tile, r, c = data[row // 8, column // 32], row % 8, column % 32
            if format == "int8":
                number = int(tile[32 * (c // 4) + 4 * r + c % 4])
            else:
                byte = int(tile[32 * (c % 16 // 4) + 4 * r + c % 4])
                number = (byte & 15 if c < 16 else byte >> 4) - 8
            assert found[row, column] == number * float(scale[row // 8, column // 32, r])


@pytest.mark.parametrize(("format", "most"), [("int8", 0.0056), ("int4", 0.082)])
def test_what_quantising_a_gaussian_loses(format: str, most: float) -> None:
    exact = gaussian(64, 1024)
    assert error(widen_reference(quantise(exact, format)), exact) < most


@pytest.mark.parametrize("format", TILES)
@pytest.mark.parametrize("shape", [(1, 1), (8, 32), (21, 70), (64, 512)])
def test_compiled_and_reference_make_the_same_weight(format: str, shape: tuple[int, int]) -> None:
    """Except where sums in another order choose the other of two equally good scales."""
    exact = gaussian(*shape) * torch.logspace(-6, 4, shape[0])[:, None]
    found, reference = quantise(exact, format), quantise_reference(exact, format)
    assert found.scale is not None and reference.scale is not None
    assert found.data.shape == reference.data.shape and found.data.dtype == reference.data.dtype
    same = (found.data == reference.data).all(-1) & (found.scale == reference.scale).all(-1)
    assert same.float().mean() > 0.8
    for row, exact_row in enumerate(exact):
        lost = (widen_reference(reference)[row] - exact_row).norm()
        assert (widen_reference(found)[row] - exact_row).norm() <= lost * 1.01 + 1e-9


def test_searching_the_scale_beats_taking_the_largest_value_in_every_group() -> None:
    exact = gaussian(64, 1024)
    groups = exact.view(64, -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = (groups / scale).round() * scale
    searched = widen_reference(quantise(exact, "int4")).view_as(groups)
    lost, least = (plain - groups).square().sum(-1), (searched - groups).square().sum(-1)
    assert (least <= lost * 1.05).all()  # scales of 16 bits, and steps of a search
    assert least.sum() < 0.75 * lost.sum()


@pytest.mark.parametrize("format", TILES)
def test_what_is_on_the_grid_stays(format: str) -> None:
    once = widen_reference(quantise(gaussian(16, 64), format))
    assert error(widen_reference(quantise(once, format)), once) < 1e-3


@pytest.mark.parametrize("format", TILES)
def test_zeros_outliers_and_the_smallest_values(format: str) -> None:
    weight = torch.zeros(8, 96)
    weight[1, 5] = -1e6  # beyond the largest float16 scale times the largest int4 number
    weight[2, 40] = 1e-12  # below the smallest scale
    weight[3, 70] = 3.0
    found = widen_reference(quantise(weight, format))
    assert found.isfinite().all()
    assert found[0].eq(0).all() and found[2].eq(0).all()
    assert found[1, 5] <= -65504 * 7
    assert found[3, 70] == pytest.approx(3.0, rel=1e-3) and found[3].count_nonzero() == 1


@pytest.mark.parametrize("format", TILES)
def test_padding_is_zero_and_slices_of_rows_give_the_same_tiles(format: str) -> None:
    exact = gaussian(21, 70)
    whole = quantise(exact, format)
    parts = [quantise(exact[start : start + 8], format) for start in (0, 8, 16)]
    assert torch.equal(whole.data, torch.cat([part.data for part in parts]))
    assert whole.scale is not None
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts if part.scale is not None]))
    padded = widen_reference(Weight(whole.data, format, whole.scale, (24, 96)))
    assert padded.shape == (24, 96)
    assert padded[21:].eq(0).all() and padded[:, 70:].eq(0).all()


def test_rounded_activations() -> None:
    x = gaussian(5, 70, seed=2)
    assert error(rounded(x), x) < 0.006
    assert torch.allclose(rounded(rounded(x)), rounded(x), rtol=1e-6)
    assert torch.equal(rounded(x)[:, 64:], rounded(x[:, 64:].contiguous()))  # a group of its own
    assert rounded(torch.zeros(1, 32)).eq(0).all() and rounded(torch.full((1, 32), 1e-38)).eq(0).all()
