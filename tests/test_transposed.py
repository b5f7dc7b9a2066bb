"""AWQ and GPTQ: their kernels; models of several families, from published files to logits and packed stores.

The values are tested in test_published.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_dense import SIZES as DENSE_SIZES
from test_published import HOW, RAM, Tensors, quantise_toy, words
from torch import Tensor
from toys import edit_config, make_toy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tierlm import LLM, SamplingParams
from tierlm.formats import FORMATS
from tierlm.formats.transposed import TRANSPOSED
from tierlm.kernels import Weight, gated_mlp, gated_mlps, linear, native, widen
from tierlm.kernels.linear import linear_reference, widen_reference
from tierlm.kernels.quantised import rounded
from tierlm.models.catalog import Catalog
from tierlm.models.outline import Outline
from tierlm.models.packing import pack_model
from tierlm.planning.known import find_config

SAMPLING = SamplingParams(max_new_tokens=8, ignore_eos=True)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "modules_to_not_convert": ["gate"]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "awq": ("awq of 32", AWQ),
    "gptq": ("gptq of 32", GPTQ),
    "gptq v2": ("gptq v2 of 32", {**GPTQ, "checkpoint_format": "gptq_v2"}),
}
SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "num_hidden_layers": 3}
FAMILIES = {
    "v3": {**SIZES, "q_lora_rank": 24},
    "qwen3": {**SIZES, "head_dim": 16},
    "qwen2": {**SIZES, "head_dim": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
    "mixtral": {**SIZES, "intermediate_size": 32},
    "llama": {},
}


# --- kernels

NAMES = [format.name for format in TRANSPOSED]
PRODUCTS = [*NAMES, *(f"{name} exact" for name in NAMES)]


def some_weight(outs: int, ins: int, product: str, seed: int = 0) -> Weight:
    """``product``: a format, and "exact" if activations are not rounded."""
    name, *exact = product.split()
    generator = torch.Generator().manual_seed(seed)
    (_, data), (_, scales), (_, zeros) = FORMATS[name].parts((outs, ins)).values()
    words = [torch.randint(-(2**31), 2**31, shape, generator=generator).int() for shape in (data, zeros)]
    scale = (torch.rand(scales, generator=generator) - 0.5).half()
    return Weight(words[0], name, scale, (outs, ins), bool(exact), words[1])


def activations(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def in_order(x: Tensor, weight: Weight) -> Tensor:
    """The product of rounded activations [T, in] as kernels/transposed.h defines it, in float32, bit for bit."""
    assert weight.scale is not None
    ones = replace(weight, scale=torch.ones_like(weight.scale))
    groups, stored = x.view(len(x), -1, 32), widen_reference(ones).view(weight.shape[0], -1, 32)
    largest = groups.abs().amax(-1)
    numbers = (groups * (127 / largest)[..., None]).round()
    total = torch.zeros(len(x), weight.shape[0])
    for g in range(groups.shape[1]):
        scale = weight.scale[32 * g // FORMATS[weight.format].block[1]].float()
        total = total + (numbers[:, g] @ stored[:, g].T) * scale * (largest[:, g, None] / 127)
    return total


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, derandomize=True, max_examples=12)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 25), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_products_of_rounded_activations_have_the_bits_of_the_definition(
    name: str, rows: int, blocks: int, groups: int, seed: int
) -> None:
    """Whole tiles and what remains, so all processors give the same."""
    weight = some_weight(8 * blocks, groups * FORMATS[name].block[1], name, seed)
    x = activations(rows, weight.shape[1])
    assert native.kernels_for(weight) is not None
    assert torch.equal(linear(x, weight), in_order(x, weight))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 6, 70])
def test_equal_to_float64(product: str, rows: int) -> None:
    weight = some_weight(136, 256, product)
    x, wide = activations(rows, 256), widen(weight)
    assert torch.equal(wide, widen_reference(weight))
    exact = (rounded(x) if weight.rounds else x).double() @ wide.double().T
    bound = 2e-6 * (x.double().abs() @ wide.double().abs().T)
    for found in (linear(x, weight), linear_reference(x, weight)):
        assert ((found - exact).abs() <= bound).all()


@pytest.mark.parametrize("product", PRODUCTS)
def test_rows_threads_and_repetition_do_not_reach_the_result(product: str) -> None:
    weight, x = some_weight(1000, 256, product), activations(37, 256)
    together, threads = linear(x, weight), torch.get_num_threads()
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
    for number, zero in ((-1, 0), (0, -1), (-1, -1)):
        weight = some_weight(72, 128, name)
        assert weight.scale is not None and weight.extra is not None
        weight.data[:], weight.extra[:], weight.scale[:] = number, zero, 1.0
        for sign in (1.0, -1.0):
            x = torch.full((5, 128), sign * 127)
            assert torch.equal(linear(x, weight).double(), x.double() @ widen(weight).double().T)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 33])
def test_nothing_is_read_or_written_beside_operands(product: str, rows: int) -> None:
    """Weights at odd places between bytes that would show, and outputs between others."""
    size = 128
    mlp = [some_weight(size, size, product, seed) for seed in range(3)]
    x = activations(rows, size) / 60
    x[-1, 40] = float("nan")
    around = torch.full((rows * size + 32,), 7.0)
    gated_mlps([(x, around[16:-16].view(rows, size), (mlp[0], mlp[1], mlp[2]))])
    assert around[:16].eq(7).all() and around[-16:].eq(7).all()
    found = around[16:-16].view(rows, size)
    assert found[:-1].isfinite().all() and found[-1].isnan().all()
    moved = []
    for weight in mlp:
        slab = torch.full((weight.data.numel() + 64,), -1, dtype=torch.int32)
        place = slab[33 : 33 + weight.data.numel()].view(weight.data.shape)
        moved.append(replace(weight, data=place.copy_(weight.data)))
    assert torch.equal(gated_mlp(x, moved[0], moved[1], moved[2])[:-1], found[:-1])


# --- models


def quantised(folder: Path, method: str, toy: str) -> Tensors:
    """Write a toy whose projections are quantised where groups fit. Returns what its tensors stand for."""
    how, quantization = METHODS[method]
    if toy == "llama":
        torch.manual_seed(7)
        LlamaForCausalLM(LlamaConfig(**{**DENSE_SIZES, "hidden_size": 64})).save_pretrained(folder)
    else:
        make_toy(toy, folder, **FAMILIES[toy])
    meant = quantise_toy(folder, HOW[how][1], group=32)
    edit_config(folder, quantization_config=quantization)
    return meant


def reference(folder: Path, source: Path, meant: Tensors, ids: list[int]) -> Tensor:
    """Logits by transformers of the values."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: part.contiguous() for name, part in meant.items()}, folder / "model.safetensors", {"format": "pt"})
    experts = {} if config["model_type"] == "llama" else {"experts_implementation": "eager"}
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **experts).eval()
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("toy", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_the_values(method: str, toy: str, tmp_path: Path, ids: list[int]) -> None:
    source = tmp_path / "model"
    expected = reference(tmp_path / "meant", source, quantised(source, method, toy), ids)
    catalog = Catalog(source)
    assert catalog.formats[:2] == (HOW[METHODS[method][0]][0],) * 2
    with LLM.load(source, budget=RAM, exact=True) as llm:
        assert torch.allclose(llm.logits(ids), expected, rtol=0, atol=1e-4 * expected.abs().max())
    texts = []
    for tight in ({}, {"ram_slots": 4, "resident_trunks": 0} if catalog.spec.moe else {"resident_trunks": 0}):
        with LLM.load(source, budget=RAM, **tight) as llm:
            assert (llm.logits(ids) - expected).norm() < 0.1 * expected.norm()  # activations are rounded
            texts.append(llm.generate([ids], SAMPLING)[0].ids)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("method", METHODS)
def test_packed(method: str, tmp_path: Path, ids: list[int]) -> None:
    """Kept byte for byte, together and beside converted weights; and converted."""
    source = tmp_path / "model"
    quantised(source, method, "v3")
    with LLM.load(source, budget=RAM, exact=True) as llm:
        expected = llm.logits(ids)
    for experts, trunk in (("keep", "keep"), ("keep", "f32"), ("f32", "f32")):
        out = tmp_path / f"{experts} {trunk}"
        pack_model(source, out, experts=experts, trunk=trunk)
        assert Catalog(out).formats.experts == (HOW[METHODS[method][0]][0] if experts == "keep" else experts)
        with LLM.load(out, budget=RAM, exact=True) as packed:
            assert torch.allclose(packed.logits(ids), expected, rtol=1e-4, atol=1e-4)


def test_zeros_stored_less_one_may_borrow() -> None:
    """GPTQModel subtracts from whole words, so a zero point of 0 borrows from the next one."""
    zeros = torch.tensor([[0, 5, 0, 15, 8, 8, 8, 8]])
    stored = words(zeros, range(8)) - 0x11111111
    data = words(torch.zeros(8, 32, dtype=torch.int64), range(8)).T.contiguous()
    wide = FORMATS["gptq_g32"].widen(data, torch.ones(1, 8).half(), (8, 32), stored)
    assert torch.equal(wide, -zeros.T.float().expand(8, 32))


def test_plans() -> None:
    """The formats of a config. Attention that is excluded keeps 16 bits."""
    config = find_config("Qwen3-30B-A3B").config
    assert Outline({**config, "quantization_config": {**GPTQ, "group_size": 128}}, "here").formats == (
        "gptq_g128",
        "gptq_g128",
        "bf16",
    )
    mixed = {**AWQ, "modules_to_not_convert": ["self_attn"]}
    assert Outline({**config, "quantization_config": mixed}, "here").formats == ("awq_g32", "bf16", "bf16")
    mixed = {**GPTQ, "dynamic": {"-:.*attn.*": {}}}
    assert Outline({**config, "quantization_config": mixed}, "here").formats == ("gptq_g32", "bf16", "bf16")
