"""Toy models of every family, made with `transformers`, which is also the reference: seeded random weights, with
routers sharp enough that tokens go different ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.15,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
}
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}

GQA: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.15,
}
QWEN3 = {**GQA, "num_experts": 16, "moe_intermediate_size": 24, "norm_topk_prob": True}
QWEN2 = {**GQA, "num_experts": 16, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32, "head_dim": 8}
GLM4 = {
    **GQA,
    "n_routed_experts": 16,
    "moe_intermediate_size": 24,
    "attention_bias": True,
    "n_group": 1,
    "topk_group": 1,
}
# With fewer heads, many keys of a query would tie: no head has a positive product with them.
INDEXED = {**COMMON, "q_lora_rank": 20, "index_n_heads": 16, "index_head_dim": 16, "n_group": 1, "topk_group": 1}
GEMMA4: dict[str, Any] = {
    **GQA,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 5,
    "global_head_dim": 24,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 20.0,
}
GEMMA4_MOE: dict[str, Any] = {
    "enable_moe_block": True,
    "num_experts": 16,
    "top_k_experts": 4,
    "moe_intermediate_size": 24,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
DELTA = {
    **GQA,
    "num_experts": 16,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
QWEN3_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
# For each kind of toy: its transformers classes, its model_type, and its common settings.
KINDS: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "v2": (DeepseekV2Config, DeepseekV2ForCausalLM, "deepseek_v2", COMMON),
    "v3": (DeepseekV3Config, DeepseekV3ForCausalLM, "deepseek_v3", {**COMMON, "num_mtp_layers": 0}),
    "v32": (DeepseekV32Config, DeepseekV32ForCausalLM, "deepseek_v32", INDEXED),
    "glm5": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM, "glm_moe_dsa", INDEXED),
    "qwen3": (Qwen3MoeConfig, Qwen3MoeForCausalLM, "qwen3_moe", QWEN3),
    "mixtral": (MixtralConfig, MixtralForCausalLM, "mixtral", {**GQA, "num_local_experts": 8}),
    "glm-flash": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, "glm4_moe_lite", {**COMMON, "q_lora_rank": 20}),
    "glm4": (Glm4MoeConfig, Glm4MoeForCausalLM, "glm4_moe", GLM4),
    "minimax": (MiniMaxM2Config, MiniMaxM2ForCausalLM, "minimax_m2", {**GQA, "num_local_experts": 16}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, "olmoe", {**GQA, "num_experts": 16, "head_dim": 8}),
    "gpt-oss": (GptOssConfig, GptOssForCausalLM, "gpt_oss", {**GQA, "num_local_experts": 8, "sliding_window": 4}),
    "qwen2": (Qwen2MoeConfig, Qwen2MoeForCausalLM, "qwen2_moe", QWEN2),
    "gemma4": (Gemma4TextConfig, Gemma4ForCausalLM, "gemma4_text", GEMMA4),
    "qwen3-next": (Qwen3NextConfig, Qwen3NextForCausalLM, "qwen3_next", DELTA),
    "qwen35": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM, "qwen3_5_moe_text", DELTA),
}
TOYS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("v2", {"topk_method": "greedy"}),
    "v2-q-lora": ("v2", {"topk_method": "greedy", "q_lora_rank": 20, "n_shared_experts": 1}),
    "v2-grouped": ("v2", {**GROUPED, "q_lora_rank": 20, "routed_scaling_factor": 4.0}),
    "v2-yarn": ("v2", {**GROUPED, "rope_parameters": YARN}),
    "v3": ("v3", {"n_group": 4, "topk_group": 2, "q_lora_rank": 20, "n_shared_experts": 1}),
    "v3-one-group": ("v3", {"n_group": 1, "topk_group": 1, "q_lora_rank": 20, "norm_topk_prob": False}),
    "v3-yarn": ("v3", {"n_group": 2, "topk_group": 1, "q_lora_rank": 20, "rope_parameters": YARN}),
    "v3-half-rope": ("v3", {"n_group": 2, "topk_group": 1, "rope_interleave": False}),
    "v32": ("v32", {"rope_parameters": YARN}),
    "glm5": ("glm5", {}),
    "v32-sparse": ("v32", {"rope_parameters": YARN, "index_topk": 8}),
    "glm5-sparse": ("glm5", {"index_topk": 8, "indexer_types": ["full", "full", "shared", "full"]}),
    "qwen3": ("qwen3", {}),
    "qwen3-dense-between": ("qwen3", {"mlp_only_layers": [1], "tie_word_embeddings": True}),
    "qwen3-every-other": ("qwen3", {"decoder_sparse_step": 2, "norm_topk_prob": False, "head_dim": 8}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": QWEN3_YARN, "num_key_value_heads": 6}),
    "mixtral": ("mixtral", {}),
    "glm-flash": ("glm-flash", {}),
    "glm4": ("glm4", {"n_shared_experts": 2}),
    "glm4-qk-norm": ("glm4", {"use_qk_norm": True, "attention_bias": False, "first_k_dense_replace": 2}),
    "minimax": ("minimax", {"rotary_dim": 8}),
    "olmoe": ("olmoe", {}),
    "qwen2": ("qwen2", {}),
    "qwen3-next": ("qwen3-next", {"num_hidden_layers": 5}),
    "qwen35": ("qwen35", {}),
    "gpt-oss": ("gpt-oss", {"rope_parameters": {**QWEN3_YARN, "truncate": False}}),
    "gemma4": ("gemma4", GEMMA4_MOE),
}


def settings_of(name: str, **changes: Any) -> dict[str, Any]:
    """The config of the toy called ``name``, with its model_type."""
    kind, own = TOYS[name]
    return {**KINDS[kind][3], **own, **changes, "model_type": KINDS[kind][2]}


def make_toy(toy: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write the toy called ``toy`` to ``folder``; returns it as a `transformers` model."""
    config, made, _, _ = KINDS[TOYS[toy][0]]
    settings = settings_of(toy, **changes)
    del settings["model_type"]
    torch.manual_seed(7)
    model = made(config(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("bias"):  # norms start at one, biases at zero
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("A_log"):  # else states forget within a few tokens
                parameter.sub_(4)
        for layer in model.model.layers:
            if hasattr(layer, "layer_scalar"):
                layer.layer_scalar.fill_(0.8)
            if hasattr(layer, "router"):
                layer.router.proj.weight.normal_(0, 3.0)
            if (gate := getattr(layer.mlp, "gate", getattr(layer.mlp, "router", None))) is not None:
                gate.weight.normal_(0, 0.5)
                for owner in (gate, layer.mlp):
                    if hasattr(owner, "e_score_correction_bias"):
                        owner.e_score_correction_bias.normal_(0, 0.3)
    model.set_experts_implementation("eager")  # the default one takes seconds at these sizes
    model.to(dtype).eval().save_pretrained(folder)
    return model


def load_toy(folder: Path) -> Any:
    """A saved toy as a `transformers` model with its weights widened to float32."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    made = next(made for _, made, name, _ in KINDS.values() if name == model_type)
    return made.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
