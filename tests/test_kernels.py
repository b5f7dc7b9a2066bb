"""The compiled kernels against the torch reference, over formats and odd sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm.kernels import Weight, gated_mlp, linear, native, widen
from tierlm.kernels.linear import linear_reference, widen_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def some_weight(outs: int, ins: int, dtype: torch.dtype, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(outs, ins, generator=generator)
    if dtype != torch.float8_e4m3fn:
        return Weight(data.to(dtype))
    return Weight((60 * data).to(dtype), 0.1 + torch.rand(-(-outs // 128), -(-ins // 128), generator=generator))


def test_the_kernels_were_built() -> None:
    """CI has a compiler: a silent fallback there would leave everything below untested."""
    assert native.load() is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(rows=st.integers(1, native.MAX_ROWS), outs=st.integers(1, 300), ins=st.integers(1, 300))
def test_equal_to_float64(dtype: torch.dtype, rows: int, outs: int, ins: int) -> None:
    weight = some_weight(outs, ins, dtype)
    x = torch.randn(rows, ins, generator=torch.Generator().manual_seed(1))
    assert native.kernels_for(weight.data, weight.scale) is not None
    exact = x.double() @ widen(weight).double().t()
    bound = 1e-6 * (x.abs().double() @ widen(weight).abs().double().t()) + 1e-30
    for found in (linear(x, weight), linear_reference(x, weight)):
        assert ((found - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_finite_value_is_widened_exactly(dtype: torch.dtype) -> None:
    """All bit patterns, subnormals included, one to an output: times one, they come out as they are."""
    size = 256 if dtype.itemsize == 1 else 65536
    values = torch.arange(size).to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype).float()
    values = values[values.isfinite()].to(dtype)
    scale = torch.ones(-(-len(values) // 128), 1) if dtype.itemsize == 1 else None
    found = linear(torch.ones(1, 1), Weight(values[:, None].contiguous(), scale))[0]
    assert torch.equal(found, values.float())
    wide = values[: len(values) // 16 * 16].view(-1, 16)  # and through the vector path
    picked = torch.zeros(1, 16)
    picked[0, 5] = 1.0
    scale = torch.ones(-(-len(wide) // 128), 1) if dtype.itemsize == 1 else None
    assert torch.equal(linear(picked, Weight(wide.contiguous(), scale))[0], wide[:, 5].float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_threads_and_repetition_do_not_reach_the_result(dtype: torch.dtype) -> None:
    weight, x = some_weight(1000, 517, dtype), torch.randn(11, 517, generator=torch.Generator().manual_seed(2))
    together = linear(x, weight)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for _ in range(20):
                assert torch.equal(linear(x, weight), together)
            assert torch.equal(torch.cat([linear(row[None], weight) for row in x]), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(1, 1), (129, 300), (256, 128), (40, 515)])
def test_widened_float8_equals_the_reference_bit_for_bit(shape: tuple[int, int]) -> None:
    weight = some_weight(*shape, torch.float8_e4m3fn)
    assert weight.scale is not None
    assert torch.equal(widen(weight), widen_reference(weight.data, weight.scale))
    if shape[0] > 128:
        for start, stop in ((128, None), (37, 131), (128, 129)):
            assert torch.equal(widen(weight, start, stop), widen_reference(weight.data, weight.scale)[start:stop])


def test_what_the_kernels_do_not_know_goes_to_torch() -> None:
    slab = torch.zeros(4096, dtype=torch.uint8)
    inside = slab[128 : 128 + 2 * 30 * 20].view(torch.bfloat16).view(30, 20)  # a view into a slot is known
    inside.copy_(torch.randn(30, 20, generator=torch.Generator().manual_seed(3)))
    assert native.kernels_for(inside, None) is not None
    assert native.kernels_for(inside.t(), None) is None
    assert native.kernels_for(inside.double(), None) is None
    assert native.kernels_for(inside.to(torch.float8_e4m3fn), None) is None
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(5)).t()  # not contiguous
    assert torch.allclose(linear(rows, Weight(inside)), linear(rows.contiguous(), Weight(inside)), atol=1e-5)
    assert torch.allclose(linear(rows, Weight(inside.t().contiguous().t())), rows @ inside.float().t(), atol=1e-5)


def test_gated_mlp_is_silu_of_gate_times_up_then_down() -> None:
    gate, up, down = (some_weight(*shape, torch.bfloat16, i) for i, shape in enumerate([(48, 32), (48, 32), (32, 48)]))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))
    hidden = torch.nn.functional.silu(x @ widen(gate).t()) * (x @ widen(up).t())
    assert torch.allclose(gated_mlp(x, gate, up, down), hidden @ widen(down).t(), atol=1e-3, rtol=1e-4)
