"""AWQ and GPTQ: models of several families, from published files to logits and packed stores. Values: test_published.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_dense import SIZES as DENSE_SIZES
from test_published import HOW, RAM, Tensors, quantise_toy, words
from torch import Tensor
from toys import edit_config, make_toy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tierlm import LLM, SamplingParams
from tierlm.formats import FORMATS
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
