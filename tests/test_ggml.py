"""The block formats of GGUF: their values against the package `gguf`, and their kernels against the definition."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from made_blocks import HALVES, some_blocks
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import edit_config, make_toy

from tierlm import LLM, Budget, SamplingParams, UsageError
from tierlm.checkpoints import checkpoint
from tierlm.errors import UnsupportedModelError
from tierlm.formats import FORMATS, recognise
from tierlm.formats.ggml import GGML
from tierlm.kernels import Weight, from_latent, gated_mlp, gated_mlps, into_latent, linear, native, quantise, widen
from tierlm.kernels.linear import ABSORB_ROWS, can_absorb, linear_reference, widen_reference
from tierlm.kernels.quantised import rounded
from tierlm.models.catalog import Catalog
from tierlm.models.packing import pack_model

NAMES = [format.name for format in GGML]
PRODUCTS = [*NAMES, *(f"{name} exact" for name in NAMES)]
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 3))  # rows, blocks of a row
RAM = Budget("8GiB")
SAMPLING = SamplingParams(max_new_tokens=12, ignore_eos=True)


def some_weight(outs: int, blocks: int, product: str, seed: int = 0, size: float = 1.0) -> Weight:
    """``product``: a format, and "exact" if activations are not rounded."""
    name, *exact = product.split()
    return replace(some_blocks((outs, blocks * FORMATS[name].block[1]), name, seed, size), exact=bool(exact))


def activations(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def taken(x: Tensor, weight: Weight) -> Tensor:
    """Activations as a product with ``weight`` rounds them."""
    return rounded(x) if weight.rounds else x


def bound_of(left: Tensor, right: Tensor, name: str) -> Tensor:
    """The error allowed in ``left @ right``. With minima, a small value is the difference of two large ones."""
    return (1e-5 if name.split()[0] in ZERO else 1e-6) * (left.double().abs() @ right.double().abs()) + 1e-30


# --- the values


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("outs", "blocks"), [(1, 1), (3, 5), (17, 2)])
def test_values_are_those_of_the_package_gguf(name: str, outs: int, blocks: int) -> None:
    weight, kind = some_weight(outs, blocks, name), GGMLQuantizationType[FORMATS[name].dtype]
    expected = quants.dequantize(weight.data.numpy(), kind)
    assert np.array_equal(widen_reference(weight).numpy().view(np.int32), expected.view(np.int32))
    assert GGML_QUANT_SIZES[kind] == (FORMATS[name].block[1], FORMATS[name].block_bytes)


@pytest.mark.parametrize("name", ["q8_0", "q4_k", "q6_k"])
def test_every_float16_scale(name: str) -> None:
    """All finite ones: each is the value of the number one."""
    scales = torch.arange(65536).to(torch.uint16).view(torch.float16)
    scales = scales[scales.isfinite()]
    blocks = torch.zeros(len(scales), FORMATS[name].block_bytes, dtype=torch.uint8)
    at = HALVES[name][0]
    blocks[:, at : at + 2] = scales.view(torch.uint8).view(-1, 2)
    if name == "q8_0":
        blocks[:, 2] = 1
    elif name == "q4_k":
        blocks[:, 4], blocks[:, 16] = 1, 1
    else:
        blocks[:, 192], blocks[:, 0], blocks[:, 128] = 1, 1, 2  # 1 + 2 * 16 - 32
    weight = Weight(blocks, name, None, (len(blocks), FORMATS[name].block[1]))
    for wide in (widen(weight), widen_reference(weight)):
        assert torch.equal(wide[:, 0], scales.float())
    x = torch.zeros(1, weight.shape[1])
    x[0, 0] = 127.0  # a scale of one, and the largest number
    assert torch.equal(linear(x, weight)[0], 127 * scales.float())


def test_every_scale_of_mxfp4() -> None:
    blocks = torch.zeros(256, 17, dtype=torch.uint8)
    blocks[:, 0], blocks[:, 1] = torch.arange(256), 1
    weight = Weight(blocks, "mxfp4_ggml", None, (256, 32))
    expected = quants.dequantize(blocks.numpy(), GGMLQuantizationType.MXFP4)
    for wide in (widen(weight), widen_reference(weight)):
        assert np.array_equal(wide.numpy(), expected) and wide[:, 0].ne(0).all()
    x = torch.zeros(1, 32)
    x[0, 0] = 127.0
    small = slice(0, 240)  # beyond, the product is infinite
    assert torch.equal(linear(x, weight)[0, small], 127 * torch.from_numpy(expected)[small, 0])


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_independent(name: str) -> None:
    weight = some_weight(270, 2, name)
    wide = widen_reference(weight)
    for start, stop in ((0, None), (0, 1), (5, 6), (128, 260), (127, 999)):
        assert torch.equal(widen(weight, start, stop), wide[start:stop])


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_known_by_its_type_and_takes_whole_blocks(name: str) -> None:
    format = FORMATS[name]
    shape = (5, 2 * format.block[1])
    assert recognise(shape, format.parts(shape).get) is format and format.loadable and not format.packable
    assert format.parts(shape) == {"": (format.dtype, (5, 2 * format.block_bytes))}
    assert format.takes(shape) and not format.takes((5, shape[1] + 16)) and not format.takes((512,))
    assert recognise((5, shape[1] + 16), {"": (format.dtype, (5, 40))}.get) is None
    with pytest.raises(NotImplementedError, match=f"{name}: nothing can be stored"):
        quantise(torch.zeros(shape), name)


# --- the kernels


def in_order(x: Tensor, weight: Weight) -> Tensor:
    """The product of rounded activations [T, in] as kernels/blocks.h defines it, in float32, bit for bit."""
    parts = 2 if weight.format in ("q2_k", "q3_k", "q6_k") else 1
    groups = x.view(len(x), -1, 32)
    largest = groups.abs().amax(-1)
    numbers = (groups * (127 / largest)[..., None]).round()
    stored, scales, minima = (each.view(len(each), -1, parts, 32 // parts) for each in unpacked(weight))
    total = torch.zeros(len(x), len(stored))
    for g in range(groups.shape[1]):
        columns = numbers[:, g].view(len(x), parts, -1)
        product = torch.zeros(())
        for part in range(parts):
            product = product + (columns[:, part] @ stored[:, g, part].T) * scales[:, g, part, 0]
        for part in range(parts):
            product = product - columns[:, part].sum(-1, keepdim=True) * minima[:, g, part, 0]
        total = total + product * (largest[:, g, None] / 127)
    return total


# Codes of the number one: bytes from, to, and what they all become.
ONE = {
    "q8_0": [(2, 34, 1)],
    "q4_0": [(2, 18, 0x99)],
    "q4_1": [(2, 4, 0), (4, 20, 0x11)],  # and no minimum
    "q5_0": [(2, 6, 0xFF), (6, 22, 0x11)],
    "q5_1": [(2, 8, 0), (8, 24, 0x11)],
    "q2_k": [(16, 80, 0x55), (82, 84, 0)],
    "q3_k": [(0, 32, 0xFF), (32, 96, 0x55)],
    "q4_k": [(2, 4, 0), (16, 144, 0x11)],
    "q5_k": [(2, 4, 0), (16, 48, 0), (48, 176, 0x11)],
    "q6_k": [(0, 128, 0x11), (128, 192, 0xAA)],
    "iq4_nl": [(2, 18, 0x88)],
    "iq4_xs": [(8, 136, 0x88)],
    "mxfp4_ggml": [(1, 17, 0x11)],
}
# Codes of zero in formats with minima.
ZERO = {"q4_1": (4, 20, 0), "q5_1": (4, 24, 0), "q2_k": (16, 80, 0), "q4_k": (16, 144, 0), "q5_k": (16, 176, 0)}


def unpacked(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers float32 [out, in], and their scales and minima, as values of weights with other codes."""

    def values(*changes: tuple[int, int, int]) -> Tensor:
        changed = weight.data.clone()
        for start, stop, byte in changes:
            changed.view(-1, FORMATS[weight.format].block_bytes)[:, start:stop] = byte
        return widen_reference(replace(weight, data=changed))

    scales = values(*ONE[weight.format])
    minima = -values(ZERO[weight.format]) if weight.format in ZERO else torch.zeros(weight.shape)
    numbers = (widen_reference(weight) + minima) / scales
    return torch.where(scales == 0, 0.0, numbers).round(), scales, minima


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, derandomize=True, max_examples=15)
@given(rows=st.integers(1, 40), shape=SHAPES, seed=st.integers(0, 99))
def test_products_of_rounded_activations_have_the_bits_of_the_definition(
    name: str, rows: int, shape: tuple[int, int], seed: int
) -> None:
    """So all processors give the same."""
    weight = some_weight(*shape, name, seed)
    x = activations(rows, weight.shape[1], seed=seed)
    assert native.kernels_for(weight) is not None
    assert torch.equal(linear(x, weight), in_order(x, weight))


@pytest.mark.parametrize("product", PRODUCTS)
@settings(deadline=None, derandomize=True, max_examples=15)
@given(rows=st.integers(1, native.MAX_ROWS), shape=SHAPES)
def test_equal_to_float64(product: str, rows: int, shape: tuple[int, int]) -> None:
    weight = some_weight(*shape, product)
    x, wide = activations(rows, weight.shape[1]), widen(weight)
    exact = taken(x, weight).double() @ wide.double().T
    for found in (linear(x, weight), linear_reference(x, weight)):
        assert ((found - exact).abs() <= bound_of(x, wide.T, product)).all()


@pytest.mark.parametrize("name", NAMES)
def test_widened_values_equal_the_reference_bit_for_bit(name: str) -> None:
    for shape in ((1, 1), (129, 3), (40, 2)):
        weight = some_weight(*shape, name)
        kernels = native.kernels_for(weight)
        assert kernels is not None
        assert torch.equal(kernels.widen(weight), widen_reference(weight))


@pytest.mark.parametrize("product", PRODUCTS)
def test_rows_threads_and_repetition_do_not_reach_the_result(product: str) -> None:
    weight = some_weight(1000, 3, product)
    x = activations(37, weight.shape[1])
    together = linear(x, weight)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(linear(x, weight), together)
            assert torch.equal(torch.cat([linear(row[None], weight) for row in x]), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_a_sum_at_its_largest(name: str) -> None:
    """All numbers at the ends of their range, where 16-bit sums are closest to overflow."""
    for byte in (0x00, 0x77, 0x7F, 0x80, 0xFF):
        weight = some_weight(9, 2, name)
        weight.data[:] = byte
        blocks = weight.data.view(-1, FORMATS[name].block_bytes)
        for at in HALVES[name]:
            blocks[:, at : at + 2] = torch.tensor([0, 0x3C], dtype=torch.uint8)  # one
        if not HALVES[name]:
            blocks[:, 0] = 128
        for sign in (1.0, -1.0):
            x = torch.full((5, weight.shape[1]), sign * 127)
            assert torch.equal(linear(x, weight).double(), x.double() @ widen(weight).double().T)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(product: str, wrong: float) -> None:
    weight = some_weight(20, 2, product)
    x = torch.ones(6, weight.shape[1])
    x[2, 40] = wrong
    for found in (linear(x, weight), linear_reference(x, weight)):
        assert not found[2].isfinite().any() and found[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 33])
def test_nothing_is_read_or_written_beside_operands(product: str, rows: int) -> None:
    """Weights at odd addresses between bytes that would show, and outputs between others."""
    format = FORMATS[product.split()[0]]
    size = format.block[1]
    mlp = [replace(some_weight(size, 1, product, seed, 0.1), exact="exact" in product) for seed in range(3)]
    x = activations(rows, size) / 8
    around = torch.full((rows * size + 32,), 7.0)
    gated_mlps([(x, around[16:-16].view(rows, size), (mlp[0], mlp[1], mlp[2]))])
    assert around[:16].eq(7).all() and around[-16:].eq(7).all()
    expected = around[16:-16].view(rows, size).clone()
    moved = []
    for weight in mlp:
        slab = torch.full((weight.data.numel() + 64,), 0xFF, dtype=torch.uint8)
        place = slab[33 : 33 + weight.data.numel()].view(weight.data.shape)
        moved.append(replace(weight, data=place.copy_(weight.data)))
    assert torch.equal(gated_mlp(x, moved[0], moved[1], moved[2]), expected) and expected.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", ["bf16", "int8", "q5_1", "q2_k"])
@pytest.mark.parametrize("rows", [1, 5, 65])
def test_an_expert_of_several_formats(name: str, other: str, rows: int) -> None:
    """Activations are rounded if any of gate and up rounds them."""
    size = 256
    plain = [quantise(activations(size, size, seed=seed) / 16, "bf16") for seed in range(3)]
    mine = some_blocks((size, size), name, 1, 1 / 16)
    beside = some_blocks((size, size), other, 2, 1 / 16) if other in NAMES else quantise(plain[2].data, other)
    x = activations(rows, size)
    for gate, up, down in ((mine, beside, plain[0]), (beside, mine, plain[0]), (plain[0], plain[1], mine)):
        expected = linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down)
        close = 2e-2 * expected.abs().max() if down.rounds else 1e-5 * expected.abs().max()
        assert (gated_mlp(x, gate, up, down) - expected).abs().max() <= close


@pytest.mark.parametrize("product", PRODUCTS)
@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    rows=st.integers(1, 9),
    heads=st.integers(1, 4),
    nope=st.integers(1, 20),
    value=st.integers(1, 20),
    blocks=st.integers(1, 2),
    data=st.data(),
)
def test_into_and_out_of_the_latent_space(
    product: str, rows: int, heads: int, nope: int, value: int, blocks: int, data: st.DataObject
) -> None:
    """Heads begin at any row, and nothing is rounded."""
    first = data.draw(st.integers(0, heads - 1))
    group = data.draw(st.integers(1, heads - first))
    kv_b = some_weight(heads * (nope + value), blocks, product)
    assert can_absorb(kv_b, rows, nope, value) == (rows <= ABSORB_ROWS)
    wide = widen(kv_b).view(heads, nope + value, -1)[first : first + group]
    q = activations(rows, heads, nope + 3)[:, first : first + group, :nope]
    mixed = activations(group, rows, wide.shape[2])
    for found, left, right in (
        (into_latent(q, kv_b, first, heads), q.transpose(0, 1), wide[:, :nope]),
        (from_latent(mixed, kv_b, first, heads, value).transpose(0, 1), mixed, wide[:, nope:].transpose(1, 2)),
    ):
        assert ((found - left.double() @ right.double()).abs() <= 2 * bound_of(left, right, product)).all()


# --- in a model


def format_of(name: str) -> str | None:
    """A mixture as in GGUF files, within records too; None: float32."""
    rules = {
        "1.self_attn.q_a_proj": "q5_1",
        "1.self_attn.q_b_proj": "iq4_xs",
        "1.self_attn.kv_b_proj": "q2_k",
        "embed_tokens": "q6_k",
        "lm_head": "q4_k",
        "q_a_proj": "q5_0",
        "q_b_proj": "q4_1",
        "kv_a_proj_with_mqa": "q8_0",
        "kv_b_proj": "q4_0",
        "o_proj": "q5_k",
        "experts.1.gate_proj": "q3_k",
        "gate_proj": "q4_k",
        "up_proj": "mxfp4_ggml",
        "down_proj": "q6_k",
    }
    return next((format for part, format in rules.items() if f"{part}.weight" in name), None)


def write(file: Path, tensors: dict[str, tuple[str, Tensor]]) -> None:
    """A safetensors file with any dtypes."""
    header, at = {}, 0
    for name, (dtype, tensor) in tensors.items():
        offsets = [at, at := at + tensor.nbytes]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors.values():
            stream.write(tensor.contiguous().numpy().tobytes())


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A toy in the mixture of ``format_of``, and one of the same values in float32."""
    mixed, wide = tmp_path_factory.mktemp("mixed"), tmp_path_factory.mktemp("wide")
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank"), 256)
    few = {"n_routed_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    for folder in (mixed, wide):
        make_toy("v3-one-group", folder, **sizes, **few, q_lora_rank=256, v_head_dim=64)
    stored: dict[str, tuple[str, Tensor]] = {}
    values: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(load_file(wide / "model.safetensors").items()):
        format = format_of(name)
        if format is None:
            stored[name], values[name] = ("F32", tensor), tensor
        else:
            weight = some_blocks((tensor.shape[0], tensor.shape[1]), format, number, 0.15 if "embed" in name else 0.06)
            stored[name], values[name] = (FORMATS[format].dtype, weight.data), widen_reference(weight)
    write(mixed / "model.safetensors", stored)
    save_file(values, wide / "model.safetensors")
    return mixed, wide


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors that may hold GGML's types, as GGUF files do."""
    more = {format.dtype: 1 for format in GGML}
    monkeypatch.setattr(checkpoint, "ITEM_SIZE", {**checkpoint.ITEM_SIZE, **more})  # the packer's is as it was


def test_safetensors_hold_none_of_these(twins: tuple[Path, Path]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"has dtype Q\w+; supported are"):
        Catalog(twins[0])


def test_a_model_of_these_formats_has_the_logits_of_its_values(
    twins: tuple[Path, Path], container: None, ids: list[int]
) -> None:
    prompts = ids, ids[:5]  # many tokens and few, whose attention is one call of the kernels
    with LLM.load(twins[1], budget=RAM) as llm:
        expected = [llm.logits(prompt) for prompt in prompts]
    with LLM.load(twins[0], budget=RAM, exact=True) as llm:
        for prompt, logits in zip(prompts, expected, strict=True):
            assert torch.allclose(llm.logits(prompt), logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
    texts: list[Any] = []
    for tight in ({}, {"ram_slots": 2, "resident_trunks": 0}):
        with LLM.load(twins[0], budget=RAM, **tight) as llm:
            texts.append(llm.generate([ids], SAMPLING)[0].ids)
    assert texts[0] == texts[1] and len(texts[0]) == SAMPLING.max_new_tokens


def test_head_and_embedding_are_read_row_by_row(
    twins: tuple[Path, Path], container: None, tmp_path: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierlm.models.catalog.HEAD_BLOCK_BYTES", 50 * 144)
    catalog = Catalog(twins[0])
    places = [catalog.record(key).places["lm_head"] for key in catalog.head]
    assert [(place.shape, place.size, place.format) for place in places] == [
        ((rows, 144), (rows, 256), "q4_k") for rows in (50, 50, 31)
    ]
    assert (catalog.embedding.format, catalog.embedding.size) == ("q6_k", (131, 256))
    tied = {}
    for source, folder in zip(twins, ("mixed", "wide"), strict=True):
        (tmp_path / folder).mkdir()
        for file in source.iterdir():
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
        edit_config(tmp_path / folder, tie_word_embeddings=True)
        with LLM.load(tmp_path / folder, budget=RAM, exact=True) as llm:
            tied[folder] = llm.logits(ids)
    assert torch.allclose(tied["mixed"], tied["wide"], rtol=1e-3, atol=1e-3 * tied["wide"].abs().max())


def test_a_model_of_these_formats_can_be_packed_in_others(
    twins: tuple[Path, Path], container: None, tmp_path: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, source in (("mixed", twins[0]), ("wide", twins[1])):
        pack_model(source, tmp_path / folder, experts="int4", trunk="int8")
    for file in (tmp_path / "wide").glob("*.safetensors"):
        assert load_file(tmp_path / "mixed" / file.name).keys() == load_file(file).keys()
        for name, tensor in load_file(tmp_path / "mixed" / file.name).items():
            assert torch.equal(tensor, load_file(file)[name]), name
    monkeypatch.undo()  # what was packed are safetensors of the usual types
    with LLM.load(tmp_path / "mixed", budget=RAM) as llm:
        assert llm.logits(ids).isfinite().all()


@pytest.mark.parametrize("kept", ["experts", "trunk"])
def test_packed_stores_keep_none_of_these(twins: tuple[Path, Path], container: None, tmp_path: Path, kept: str) -> None:
    chosen = {"experts": "int8", "trunk": "int8", kept: "keep"}
    with pytest.raises(UsageError, match=r"_proj\.weight is q\w+, which no packed store holds; choose another format"):
        pack_model(twins[0], tmp_path / "out", **chosen)
    with pytest.raises(UsageError, match=r"expected one of keep, f32, .*int4, found 'q4_k'"):
        pack_model(twins[0], tmp_path / "out", **{**chosen, kept: "q4_k"})
    assert not list(tmp_path.iterdir())
