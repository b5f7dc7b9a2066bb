"""Toy models of every family, made with `transformers`, which is also the reference: seeded random weights, routers
sharp enough that tokens go different ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

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

TOYS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("v2", {"topk_method": "greedy"}),
    "v2-q-lora": ("v2", {"topk_method": "greedy", "q_lora_rank": 20, "n_shared_experts": 1}),
    "v2-grouped": ("v2", {**GROUPED, "q_lora_rank": 20, "routed_scaling_factor": 4.0}),
    "v2-yarn": ("v2", {**GROUPED, "rope_parameters": YARN}),
    "v3": ("v3", {"n_group": 4, "topk_group": 2, "q_lora_rank": 20, "n_shared_experts": 1}),
    "v3-one-group": ("v3", {"n_group": 1, "topk_group": 1, "q_lora_rank": 20, "norm_topk_prob": False}),
    "v3-yarn": ("v3", {"n_group": 2, "topk_group": 1, "q_lora_rank": 20, "rope_parameters": YARN}),
    "v3-half-rope": ("v3", {"n_group": 2, "topk_group": 1, "rope_interleave": False}),
}


def make_toy(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write the toy called ``name`` to ``folder``, and return it as a `transformers` model."""
    kind, own = TOYS[name]
    torch.manual_seed(7)
    settings = {**COMMON, **own, **changes}
    if kind == "v2":
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**settings))
    else:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings, num_mtp_layers=0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # the norms, which start at one
                parameter.add_(0.2 * torch.randn_like(parameter))
        for layer in model.model.layers[settings["first_k_dense_replace"] :]:
            layer.mlp.gate.weight.normal_(0, 0.5)
            if kind == "v3":
                layer.mlp.gate.e_score_correction_bias.normal_(0, 0.3)
    model.set_experts_implementation("eager")  # the default one takes seconds at these sizes
    model.to(dtype).eval().save_pretrained(folder)
    return model


def load_toy(folder: Path) -> Any:
    """A saved toy as a `transformers` model with its weights widened to float32."""
    kind = DeepseekV2ForCausalLM if "V2" in (folder / "config.json").read_text() else DeepseekV3ForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
