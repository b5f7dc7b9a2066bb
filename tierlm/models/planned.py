"""Families that can be planned for, not run yet: grouped-query attention with experts. Shapes only.

Qwen3-MoE, Mixtral and gpt-oss, after their classes in `transformers`. A spec of these stands for its attention so that
the arithmetic of sizes is the same as for latent attention: ``kv_rank`` is what a token caches in a layer, keys and
values together, and no part of a head is apart for rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tierlm.errors import CheckpointError
from tierlm.models.deepseek import Shapes, token_ids
from tierlm.spec import ExpertKey, ModelSpec, Rope, RouterSpec, TrunkKey

MODEL_TYPES = ("qwen3_moe", "mixtral", "gpt_oss")


def read_spec(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The ModelSpec of a ``config.json``. Raises CheckpointError, naming ``where``."""

    def number(*names: str) -> int:
        found = next((config[name] for name in names if config.get(name) is not None), None)
        if type(found) is not int or found < 1:
            raise CheckpointError(f"{where}: {' or '.join(names)}: expected a whole number, found {found!r}")
        return found

    heads, layers = number("num_attention_heads"), number("num_hidden_layers")
    head = number("head_dim") if config.get("head_dim") else number("hidden_size") // heads
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise CheckpointError(f"{where}: layers without experts between those with experts are not known here")
    width = number("moe_intermediate_size", "intermediate_size")
    return ModelSpec(
        model_type=config["model_type"],
        vocab=number("vocab_size"),
        hidden=number("hidden_size"),
        layers=layers,
        dense_layers=0,
        dense_width=width,
        expert_width=width,
        experts=number("num_experts", "num_local_experts"),
        experts_per_token=number("num_experts_per_tok", "experts_per_token"),
        shared_experts=0,
        router=RouterSpec("softmax", 1, 1, True, 1.0),
        heads=heads,
        q_rank=None,
        kv_rank=2 * number("num_key_value_heads") * head,
        nope_dim=head,
        rope_dim=0,
        value_dim=head,
        norm_eps=1e-6,
        rope=Rope(10000.0, interleaved=False),
        max_position=number("max_position_embeddings"),
        bos=None,
        eos=token_ids(config.get("eos_token_id")),
        tied_head=bool(config.get("tie_word_embeddings", False)),
    )


def expert_tensors(spec: ModelSpec, key: ExpertKey) -> Shapes:
    prefix = f"model.layers.{key.layer}.mlp.experts.{key.expert}."
    width, hidden = spec.expert_width, spec.hidden
    found: Shapes = {
        "gate_proj": (prefix + "gate_proj.weight", (width, hidden)),
        "up_proj": (prefix + "up_proj.weight", (width, hidden)),
        "down_proj": (prefix + "down_proj.weight", (hidden, width)),
    }
    if spec.model_type == "gpt_oss":
        found["gate_up_bias"] = (prefix + "gate_up_proj_bias", (2 * width,))
        found["down_bias"] = (prefix + "down_proj_bias", (hidden,))
    return found


def trunk_tensors(spec: ModelSpec, key: TrunkKey) -> Shapes:
    layer = f"model.layers.{key.layer}."
    queries, keys = spec.heads * spec.nope_dim, spec.kv_rank // 2
    found: Shapes = {
        "input_layernorm": (layer + "input_layernorm.weight", (spec.hidden,)),
        "q_proj": (layer + "self_attn.q_proj.weight", (queries, spec.hidden)),
        "k_proj": (layer + "self_attn.k_proj.weight", (keys, spec.hidden)),
        "v_proj": (layer + "self_attn.v_proj.weight", (keys, spec.hidden)),
        "o_proj": (layer + "self_attn.o_proj.weight", (spec.hidden, queries)),
    }
    if spec.model_type == "qwen3_moe":
        found |= {f"{name}_norm": (f"{layer}self_attn.{name}_norm.weight", (spec.nope_dim,)) for name in "qk"}
    if spec.model_type == "gpt_oss":
        found["sinks"] = (layer + "self_attn.sinks", (spec.heads,))
        for name, size in (("q", queries), ("k", keys), ("v", keys), ("o", spec.hidden)):
            found[f"{name}_bias"] = (f"{layer}self_attn.{name}_proj.bias", (size,))
    return found


def gate_tensors(spec: ModelSpec) -> Shapes:
    found: Shapes = {"norm": ("model.norm.weight", (spec.hidden,))}
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        found[f"{layer}.norm"] = (prefix + "post_attention_layernorm.weight", (spec.hidden,))
        found[f"{layer}.gate"] = (prefix + "mlp.gate.weight", (spec.experts, spec.hidden))
        if spec.model_type == "gpt_oss":
            found[f"{layer}.bias"] = (prefix + "mlp.router.bias", (spec.experts,))
    return found


def embedding_name() -> str:
    return "model.embed_tokens.weight"


def head_name(spec: ModelSpec) -> str:
    return embedding_name() if spec.tied_head else "lm_head.weight"
