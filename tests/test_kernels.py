"""The compiled kernels against the torch reference, over formats and odd sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm.kernels import Weight, from_latent, gated_mlp, gated_mlps, into_latent, linear, native, widen
from tierlm.kernels.linear import linear_reference, widen_reference
from tierlm.kernels.quantised import quantise, rounded

FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "fp8": torch.float8_e4m3fn}
TILES = ["int8", "int4"]
FORMATS = [*FLOATS, *TILES]
# Both ways to multiply with int8 and int4.
PRODUCTS = [*FORMATS, "int8 exact", "int4 exact"]


def some_weight(outs: int, ins: int, format: str, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(outs, ins, generator=generator)
    if format.split()[0] in TILES:
        return replace(quantise(data, format.split()[0]), exact=format.endswith("exact"))
    if format != "fp8":
        return Weight(data.to(FLOATS[format]), format)
    scale = 0.1 + torch.rand(-(-outs // 128), -(-ins // 128), generator=generator)
    return Weight((60 * data).to(FLOATS[format]), format, scale)


def taken(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Activations as a product with ``weight`` rounds them."""
    return rounded(x) if weight.rounds else x


def test_the_kernels_were_built() -> None:
    """CI has a compiler: a silent fallback would leave everything below untested."""
    assert native.load() is not None


@pytest.mark.parametrize("format", PRODUCTS)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(rows=st.integers(1, native.MAX_ROWS), outs=st.integers(1, 300), ins=st.integers(1, 300))
def test_equal_to_float64(format: str, rows: int, outs: int, ins: int) -> None:
    weight = some_weight(outs, ins, format)
    x = torch.randn(rows, ins, generator=torch.Generator().manual_seed(1))
    assert native.kernels_for(weight) is not None
    exact = taken(x, weight).double() @ widen(weight).double().t()
    bound = 1e-6 * (x.abs().double() @ widen(weight).abs().double().t()) + 1e-30
    for found in (linear(x, weight), linear_reference(x, weight)):
        assert ((found - exact).abs() <= bound).all()


@pytest.mark.parametrize("format", ["f16", "bf16", "fp8"])
def test_every_finite_value_is_widened_exactly(format: str) -> None:
    """All bit patterns, subnormals included, one per output: times one, each is unchanged."""
    dtype = FLOATS[format]
    size = 256 if dtype.itemsize == 1 else 65536
    values = torch.arange(size).to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype).float()
    values = values[values.isfinite()].to(dtype)
    scale = torch.ones(-(-len(values) // 128), 1) if dtype.itemsize == 1 else None
    found = linear(torch.ones(1, 1), Weight(values[:, None].contiguous(), format, scale))[0]
    assert torch.equal(found, values.float())
    wide = values[: len(values) // 16 * 16].view(-1, 16)  # and through the vector path
    picked = torch.zeros(1, 16)
    picked[0, 5] = 1.0
    scale = torch.ones(-(-len(wide) // 128), 1) if dtype.itemsize == 1 else None
    assert torch.equal(linear(picked, Weight(wide.contiguous(), format, scale))[0], wide[:, 5].float())


@pytest.mark.parametrize("format", PRODUCTS)
def test_rows_threads_and_repetition_do_not_reach_the_result(format: str) -> None:
    weight, x = some_weight(1000, 517, format), torch.randn(11, 517, generator=torch.Generator().manual_seed(2))
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


@pytest.mark.parametrize("format", PRODUCTS)
@pytest.mark.parametrize("rows", [19, 130])
def test_each_of_many_rows_gets_what_it_gets_alone(format: str, rows: int) -> None:
    """Many rows share widened or unpacked weights, some columns at a time; the last columns, weight rows and rows of
    activations fill no block of any kernel."""
    weight, x = some_weight(101, 1103, format), torch.randn(rows, 1103, generator=torch.Generator().manual_seed(4))
    kernels, together, alone = native.load(), torch.empty(rows, 101), torch.empty(rows, 101)
    assert kernels is not None
    kernels.linear(x, weight, together)
    for row in range(rows):
        kernels.linear(x[row, None], weight, alone[row, None])
    assert torch.equal(alone, together)
    if kernels.fast(weight, rows):
        assert torch.equal(linear(x, weight), together)


@pytest.mark.parametrize("shape", [(1, 1), (129, 300), (256, 128), (40, 515)])
def test_widened_float8_equals_the_reference_bit_for_bit(shape: tuple[int, int]) -> None:
    weight = some_weight(*shape, "fp8")
    assert weight.scale is not None
    assert torch.equal(widen(weight), widen_reference(weight))
    if shape[0] > 128:
        for start, stop in ((128, None), (37, 131), (128, 129)):
            assert torch.equal(widen(weight, start, stop), widen_reference(weight)[start:stop])


@pytest.mark.parametrize("format", TILES)
@pytest.mark.parametrize("shape", [(1, 1), (8, 32), (129, 300), (40, 515)])
def test_widened_tiles_equal_the_reference_bit_for_bit(shape: tuple[int, int], format: str) -> None:
    weight = some_weight(*shape, format)
    assert torch.equal(widen(weight), widen_reference(weight))
    if shape[0] > 8:
        for start, stop in ((8, None), (11, 13), (37, 40)):
            assert torch.equal(widen(weight, start, stop), widen_reference(weight)[start:stop])


@pytest.mark.parametrize("format", TILES)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_an_activation_that_is_no_number_reaches_its_row_and_no_other(format: str, wrong: float) -> None:
    weight, x = some_weight(20, 70, format), torch.ones(3, 70)
    x[1, 40] = wrong
    for found in (linear(x, weight), linear_reference(x, weight)):
        assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_what_the_kernels_do_not_know_goes_to_torch() -> None:
    slab = torch.zeros(4096, dtype=torch.uint8)
    inside = slab[128 : 128 + 2 * 30 * 20].view(torch.bfloat16).view(30, 20)  # a view into a slot
    inside.copy_(torch.randn(30, 20, generator=torch.Generator().manual_seed(3)))
    assert native.kernels_for(Weight(inside, "bf16")) is not None
    assert native.kernels_for(Weight(inside.t(), "bf16")) is None
    assert native.kernels_for(Weight(inside.double(), "bf16")) is None
    assert native.kernels_for(Weight(inside.to(torch.float8_e4m3fn), "fp8")) is None
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(5)).t()  # not contiguous
    weight, turned = Weight(inside, "bf16"), Weight(inside.t().contiguous().t(), "bf16")
    assert torch.allclose(linear(rows, weight), linear(rows.contiguous(), weight), atol=1e-5)
    assert torch.allclose(linear(rows, turned), rows @ inside.float().t(), atol=1e-5)


def some_mlp(hidden: int, width: int, format: str, seed: int = 0) -> tuple[Weight, Weight, Weight]:
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    return tuple(some_weight(*shape, format, seed + i) for i, shape in enumerate(shapes))  # type: ignore[return-value]


@pytest.mark.parametrize("format", PRODUCTS)
@settings(deadline=None, derandomize=True, max_examples=20)
@given(rows=st.sampled_from([1, 2, 5, 64, 65]), hidden=st.integers(1, 200), width=st.integers(1, 200))
def test_gated_mlp_is_silu_of_gate_times_up_then_down(format: str, rows: int, hidden: int, width: int) -> None:
    mlp = some_mlp(hidden, width, format)
    size = 1.0 if format != "fp8" else 0.02  # moderate arguments of silu
    x = size * torch.randn(rows, hidden, generator=torch.Generator().manual_seed(4))
    gate, up, down = (widen(weight).double() for weight in mlp)
    x64 = taken(x, mlp[0]).double()
    inner = torch.nn.functional.silu(x64 @ gate.t()) * (x64 @ up.t())
    terms = (x64.abs() @ gate.abs().t()) * (x64.abs() @ up.abs().t())  # possible cancellation
    bound = 2e-6 * (terms @ down.abs().t()).max() + 1e-30
    if mlp[2].rounds:  # a value halfway between two numbers may round to either
        inner = rounded(inner.float()).double()
        bound += 2 * inner.abs().max() / 127 * down.abs().max()
    assert ((gated_mlp(x, *mlp) - inner @ down.t()).abs() <= bound).all()


def test_silu_at_its_ends_and_of_what_is_no_number() -> None:
    values = torch.tensor([-80.0, -20.0, -1.0, -0.0, 1e-38, 1.0, 88.0, 200.0, 1e4, float("nan")])
    one = Weight(torch.ones(1, 1), "f32")
    found = gated_mlp(values[:, None], one, Weight(torch.full((1, 1), 1.0), "f32"), one)[:, 0]
    exact = values.double().sigmoid() * values.double() ** 2
    small = exact.abs() < 1e-30
    assert torch.allclose(found[~small].double(), exact[~small].float().double(), rtol=1e-5, equal_nan=True)
    assert (found[small].abs() < 1e-30).all()


@pytest.mark.parametrize("format", PRODUCTS)
def test_experts_side_by_side_have_the_bits_that_each_has_alone(format: str) -> None:
    generator = torch.Generator().manual_seed(6)
    mlps = [some_mlp(300, 140, format, 10 * i) for i in range(5)]
    xs = [
        torch.randn(rows, 300, generator=generator) / 30 for rows in (1, 3, 500, 1, 64)
    ]  # two calls for int8 and int4
    outs = [torch.empty_like(x) for x in xs]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            gated_mlps(list(zip(xs, outs, mlps, strict=True)))
            for x, out, mlp in zip(xs, outs, mlps, strict=True):
                assert torch.equal(out, gated_mlp(x, *mlp))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("format", PRODUCTS)
@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    rows=st.integers(1, 12),
    heads=st.integers(1, 5),
    nope=st.integers(1, 140) | st.sampled_from([8, 64, 128]),
    value=st.integers(1, 140) | st.sampled_from([8, 64, 128]),
    rank=st.integers(1, 140),
    data=st.data(),
)
def test_into_and_out_of_the_latent_space(
    format: str, rows: int, heads: int, nope: int, value: int, rank: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, heads - 1))
    group = data.draw(st.integers(1, heads - first))
    kv_b = some_weight(heads * (nope + value), rank, format)
    exact = widen(kv_b).double().view(heads, nope + value, rank)[first : first + group]
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(rows, heads, nope + 3, generator=generator)[:, first : first + group, :nope]
    mixed = torch.randn(group, rows, rank, generator=generator)
    for found, left, right in (
        (into_latent(q, kv_b, first, heads), q.transpose(0, 1), exact[:, :nope]),
        (from_latent(mixed, kv_b, first, heads, value).transpose(0, 1), mixed, exact[:, nope:].transpose(1, 2)),
    ):
        bound = 2e-6 * left.double().abs() @ right.abs() + 1e-30
        assert ((found - left.double() @ right).abs() <= bound).all()
