"""Dense models, whose layers stream as trunks, against `transformers`: Llama 3's RoPE, windows, QK-norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tierlm import LLM, SamplingParams, UnsupportedModelError
from tierlm.models import read_spec

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6, "num_hidden_layers": 7}
GEMMA4: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 24,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 6,
    "num_hidden_layers": 7,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) + ["full_attention"],
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**GEMMA, "rope_parameters": GEMMA_ROPE}),
    "gemma4": (Gemma4ForCausalLM, Gemma4TextConfig, GEMMA4),
}
DELTA: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
KINDS["qwen35"] = (Qwen3_5ForCausalLM, Qwen3_5TextConfig, DELTA)
PROMPTS = [[3, 5, 7, 100, 4] * 9, [9, 8, 7], [2] * 20]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    made, config, more = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    reference = made(config(**{**SIZES, **more})).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 1:  # the norms
                parameter.add_(0.2 * torch.randn_like(parameter))
    reference.save_pretrained(folder)
    return folder, reference


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 7, "resident_trunks": 0}, {"resident_trunks": 2}])
def test_logits_and_tokens_equal_transformers(model: tuple[Path, Any], options: dict[str, Any]) -> None:
    """In one chunk and in several, resident and streamed, alone and in a batch."""
    folder, reference = model
    with LLM.load(folder, probe="off", context=256, **options) as llm, torch.no_grad():
        for prompt in PROMPTS:
            expected = reference(torch.tensor([prompt])).logits[0]
            assert torch.allclose(llm.logits(prompt), expected, rtol=0, atol=1e-4)
        results = llm.generate(PROMPTS, SamplingParams(max_new_tokens=12, ignore_eos=True))
        for prompt, result in zip(PROMPTS, results, strict=True):
            ids = list(prompt)
            for token in result.ids:
                assert token == int(reference(torch.tensor([ids])).logits[0, -1].argmax())
                ids.append(token)


def test_rope_types_that_are_unknown() -> None:
    config = {**SIZES, "model_type": "llama", "rope_scaling": {"rope_type": "longrope"}}
    with pytest.raises(UnsupportedModelError, match="'longrope' is not supported; supported are default, yarn, llama3"):
        read_spec(config, "here")
