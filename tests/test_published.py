"""Quantised checkpoints as they are published: the values of each format, from its specification; toys in each, from a
file to logits; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import edit_config, load_toy, make_toy
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tierlm import LLM, Budget, CheckpointError, SamplingParams, UnsupportedModelError
from tierlm.checkpoints.container import describe
from tierlm.checkpoints.stored import by_role, find_weight
from tierlm.formats import FORMATS
from tierlm.formats.format import part_name
from tierlm.kernels import Weight, can_absorb, from_latent, into_latent, linear, widen
from tierlm.kernels.linear import widen_reference
from tierlm.kernels.quantised import rounded
from tierlm.models.catalog import Catalog
from tierlm.models.outline import Outline
from tierlm.models.packing import pack_model
from tierlm.planning.known import find_config
from tierlm.spec import ExpertKey

RAM = Budget("8GiB")
HALF_STEPS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # e2m1, OCP MX v1.0
Tensors = dict[str, Tensor]
Made = tuple[Tensors, Tensor]  # stored tensors by suffix, and the values they stand for


def pairs(codes: Tensor) -> Tensor:
    """Codes [..., 2n] -> bytes [..., n], the first in the low half."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def e2m1(codes: Tensor) -> Tensor:
    return HALF_STEPS[codes & 7] * torch.where(codes >= 8, -1, 1)


def codes_of(matrix: Tensor) -> Tensor:
    return torch.randint(0, 16, matrix.shape, generator=torch.Generator().manual_seed(matrix.numel()))


def groups_of(matrix: Tensor, size: int) -> Tensor:
    """The largest magnitude of each group, [out, groups]."""
    return matrix.reshape(len(matrix), -1, size).abs().amax(-1).clamp(min=1e-6)


def mxfp4(matrix: Tensor) -> Made:
    exponents = (groups_of(matrix, 32) / 6).log2().round().clamp(-127, 127)
    codes = codes_of(matrix)
    values = e2m1(codes).view(len(matrix), -1, 32) * (2.0**exponents)[..., None]
    blocks = pairs(codes).view(len(matrix), -1, 16)
    return {"_blocks": blocks, "_scales": (exponents + 127).to(torch.uint8)}, values.flatten(1)


def mxfp4_packed(matrix: Tensor) -> Made:
    made, values = mxfp4(matrix)
    return {"_packed": made["_blocks"].flatten(1), "_scale": made["_scales"]}, values


def nvfp4(matrix: Tensor) -> Made:
    codes, factor = codes_of(matrix), torch.tensor(0.003)
    scale = (groups_of(matrix, 16) / 6 / factor).to(torch.float8_e4m3fn)
    values = e2m1(codes).view(len(matrix), -1, 16) * scale.float()[..., None] * factor
    return {"": pairs(codes), "_scale": scale, "_scale_2": factor}, values.flatten(1)


def nvfp4_packed(matrix: Tensor) -> Made:
    """As compressed-tensors: the factor is inverse."""
    made, values = nvfp4(matrix)
    inverse = (1 / made["_scale_2"])[None]
    return {"_packed": made[""], "_scale": made["_scale"], "_global_scale": inverse}, values


def int4(size: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[Tensor], Made]:
    def made(matrix: Tensor) -> Made:
        codes, scale = codes_of(matrix), (groups_of(matrix, size) / 8).to(dtype)
        words = sum(codes[:, i::8].long() << 4 * i for i in range(8))  # compressed-tensors, pack_to_int32
        packed = (words - (words >= 2**31).long() * 2**32).int()
        values = ((codes - 8).view(len(matrix), -1, size) * scale.float()[..., None]).flatten(1)
        return {"_packed": packed, "_scale": scale, "_shape": torch.tensor(matrix.shape)}, values

    return made


def words(numbers: Tensor, order: Sequence[int]) -> Tensor:
    """Each eight columns of ``numbers`` as an int32, whose bits 4 i and up hold column ``order[i]``."""
    packed = sum(numbers[:, column::8].long() << 4 * i for i, column in enumerate(order))
    return (packed - (packed >= 2**31).long() * 2**32).int().contiguous()


def with_zeros(matrix: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Columns first: numbers [in, out], zero points and scales [groups, out], and the values [out, in]."""
    numbers, scale = codes_of(matrix).T, (groups_of(matrix, size) / 8).T.half().contiguous()
    zeros = torch.randint(1, 16, scale.shape, generator=torch.Generator().manual_seed(3))
    wide = [each.repeat_interleave(size, 0).float() for each in (zeros, scale)]
    return numbers, zeros, scale, ((numbers - wide[0]) * wide[1]).T


def awq(size: int, order: Sequence[int] = (0, 2, 4, 6, 1, 3, 5, 7)) -> Callable[[Tensor], Made]:
    """AutoAWQ, WQLinear_GEMM.from_linear."""

    def made(matrix: Tensor) -> Made:
        numbers, zeros, scale, values = with_zeros(matrix, size)
        return {".qweight": words(numbers, order), ".qzeros": words(zeros, order), ".scales": scale}, values

    return made


def gptq(size: int, less: int = 1) -> Callable[[Tensor], Made]:
    """AutoGPTQ, QuantLinear.pack. ``less``: subtracted from zero points."""

    def made(matrix: Tensor) -> Made:
        numbers, zeros, scale, values = with_zeros(matrix, size)
        parts = {
            ".qweight": words(numbers.T, range(8)).T.contiguous(),
            ".qzeros": words(zeros - less, range(8)),
            ".scales": scale,
            ".g_idx": torch.arange(len(numbers)).int() // size,
        }
        return parts, values

    return made


def fp8(ending: str, dtype: torch.dtype, scale_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Made]:
    def made(matrix: Tensor) -> Made:
        scale = (scale_of(matrix) / 448).to(dtype)
        wide = scale.float()
        if scale_of is by_block:
            wide = wide.repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(matrix), : matrix.shape[1]]
        data = (matrix / wide).to(torch.float8_e4m3fn)
        return {"": data, ending: scale}, data.float() * wide

    return made


def by_block(matrix: Tensor) -> Tensor:
    return torch.nn.functional.max_pool2d(matrix.abs()[None], 128, ceil_mode=True)[0].clamp(min=1e-6)


def by_row(matrix: Tensor) -> Tensor:
    return matrix.abs().amax(1, keepdim=True).clamp(min=1e-6)


def whole(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda matrix: matrix.abs().max().reshape(shape)


HOW: dict[str, tuple[str, Callable[[Tensor], Made]]] = {  # the format's name, and how a matrix is stored
    "mxfp4": ("mxfp4", mxfp4),
    "nvfp4": ("nvfp4", nvfp4),
    "nvfp4 of compressed-tensors": ("nvfp4_ct", nvfp4_packed),
    "int4 of 32": ("int4_g32", int4(32)),
    "int4 of 64": ("int4_g64", int4(64)),
    "int4 of 128, f16": ("int4_g128", int4(128, torch.float16)),
    "mxfp4 of compressed-tensors": ("mxfp4_ct", mxfp4_packed),
    "awq of 32": ("awq_g32", awq(32)),
    "awq of 64": ("awq_g64", awq(64)),
    "awq of 128": ("awq_g128", awq(128)),
    "gptq of 32": ("gptq_g32", gptq(32)),
    "gptq of 64": ("gptq_g64", gptq(64)),
    "gptq of 128": ("gptq_g128", gptq(128)),
    "gptq v2 of 32": ("gptq_v2_g32", gptq(32, 0)),
    "gptq v2 of 128": ("gptq_v2_g128", gptq(128, 0)),
    "fp8 blocks, bf16": ("fp8", fp8("_scale_inv", torch.bfloat16, by_block)),
    "fp8 blocks of compressed-tensors": ("fp8_blocks", fp8("_scale", torch.bfloat16, by_block)),
    "fp8 rows, f32": ("fp8_rows", fp8("_scale", torch.float32, by_row)),
    "fp8 rows, bf16": ("fp8_rows", fp8("_scale", torch.bfloat16, by_row)),
    "fp8 whole, scalar": ("fp8_whole", fp8("_scale", torch.float32, whole())),
    "fp8 whole, vector of bf16": ("fp8_whole", fp8("_scale", torch.bfloat16, whole(1))),
    "fp8 whole, inverse": ("fp8_inverse", fp8("_scale_inv", torch.float32, whole())),
}


V2 = {"checkpoint_format": "gptq_v2"}


@pytest.fixture(params=HOW)
def how(request: pytest.FixtureRequest) -> tuple[str, Callable[[Tensor], Made]]:
    return HOW[request.param]


def matrix_of(outs: int, ins: int) -> Tensor:
    return torch.randn(outs, ins, generator=torch.Generator().manual_seed(1))


# --- values


def stored_weight(folder: Path, made: Tensors, shape: tuple[int, ...], config: dict[str, Any]) -> Weight:
    """The weight of these tensors, from a file."""
    folder.mkdir(exist_ok=True)
    stored = {part_name("x.weight", suffix): part for suffix, part in made.items()}
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    found = find_weight(describe(folder).open(), "x.weight", shape)
    data, scale, extra = FORMATS[found.format].divide([stored[part.name] for part in found.parts.values()])
    roles = {"x", "x.scale"} if extra is None else {"x", "x.extra"} if scale is None else {"x", "x.scale", "x.extra"}
    assert set(by_role({"x": found})) == roles
    return Weight(data, found.format, scale, found.shape, extra=extra)


def test_values(how: tuple[str, Callable[[Tensor], Made]], tmp_path: Path) -> None:
    name, store = how
    made, values = store(matrix_of(200, 384))
    weight = stored_weight(tmp_path, made, (200, 384), V2 if "v2" in name else {})
    assert weight.format == name
    torch.testing.assert_close(widen(weight), values, rtol=1e-6, atol=0)
    assert torch.equal(widen(weight), widen_reference(weight))
    for start, stop in ((0, 128), (128, 200), (5, 6), (13, 30)):
        assert torch.equal(widen(weight, start, stop), widen(weight)[start:stop])
    for rows in (1, 6, 100):  # few in the kernels, if there are any; many in torch
        x = matrix_of(rows, 384)
        taken = rounded(x) if weight.rounds else x
        torch.testing.assert_close(linear(x, weight), taken @ values.T, rtol=1e-4, atol=1e-3)


def has_kernels(name: str) -> bool:
    return name != "int4_g128"  # with scales in float16


def test_the_kernels_sum_each_row_alone(how: tuple[str, Callable[[Tensor], Made]], tmp_path: Path) -> None:
    name, store = how
    made, _ = store(matrix_of(1000, 384))
    weight, x = stored_weight(tmp_path, made, (1000, 384), V2 if "v2" in name else {}), matrix_of(7, 384)
    assert weight.plain == has_kernels(name)
    together, threads = linear(x, weight), torch.get_num_threads()
    try:
        for count in (1, 2, 5) if weight.plain else ():
            torch.set_num_threads(count)
            assert torch.equal(linear(x, weight), together)
            assert torch.equal(torch.cat([linear(row[None], weight) for row in x]), together)
    finally:
        torch.set_num_threads(threads)


def test_absorbed_products(how: tuple[str, Callable[[Tensor], Made]], tmp_path: Path) -> None:
    """Three heads of 8 keys and 8 values. Nothing is rounded."""
    name, store = how
    made, values = store(matrix_of(48, 128))
    weight = stored_weight(tmp_path, made, (48, 128), V2 if "v2" in name else {})
    halves = values.view(3, 16, 128)
    q, mixed = torch.randn(5, 2, 8), torch.randn(2, 5, 128)
    assert can_absorb(weight, 5, 8, 8) == has_kernels(name)
    found = into_latent(q, weight, 1, 3)
    torch.testing.assert_close(found, torch.bmm(q.transpose(0, 1), halves[1:, :8]), rtol=1e-4, atol=1e-4)
    expected = torch.bmm(mixed, halves[1:, 8:].transpose(1, 2)).transpose(0, 1)
    torch.testing.assert_close(from_latent(mixed, weight, 1, 3, 8), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (130, 129), (33, 300)])
@pytest.mark.parametrize("name", [name for name in HOW if name.startswith("fp8")])
def test_float8_of_odd_sizes(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """Rows end within a vector, and the next row starts right there."""
    made, values = HOW[name][1](matrix_of(*shape))
    weight = stored_weight(tmp_path, made, shape, {})
    assert weight.plain and torch.equal(widen(weight), widen_reference(weight))
    x = matrix_of(6, shape[1])
    x[2] = float("nan")
    found, rows = linear(x, weight), [0, 1, 3, 4, 5]
    assert found[2].isnan().all()
    torch.testing.assert_close(found[rows], x[rows] @ values.T, rtol=1e-4, atol=1e-3)
    absorbed = into_latent(x[:1, None, :1].nan_to_num(), weight, 0, shape[0])
    torch.testing.assert_close(absorbed[0, 0], x[0, 0] * values[0], rtol=1e-4, atol=1e-4)


def test_bits(how: tuple[str, Callable[[Tensor], Made]], tmp_path: Path) -> None:
    name, store = how
    made, values = store(matrix_of(256, 384))
    weight = stored_weight(tmp_path, made, (256, 384), V2 if "v2" in name else {})
    nbytes = sum(part.nbytes for part in (weight.data, weight.scale, weight.extra) if part is not None)
    assert 8 * nbytes / values.numel() == pytest.approx(FORMATS[name].bits, rel=0.011)  # scales of rows are not counted


def test_mxfp4_equals_transformers() -> None:
    """Every code under every scale."""
    blocks = torch.arange(256).repeat(16, 1).view(1, 256, 16).to(torch.uint8)
    scales = torch.arange(256)[None].to(torch.uint8)[:, :254]  # larger ones overflow
    expected = convert_moe_packed_tensors(blocks[None, :, :254], scales[None], dtype=torch.float32)[0].T
    weight = Weight(blocks[:, :254], "mxfp4", scales, (1, 254 * 32))
    assert torch.equal(widen(weight), expected) and torch.equal(widen_reference(weight), expected)


# --- models


def quantise_toy(folder: Path, store: Callable[[Tensor], Made], only: str = "", group: int = 1) -> Tensors:
    """Rewrite a toy with its projections quantised, or those with ``only`` in their names and whole groups of columns.
    Returns what its tensors stand for."""
    tensors, stored, meant = load_file(folder / "model.safetensors"), {}, {}
    for name, tensor in tensors.items():
        projection = "_proj.weight" in name or ".experts." in name
        if not projection or only not in name or tensor.shape[1] % group:
            stored[name] = meant[name] = tensor
            continue
        made, meant[name] = store(tensor)
        stored |= {part_name(name, suffix): part for suffix, part in made.items()}
        stored[name.replace("weight", "input_scale")] = torch.ones(())  # of activations; ignored
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    return meant


def reference(folder: Path, source: Path, meant: Tensors, ids: list[int]) -> Tensor:
    """Logits by transformers of the values."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file({name: part.contiguous() for name, part in meant.items()}, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        logits: Tensor = load_toy(folder)(torch.tensor([ids])).logits[0]
    return logits


def compressed(weights: dict[str, Any], format: str, **more: Any) -> dict[str, Any]:
    group = {"weights": weights, "input_activations": None, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, **more}


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "actorder": None}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
MX4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
KIMI = compressed(INT4, "pack-quantized", ignore=["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"])
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {  # how, quantization_config, which projections
    "as Kimi-K2-Thinking": ("int4 of 32", KIMI, ".experts."),
    "nvfp4 of modelopt": ("nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, ".experts."),
    "nvfp4 of compressed-tensors": (
        "nvfp4 of compressed-tensors",
        compressed(FLOAT4, "nvfp4-pack-quantized"),
        ".experts.",
    ),
    "mxfp4 of compressed-tensors": (
        "mxfp4 of compressed-tensors",
        compressed(MX4, "mxfp4-pack-quantized"),
        ".experts.",
    ),
    "fp8 of modelopt": ("fp8 whole, scalar", {"quant_method": "modelopt", "quant_algo": "FP8"}, ""),
    "fbgemm": ("fp8 rows, f32", {"quant_method": "fbgemm_fp8"}, ""),
    "fp8 of compressed-tensors": ("fp8 rows, bf16", compressed(FLOAT8, "float-quantized"), ""),
    "fp8 with bf16 scales": (
        "fp8 blocks, bf16",
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        "",
    ),
}
SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "num_hidden_layers": 3}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_values(name: str, tmp_path: Path, ids: list[int]) -> None:
    how, quantization, only = MODELS[name]
    source = tmp_path / "model"
    make_toy("v3", source, **SIZES)
    expected = reference(tmp_path / "meant", source, quantise_toy(source, HOW[how][1], only), ids)
    edit_config(source, quantization_config=quantization)
    assert Catalog(source).formats.experts == HOW[how][0]
    texts = []
    for tight in ({}, {"ram_slots": 4, "resident_trunks": 0}):
        with LLM.load(source, budget=RAM, **tight) as llm:
            assert torch.allclose(llm.logits(ids), expected, rtol=0, atol=1e-4 * expected.abs().max())
            texts.append(llm.generate([ids], SamplingParams(max_new_tokens=8, ignore_eos=True))[0].ids)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("formats", [("keep", "keep"), ("int8", "keep"), ("f32", "f32")])
def test_packed(formats: tuple[str, str], tmp_path: Path, ids: list[int]) -> None:
    """What is kept is copied byte for byte: int32 data, float8 and bfloat16 scales."""
    for how in ("int4 of 32", "nvfp4", "fp8 blocks, bf16"):
        source, out = tmp_path / how, tmp_path / f"{how} packed"
        make_toy("v3", source, **SIZES)
        quantise_toy(source, HOW[how][1], ".experts.")
        pack_model(source, out, experts=formats[0], trunk=formats[1])
        assert Catalog(out).formats.experts == (HOW[how][0] if formats[0] == "keep" else formats[0])
        with LLM.load(out, budget=RAM, exact=True) as packed, LLM.load(source, budget=RAM) as llm:
            expected = llm.logits(ids)
            if formats[0] == "int8":
                assert (packed.logits(ids) - expected).abs().max() < 0.1 * expected.abs().max()
            else:
                assert torch.allclose(packed.logits(ids), expected, rtol=1e-4, atol=1e-4)


def gpt_oss(folder: Path) -> Path:
    """A toy of gpt-oss as it is published: experts in MXFP4, in stacks. ``plain``: a folder of what they stand for."""
    make_toy("gpt-oss", folder / "plain", hidden_size=64, intermediate_size=32, num_hidden_layers=3)
    source = folder / "mxfp4"
    source.mkdir()
    (source / "config.json").write_bytes((folder / "plain" / "config.json").read_bytes())
    stored, meant = {}, {}
    for name, tensor in load_file(folder / "plain" / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = meant[name] = tensor
            continue
        made = [mxfp4(expert.T) for expert in tensor]
        meant[name] = torch.stack([values.T for _, values in made])
        for suffix in ("_blocks", "_scales"):
            stored[name + suffix] = torch.stack([parts[suffix] for parts, _ in made])
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, source / "model.safetensors")
    plain = folder / "plain" / "model.safetensors"
    save_file({name: part.contiguous() for name, part in meant.items()}, plain, {"format": "pt"})
    edit_config(source, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]})
    return source


def test_gpt_oss(tmp_path: Path, ids: list[int]) -> None:
    """The published layout, and packed, against transformers with the same values."""
    source = gpt_oss(tmp_path)
    with torch.no_grad():
        expected = load_toy(tmp_path / "plain")(torch.tensor([ids])).logits[0]
    catalog = Catalog(source)
    assert catalog.formats == ("mxfp4", "f32", "f32")
    place = catalog.record(ExpertKey(2, 7)).places["gate_up_proj"]
    assert (place.shape, place.size) == ((64, 2, 16), (64, 64))
    texts = []
    for tight in ({}, {"ram_slots": 4, "resident_trunks": 0}):
        with LLM.load(source, budget=RAM, **tight) as llm:
            assert torch.allclose(llm.logits(ids), expected, rtol=0, atol=1e-4 * expected.abs().max())
            texts.append(llm.generate([ids], SamplingParams(max_new_tokens=8, ignore_eos=True))[0].ids)
    assert texts[0] == texts[1]
    for experts in ("keep", "f32", "int8"):
        pack_model(source, tmp_path / experts, experts=experts, trunk="keep")
        tolerance = (0.1 if experts == "int8" else 1e-4) * expected.abs().max()
        with LLM.load(tmp_path / experts, budget=RAM) as llm:
            assert torch.allclose(llm.logits(ids), expected, rtol=0, atol=tolerance)


def test_stacks_that_lack_experts(tmp_path: Path) -> None:
    source = gpt_oss(tmp_path)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    for part, error in (
        (tensors[name][:7], "down_proj_scales is missing"),
        (tensors[name][:0], "down_proj_scales is missing"),
        (tensors[name].sum(), "down_proj_scales is missing"),
        (tensors[name][:, :3], r"expected \[64, 1\]"),
    ):
        save_file(tensors | {name: part.contiguous()}, source / "model.safetensors")
        with pytest.raises(CheckpointError, match=error):
            Catalog(source)


# --- configs


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "hqq", "bits": 4}, ["'hqq'", "{'bits': 4}", "compressed-tensors", "NVFP4"]),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, ["'gptq'", "'bits': 8"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, ["'gptq'", "'group_size': -1"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, ["desc_act", "g_idx"]),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:mlp": {"desc_act": True}}}, ["desc_act", "g_idx"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, ["marlin"]),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, ["'awq'", "gemv"]),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": False}, ["zero_point"]),
        ({"quant_method": "awq"}, ["'awq'"]),
        ({"quant_method": ["fp8"]}, ["['fp8']"]),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, ["[64, 64]", "[128, 128]"]),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, ["W4A8_AWQ"]),
        ({"quant_method": "modelopt", "quant_algo": ["FP8"]}, ["modelopt"]),
        (compressed({**INT4, "symmetric": False}, "pack-quantized"), ["pack-quantized", "symmetric"]),
        (compressed({**INT4, "group_size": 48}, "pack-quantized"), ["48"]),
        (compressed({**INT4, "actorder": "group"}, "pack-quantized"), ["actorder"]),
        (compressed({**INT4, "num_bits": 8}, "pack-quantized"), ["num_bits"]),
        (compressed(INT4, "marlin-24"), ["marlin-24"]),
        (compressed({**FLOAT4, "group_size": 32}, "nvfp4-pack-quantized"), ["tensor_group"]),
        (compressed({**MX4, "group_size": 16}, "mxfp4-pack-quantized"), ["mxfp4-pack-quantized"]),
        (compressed({**FLOAT8, "strategy": "block"}, "float-quantized"), ["strategy"]),
        (compressed(INT4, "pack-quantized", transform_config={"config_groups": {"R1": {}}}), ["R1"]),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, ["compressed-tensors"]),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path: Path, quantization: dict[str, Any], words: list[str]) -> None:
    """Each has other tensors, or the same with another meaning."""
    make_toy("v3", tmp_path, num_hidden_layers=2)
    edit_config(tmp_path, quantization_config=quantization)
    with pytest.raises(UnsupportedModelError) as caught:
        Catalog(tmp_path)
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "quantization",
    [
        {"dynamic": {"a": 3}, "quant_method": "gptq"},
        {"config_groups": 3},
        {"config_groups": {"a": 3}},
        {"config_groups": {"a": {"weights": 3}}},
        {"ignore": 3},
    ],
    ids=str,
)
def test_malformed_configs(tmp_path: Path, quantization: dict[str, Any]) -> None:
    make_toy("v3", tmp_path, num_hidden_layers=2)
    edit_config(tmp_path, quantization_config={**KIMI, **quantization})
    with pytest.raises(CheckpointError, match=r"quantization_config.*expected"):
        Catalog(tmp_path)


def test_sizes_as_published() -> None:
    """Kimi-K2-Thinking: 594 GB. Experts have int4, all else bf16."""
    config = json.loads(json.dumps(dict(find_config("Kimi-K2").config)))
    found = Outline({**config, "quantization_config": KIMI}, "here")
    assert (found.format, found.formats) == ("int4_g32", ("int4_g32", "bf16", "bf16"))
    assert found.file_bytes == pytest.approx(594e9, rel=0.02)
    whole = compressed(FLOAT8, "float-quantized", ignore=["lm_head"])
    assert Outline({**config, "quantization_config": whole}, "here").formats == ("fp8_rows", "fp8_rows", "bf16")
