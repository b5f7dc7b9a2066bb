"""Conformance of every format that can be packed, and of two toys: one class and one line of the registry each.

Those of GGUF are only read: test_ggml.py."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tierlm.kernels
from tierlm import LLM, Budget, SamplingParams, UsageError
from tierlm.checkpoints import pack
from tierlm.formats import FORMATS, Format, Part, Shape, recognise
from tierlm.formats.dtypes import torch_dtypes
from tierlm.formats.ggml import GGML
from tierlm.kernels import Weight, gated_mlp, linear, quantise, widen
from tierlm.kernels.linear import widen_reference
from tierlm.kernels.quantised import rounded
from tierlm.kernels.weight import BFLOAT, EXACT, NUMBERS, TILES
from tierlm.models.catalog import Catalog
from tierlm.models.outline import work_of
from tierlm.models.packing import pack_model
from tierlm.planning.cost import decode_seconds
from tierlm.planning.mixtures import MIXTURES
from tierlm.profiling.profile import machine_of

RAM = Budget("8GiB")
SHAPES = [(1, 1), (24, 48), (131, 48), (200, 129), (256, 160)]
SAMPLING = SamplingParams(max_new_tokens=12, ignore_eos=True)


class ScaledHalves(Format):
    """float16, and a float32 scale for each block of 3 rows x 8 columns. Its data have f16's dtype."""

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        return {"": ("F16", shape), "_block_scale": ("F32", (-(-shape[0] // 3), -(-shape[1] // 8)))}

    def make(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        scale = functional.max_pool2d(matrix.abs()[None], (3, 8), ceil_mode=True)[0].clamp(min=1e-30)
        return (matrix / self.wide(scale, matrix.shape)).half(), scale

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape, extra: Tensor | None = None) -> Tensor:
        assert scale is not None
        return data.float() * self.wide(scale, shape)

    def wide(self, scale: Tensor, shape: Shape) -> Tensor:
        return scale.repeat_interleave(3, dim=0).repeat_interleave(8, dim=1)[: shape[0], : shape[1]]


class FourBits(Format):
    """Four-bit numbers, and a float16 scale for 16 columns of a row. Its parts are named like int4's."""

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        groups = -(-shape[1] // 16)
        return {"": ("U8", (shape[0], 8 * groups)), "_scale": ("F16", (shape[0], groups))}

    def make(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        groups = functional.pad(matrix, (0, -matrix.shape[1] % 16)).view(len(matrix), -1, 16)
        scale = (groups.abs().amax(-1) / 7).half()
        numbers = torch.where(scale[..., None] == 0, 0.0, groups / scale[..., None].float()).round().clamp(-7, 7) + 8
        numbers = numbers.to(torch.uint8)
        return (numbers[..., :8] | numbers[..., 8:] << 4).flatten(1), scale

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape, extra: Tensor | None = None) -> Tensor:
        assert scale is not None
        halves = data.view(*scale.shape, 8)
        numbers = torch.cat((halves & 15, halves >> 4), dim=-1).float() - 8
        return (numbers * scale[..., None].float()).flatten(1)[:, : shape[1]].contiguous()


TOYS: dict[str, Format] = {
    "halves": ScaledHalves("halves", (3, 8), 3 * 8 * 2 + 4, "F16", floats=True, packable=True),
    "u4": FourBits("u4", (1, 16), 8 + 2, "U8", rounds=True, packable=True),
}
PACKABLE = [name for name, format in FORMATS.items() if format.packable]


@pytest.fixture(params=[*PACKABLE, *TOYS])
def format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Format:
    """Each format that a packed weight can have."""
    if request.param in TOYS:
        monkeypatch.setitem(FORMATS, request.param, TOYS[request.param])
    return FORMATS[request.param]


def parts_of(weight: Weight) -> list[Tensor]:
    return [weight.data] if weight.scale is None else [weight.data, weight.scale]


def some_matrix(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# --- the arithmetic


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_made_has_the_parts_that_the_format_names(format: Format, shape: Shape) -> None:
    made, parts = quantise(some_matrix(shape), format.name), format.parts(shape)
    assert (made.format, made.shape) == (format.name, shape)
    expected = [(torch_dtypes()[dtype], stored) for dtype, stored in parts.values()]
    assert [(part.dtype, tuple(part.shape)) for part in parts_of(made)] == expected
    assert recognise(shape, parts.get) is format


def test_parts_of_whole_blocks_take_the_bytes_of_the_blocks(format: Format) -> None:
    rows, columns = format.block
    made = quantise(some_matrix((4 * rows, 3 * columns)), format.name)
    assert sum(part.nbytes for part in parts_of(made)) == 12 * format.block_bytes
    assert 12 * rows * columns * format.bits == 8 * 12 * format.block_bytes


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_lost_fits_the_bits(format: Format, shape: Shape) -> None:
    """At least half of the bits are precision."""
    matrix = some_matrix(shape)
    wide = widen(quantise(matrix, format.name))
    assert wide.shape == shape and wide.dtype == torch.float32
    assert (wide - matrix).norm() <= 2 ** (-format.bits / 2) * matrix.norm()
    assert format.bits < 32 or torch.equal(wide, matrix)


def test_zeros_stay(format: Format) -> None:
    assert torch.equal(widen(quantise(torch.zeros(40, 40), format.name)), torch.zeros(40, 40))


def test_rows_of_whole_blocks_give_slices_of_the_weight(format: Format) -> None:
    step = format.block[0]
    matrix = some_matrix((2 * step + 1, 70))
    whole = quantise(matrix, format.name)
    parts = [parts_of(quantise(matrix[at : at + step], format.name)) for at in range(0, len(matrix), step)]
    assert all(torch.equal(torch.cat(pieces), part) for *pieces, part in zip(*parts, parts_of(whole), strict=True))


def test_any_rows_can_be_widened(format: Format) -> None:
    weight = quantise(some_matrix((270, 40)), format.name)
    wide = widen_reference(weight)
    for start, stop in ((0, None), (0, 1), (5, 6), (128, 260), (255, 270), (127, 999)):
        assert torch.equal(widen(weight, start, stop), wide[start:stop])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_a_product_is_one_with_the_widened_weight(format: Format, rows: int, exact: bool) -> None:
    made = quantise(some_matrix((140, 70)), format.name)
    weight = Weight(made.data, made.format, made.scale, made.shape, exact)
    x = torch.randn(rows, 70, generator=torch.Generator().manual_seed(2))
    assert weight.rounds == (format.rounds and not exact)
    taken = rounded(x) if weight.rounds else x
    assert torch.allclose(linear(x, weight), taken @ widen(weight).T, rtol=1e-4, atol=1e-4)


def test_a_gated_mlp_is_three_products(format: Format) -> None:
    gate, up, down = (quantise(some_matrix(shape), format.name) for shape in ((40, 70), (40, 70), (70, 40)))
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(2)) / 8
    expected = linear(functional.silu(linear(x, gate)) * linear(x, up), down)
    assert torch.allclose(gated_mlp(x, gate, up, down), expected, rtol=1e-3, atol=1e-4)


# --- from pack to text


@pytest.fixture
def packed(format: Format, toy_v3: tuple[Path, Any], tmp_path: Path) -> Path:
    """A toy model with all matrices in the format."""
    pack_model(toy_v3[0], tmp_path / "packed", experts=format.name, trunk=format.name)
    return tmp_path / "packed"


def test_a_model_is_packed_loaded_and_run(format: Format, packed: Path, tmp_path: Path, ids: list[int]) -> None:
    """Its logits equal those of a model whose float32 matrices have the same values; its tokens are the same at every
    budget."""
    pack_model(packed, tmp_path / "wide", experts="f32", trunk="f32")
    with LLM.load(tmp_path / "wide", budget=RAM) as llm:
        expected = llm.logits(ids)
    with LLM.load(packed, budget=RAM, exact=True) as llm:
        assert torch.allclose(llm.logits(ids), expected, rtol=1e-3, atol=1e-3)
    texts = []
    for tight in ({}, {"ram_slots": 4, "resident_trunks": 0}):
        with LLM.load(packed, budget=RAM, **tight) as llm:
            texts.append(llm.generate([ids], SAMPLING)[0].ids)
    assert texts[0] == texts[1] and len(texts[0]) == SAMPLING.max_new_tokens


def test_slices_that_are_converted_one_by_one_make_the_same_file(
    format: Format, packed: Path, toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "SLICE_VALUES", 1)  # the lm_head has 131 rows, a slice 128 or more
    pack_model(toy_v3[0], tmp_path / "slices", experts=format.name, trunk=format.name)
    for file in packed.glob("*.safetensors"):
        assert (tmp_path / "slices" / file.name).read_bytes() == file.read_bytes()


def test_places_name_the_format_and_the_planner_knows_it(format: Format, packed: Path) -> None:
    catalog = Catalog(packed)
    assert catalog.formats == (format.name,) * 3
    record = catalog.record(catalog.experts()[0])
    for role, place in record.places.items():
        assert place.format == ("" if role.endswith(".scale") else format.name)
    for vram in (False, True):
        machine = machine_of(None, vram)
        assert machine.weights[format.name] > 0
        assert decode_seconds(work_of(catalog), machine, (0.5, 0.5), (0, 0), 100).total > 0


def test_only_records_of_floats_are_compressed(format: Format, toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    settings = {"experts": format.name, "trunk": format.name, "codec": "zstd"}
    if format.floats:
        pack_model(toy_v3[0], tmp_path / "out", **settings)
        assert Catalog(tmp_path / "out").compressed
    else:
        with pytest.raises(UsageError, match="no record contains only floats"):
            pack_model(toy_v3[0], tmp_path / "out", **settings)


# --- the registry


def test_names_are_keys() -> None:
    assert all(name == format.name for name, format in FORMATS.items())
    assert all(name in FORMATS for mixture in MIXTURES.values() for name in mixture)
    with pytest.raises(ValueError, match="at least one value"):
        Format("empty", (0, 32), 16)


def test_formats_that_can_only_be_planned_for(toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    """Bits as published: llama.cpp's mixture."""
    planned = {name: format.bits for name, format in FORMATS.items() if not format.loadable}
    assert planned == {"q4_k_m": 4.84375}
    for name in planned:
        assert not FORMATS[name].takes((8, 256))
        with pytest.raises(NotImplementedError, match=name):
            FORMATS[name].parts((8, 256))
        with pytest.raises(UsageError, match=f"expected one of keep, f32, .* found '{name}'"):
            pack_model(toy_v3[0], tmp_path / "out", experts=name, trunk="keep")


def test_what_no_format_takes_is_not_recognised() -> None:
    for dtype, shape in (("F8_E4M3", (5,)), ("U8", (5,)), ("I64", (5, 5))):
        assert recognise(shape, {"": (dtype, shape)}.get) is None
    assert recognise((5, 5), {}.get) is None
    assert recognise((5,), {"": ("BF16", (5,))}.get) is FORMATS["bf16"]


def test_missing_scales_do_not_make_another_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among formats of one dtype, the one with all parts present; otherwise the first, which says what is wrong."""
    for name, toy in TOYS.items():
        monkeypatch.setitem(FORMATS, name, toy)
    shape = (24, 48)
    for stored in (shape, (5, 5)):
        assert recognise(shape, {"": ("F16", stored)}.get) is FORMATS["f16"]
    assert recognise(shape, {"": ("U8", (24, 24))}.get) is FORMATS["int4"]
    assert recognise(shape, FORMATS["int4"].parts(shape).get) is FORMATS["int4"]
    assert recognise(shape, TOYS["u4"].parts(shape).get) is TOYS["u4"]


def test_numbers_are_those_of_the_kernels() -> None:
    """The values they stand for are tested above, in products."""
    header = (Path(tierlm.kernels.__file__).parent / "product.h").read_text()
    names = ("FLOATS", "TILES", "GGML", "NIBBLES", "FLOAT8", "TRANSPOSED")
    found = re.search(r"constexpr int " + ", ".join(rf"{name} = (\d+)" for name in names) + ";", header)
    assert found is not None
    sizes = dict(zip(names, map(int, found.groups()), strict=True))
    assert {*NUMBERS.values(), *EXACT.values(), *BFLOAT.values()} == set(range(sum(sizes.values())))
    for name, number in EXACT.items():
        table = "TILES" if name in TILES else "GGML" if FORMATS[name] in GGML else "TRANSPOSED"
        assert number - NUMBERS[name] == sizes[table] // 2
    assert {name for name in NUMBERS if FORMATS[name].rounds} == EXACT.keys()
    assert math.prod(FORMATS["int4"].block) // 2 + 16 == FORMATS["int4"].block_bytes
