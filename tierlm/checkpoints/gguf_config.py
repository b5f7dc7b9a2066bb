"""The metadata of a GGUF file in the words of Hugging Face's ``config.json``.

After convert_hf_to_gguf.py and llama-model.cpp of llama.cpp, which write and read the metadata. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tierlm.checkpoints.gguf_header import GgufTensor
from tierlm.errors import CheckpointError, UnsupportedModelError

FIELDS = {  # field of config.json -> key of the metadata, after the architecture's name
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "first_k_dense_replace": "leading_dense_block_count",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "num_nextn_predict_layers": "nextn_predict_layers",
}
SOFTMAX, SIGMOID = 1, 2  # values of expert_gating_func
Lookup = Callable[..., Any]  # key after the architecture's name, default -> value


def config_of(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], where: str) -> dict[str, Any]:
    """The ``config.json`` of a GGUF file's model. Raises UnsupportedModelError, CheckpointError."""
    try:
        return _config_of(metadata, tensors, where)
    except TypeError as error:
        raise CheckpointError(f"{where}: expected numbers in the metadata, found something else: {error}") from error


def _config_of(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], where: str) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    known = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if known is None:
        raise UnsupportedModelError(
            f"{where}: GGUF architecture {str(architecture)[:60]!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )

    def get(key: str, default: Any = None) -> Any:
        return _plain(metadata.get(f"{architecture}.{key}", default))

    config = {field: value for field, key in FIELDS.items() if (value := get(key)) is not None}
    config["num_hidden_layers"] = config.get("num_hidden_layers", 0) - config.get("num_nextn_predict_layers", 0)
    embedding = tensors.get("token_embd.weight")
    if embedding is not None:
        config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
    keys, values = (sum(name.endswith(f".attn_{kind}.weight") for name in tensors) for kind in "kv")
    config["attention_k_eq_v"] = values < keys
    config["linear_qkvz_joined"] = "blk.0.ssm_in.weight" in tensors
    if get("rope.scaling.type", "none") != "none":
        config["rope_scaling"] = _scaling(get)
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config["eos_token_id"] = [end for end in ends if end is not None]
    return config | known(config, get)


def _scaling(get: Lookup) -> dict[str, Any]:
    return {
        "rope_type": get("rope.scaling.type"),
        "factor": get("rope.scaling.factor"),
        "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        "beta_fast": get("rope.scaling.yarn_beta_fast"),
        "beta_slow": get("rope.scaling.yarn_beta_slow"),
        "attention_factor": get("rope.scaling.attn_factor"),
    }


def _deepseek(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    """Files with ``key_length_mla`` hold kv_b_proj in two halves, the key half transposed."""
    split = get("attention.key_length_mla") is not None
    ending = "_mla" if split else ""
    rope = get("rope.dimension_count", 0)
    sigmoid = get("expert_gating_func", SOFTMAX) == SIGMOID
    found: dict[str, Any] = {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "n_routed_experts": config.get("num_experts", 0),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": get(f"attention.key_length{ending}", 0) - rope,
        "v_head_dim": get(f"attention.value_length{ending}", 0),
        "kv_b_split": split,
        "topk_method": "noaux_tc" if sigmoid else "greedy",
    }
    if not sigmoid and config.get("n_group", 1) > 1:
        found["topk_method"] = "group_limited_greedy"
    if "norm_topk_prob" not in config:
        found["norm_topk_prob"] = False
    if "rope_scaling" in config and (logarithm := get("rope.scaling.yarn_log_multiplier")):
        scale = round(logarithm * 10, 6)  # the converter writes a tenth of mscale_all_dim
        found["rope_scaling"] = {**config["rope_scaling"], "mscale": scale, "mscale_all_dim": scale}
    return found


def _glm_dsa(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    return _deepseek(config, get) | {
        "model_type": "glm_moe_dsa",
        "index_n_heads": get("attention.indexer.head_count"),
        "index_head_dim": get("attention.indexer.key_length"),
        "index_topk": get("attention.indexer.top_k"),
    }


def _llama(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    """Llama and Mistral, dense, and Mixtral. The converter orders the rows of q and k for rotation of neighbours."""
    experts = config.get("num_experts", 0)
    return {
        "model_type": "mixtral" if experts else "llama",
        "num_local_experts": experts,
        "rope_interleave": True,
    }


def _qwen3_moe(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    return {"model_type": "qwen3_moe", "norm_topk_prob": True}


def _qwen3(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    return {"model_type": "qwen3"}


def _qwen2_moe(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": get("expert_shared_feed_forward_length"),
    }


def _qwen3_next(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    """One is added to the norms, and the decay's base is not a logarithm. Newer files have qkvz in two matrices."""
    heads = get("ssm.time_step_rank", 0)
    return {
        "model_type": "qwen3_next",
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": get("expert_shared_feed_forward_length"),
        "partial_rotary_factor": get("rope.dimension_count", 0) / max(1, config.get("head_dim", 1)),
        "full_attention_interval": get("full_attention_interval"),
        "linear_num_key_heads": get("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": get("ssm.state_size"),
        "linear_value_head_dim": get("ssm.inner_size", 0) // max(1, heads),
        "linear_conv_kernel_dim": get("ssm.conv_kernel"),
        "linear_decay_log": False,
        "zero_centred_norms": False,
    }


def _qwen35(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    """Value heads are ordered otherwise: neighbours have different key heads."""
    kind = "qwen3_5_moe_text" if config.get("num_experts") else "qwen3_5_text"
    return _qwen3_next(config, get) | {"model_type": kind, "linear_heads_tiled": True}


def _olmoe(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    return {"model_type": "olmoe", "norm_topk_prob": False}


def _glm4_moe(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    return {
        "model_type": "glm4_moe",
        "n_routed_experts": config.get("num_experts"),
        "partial_rotary_factor": get("rope.dimension_count", 0) / max(1, config.get("head_dim", 1)),
    }


def _minimax(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    return {
        "model_type": "minimax_m2",
        "num_local_experts": config.get("num_experts"),
        "intermediate_size": config.get("moe_intermediate_size"),
        "rotary_dim": get("rope.dimension_count"),
    }


def _gpt_oss(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    """YaRN without rounding, as published; the metadata does not say."""
    found: dict[str, Any] = {
        "model_type": "gpt_oss",
        "intermediate_size": config.get("moe_intermediate_size"),
        "sliding_window": get("attention.sliding_window"),
        "experts_split": True,
    }
    if "rope_scaling" in config:
        found["rope_scaling"] = {**config["rope_scaling"], "truncate": False}
    return found


def _gemma3(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    """One is added to the norms. The divisor of scores is not in the metadata: only the 27B model, which alone has 62
    layers, has another than ``head_dim``."""
    found: dict[str, Any] = {
        "model_type": "gemma3_text",
        "sliding_window": get("attention.sliding_window"),
        "query_pre_attn_scalar": config.get("head_dim"),
        "zero_centred_norms": False,
        "final_logit_softcapping": get("final_logit_softcapping"),
    }
    if get("block_count") == 62:
        found["query_pre_attn_scalar"] = config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1))
    return found


def _gemma4(config: Mapping[str, Any], get: Lookup) -> dict[str, Any]:
    """Sizes of attention may differ from layer to layer; the pairs that global layers do not rotate have divisors."""
    pattern, shared = get("attention.sliding_window_pattern"), config.get("num_key_value_heads")
    local = pattern[:1000] if isinstance(pattern, list) else []
    heads = shared if isinstance(shared, list) else [shared] * len(local)
    return {
        "model_type": "gemma4_text",
        "layer_types": ["sliding_attention" if own is True else "full_attention" for own in local],
        "per_layer_config": {
            str(layer): {"head_dim": get(f"attention.key_length{'_swa' * (own is True)}"), "num_key_value_heads": count}
            for layer, (own, count) in enumerate(zip(local, heads, strict=False))
        },
        "rope_parameters": {
            "sliding_attention": {"rope_theta": get("rope.freq_base_swa", 10000.0)},
            "full_attention": {"rope_theta": get("rope.freq_base", 1e6)},
        },
        "sliding_window": get("attention.sliding_window"),
        "final_logit_softcapping": get("final_logit_softcapping"),
        "hidden_size_per_layer_input": get("embedding_length_per_layer_input", 0),
        "num_kv_shared_layers": get("attention.shared_kv_layers", 0),
        "enable_moe_block": "num_experts" in config,
        "top_k_experts": config.get("num_experts_per_tok"),
    }


ARCHITECTURES = {
    "deepseek2": _deepseek,
    "glm-dsa": _glm_dsa,
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen3vl": _qwen3,
    "qwen3moe": _qwen3_moe,
    "qwen3vlmoe": _qwen3_moe,
    "qwen2moe": _qwen2_moe,
    "qwen3next": _qwen3_next,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
    "olmoe": _olmoe,
    "glm4moe": _glm4_moe,
    "minimax-m2": _minimax,
    "gpt-oss": _gpt_oss,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
}


def _plain(value: Any) -> Any:
    """float32 numbers as the shortest decimals that stand for them, so that 1e-5 stays 1e-5."""
    if isinstance(value, float):
        from numpy import errstate, float32

        with errstate(over="ignore"):
            return float(str(float32(value)))
    return value
