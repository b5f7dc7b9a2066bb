"""Multi-modal checkpoints run text-only: their language models against `transformers`, with a note about the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import COMMON, DELTA, GEMMA4, GEMMA4_MOE, GLM4, QWEN3, edit_config
from transformers import AutoConfig, AutoModelForImageTextToText

from tierlm import LLM, CheckpointError, UnsupportedModelError
from tierlm.checkpoints.checkpoint import Checkpoint
from tierlm.checkpoints.multimodal import text_config
from tierlm.models.catalog import Catalog
from tierlm.models.outline import Outline
from tierlm.models.packing import pack_model
from tierlm.planning.known import find_config

DENSE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 8,
    "out_hidden_size": 48,
}
KIMI = {**COMMON, "n_group": 1, "topk_group": 1, "q_lora_rank": 20, "num_mtp_layers": 0, "model_type": "deepseek_v3"}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
MODELS: dict[str, dict[str, Any]] = {  # model_type -> its config, without vision
    "kimi_k25": {"text_config": KIMI, "projection_hidden_size": 64, "tie_word_embeddings": False},
    "mistral3": {"text_config": {**DENSE, "model_type": "mistral"}, "tie_word_embeddings": False},
    "qwen3_vl": {"text_config": {**DENSE, "tie_word_embeddings": True}, "tie_word_embeddings": True},
    "gemma3": {
        "text_config": {**DENSE, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7},
        "mm_tokens_per_image": 1,
    },
    "glm4v_moe": {"text_config": {**GLM4, "rope_parameters": MROPE}},
    "qwen3_vl_moe": {"text_config": QWEN3, "tie_word_embeddings": False},
    "gemma4": {
        "text_config": {**GEMMA4, **GEMMA4_MOE},
        "vision_config": {**VISION, "head_dim": 8, "num_key_value_heads": 2},
    },
    "qwen3_5_moe": {"text_config": {**DELTA, "rope_parameters": MROPE}},
}
IDS = [(7 * i) % 129 + 2 for i in range(40)]


def make(kind: str, folder: Path) -> Any:
    """Write a toy of ``kind`` to ``folder``; returns it as a `transformers` model."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(kind, **{"vision_config": VISION} | MODELS[kind])
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith(("mlp.gate.weight", "router.proj.weight")):
                parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    if kind == "qwen3_vl_moe":  # as published; transformers 5.23 saves the other layout, and loads both
        tensors = load_file(folder / "model.safetensors")
        turned = {name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in tensors.items()}
        save_file(turned, folder / "model.safetensors")
    if kind == "kimi_k25":  # as published; transformers 5.23 saves the layers under another name than it loads
        file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
        tensors = {name.replace("model.blocks.", "model.layers."): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file)
        edit_config(folder, text_config={**config["text_config"], "model_type": "kimi_k2"})
    return model


@pytest.fixture(scope="module", params=MODELS)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, make(request.param, folder)


def test_the_language_model_equals_transformers(toy: tuple[str, Path, Any]) -> None:
    _, folder, reference = toy
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([IDS])).logits[0]
    for options in ({}, {"prefill_chunk": 7, "resident_trunks": 0}):
        with LLM.load(folder, probe="off", heat=False, **options) as llm:
            assert torch.allclose(llm.logits(IDS), expected, rtol=0, atol=2e-4)
            assert any("tensors of vision are not used" in note for note in llm.stats().notes)


def test_a_pack_is_of_the_language_model(toy: tuple[str, Path, Any], tmp_path: Path) -> None:
    """Its config is the language model's, so it is read like any other."""
    _, folder, _ = toy
    pack_model(folder, tmp_path / "packed", experts="keep", trunk="keep")
    assert "text_config" not in json.loads((tmp_path / "packed" / "config.json").read_text())
    path = tmp_path / "packed"
    packed, original = Catalog(path), Catalog(folder)
    assert packed.spec == original.spec and packed.vision == [] and len(original.vision) > 5
    with LLM.load(folder, probe="off", heat=False) as one, LLM.load(path, probe="off", heat=False) as other:
        assert torch.equal(one.logits(IDS), other.logits(IDS))


def test_plans_know_the_language_model(toy: tuple[str, Path, Any]) -> None:
    _, folder, _ = toy
    named = find_config(str(folder))
    assert Outline(named.config, named.where).spec == Catalog(folder).spec


def test_the_head_is_the_whole_models(tmp_path: Path) -> None:
    """Published configs may say something else inside."""
    inner = {**DENSE, "model_type": "mistral", "tie_word_embeddings": False, "eos_token_id": None}
    config = {"model_type": "mistral3", "text_config": inner, "tie_word_embeddings": True, "eos_token_id": [5, 6]}
    found = text_config(config)
    assert found["tie_word_embeddings"] is True and found["eos_token_id"] == [5, 6] and found["model_type"] == "mistral"


def test_a_model_of_which_no_text_is_known_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {"hidden_size": 3}}))
    with pytest.raises(UnsupportedModelError, match="model_type 'llava' is not supported"):
        Catalog(tmp_path)


def test_a_tensor_under_both_names(tmp_path: Path) -> None:
    save_file(
        {f"{prefix}norm.weight": torch.ones(2) for prefix in ("model.", "language_model.model.")},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is also in"):
        Checkpoint(tmp_path)
