"""The DeepSeek family: DeepSeek-V2, V2-Lite, V3, R1, V3.1, and Kimi-K2, which has the same architecture.

Config -> ModelSpec, and the names and shapes of the tensors. No forward code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tierlm.errors import CheckpointError, UnsupportedModelError
from tierlm.spec import ExpertKey, ModelSpec, Rope, RouterSpec, TrunkKey, Yarn

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
Shapes = dict[str, tuple[str, tuple[int, ...]]]  # role -> (tensor name, shape)


def read_spec(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The ModelSpec of a ``config.json``. Raises UnsupportedModelError and CheckpointError, naming ``where``."""
    model_type = config["model_type"]
    _refuse_unknown(config, where)
    v2 = model_type == "deepseek_v2"

    def number(name: str, default: int | None = None) -> int:
        value = config.get(name, default)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{where}: {name}: expected a whole number, found {value!r}")
        return value

    def real(name: str, default: float) -> float:
        value = config.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise CheckpointError(f"{where}: {name}: expected a number, found {value!r}")
        return float(value)

    experts, chosen = number("n_routed_experts"), number("num_experts_per_tok")
    grouped = not v2 or config.get("topk_method", "greedy") == "group_limited_greedy"
    groups = number("n_group", 1) if grouped else 1
    kept = number("topk_group", 1) if grouped else 1
    normalize = bool(config.get("norm_topk_prob", not v2)) and chosen > 1
    router = RouterSpec(
        score="softmax" if v2 else "sigmoid",
        groups=groups,
        groups_chosen=kept,
        normalize=normalize,
        scale=1.0 if v2 and normalize else real("routed_scaling_factor", 1.0),
    )
    spec = ModelSpec(
        model_type=model_type,
        vocab=number("vocab_size"),
        hidden=number("hidden_size"),
        layers=number("num_hidden_layers"),
        dense_layers=min(number("first_k_dense_replace", 0), number("num_hidden_layers")),
        dense_width=number("intermediate_size"),
        expert_width=number("moe_intermediate_size"),
        experts=experts,
        experts_per_token=chosen,
        shared_experts=number("n_shared_experts", 0),
        router=router,
        heads=number("num_attention_heads"),
        q_rank=number("q_lora_rank", 0) or None,
        kv_rank=number("kv_lora_rank"),
        nope_dim=number("qk_nope_head_dim"),
        rope_dim=number("qk_rope_head_dim"),
        value_dim=number("v_head_dim"),
        norm_eps=real("rms_norm_eps", 1e-6),
        rope=_rope(config, v2, where),
        max_position=number("max_position_embeddings"),
        bos=config.get("bos_token_id"),
        eos=token_ids(config.get("eos_token_id")),
        tied_head=bool(config.get("tie_word_embeddings", False)),
    )
    _check(spec, where)
    return spec


def token_ids(value: Any) -> tuple[int, ...]:
    """``eos_token_id`` of a config: absent, one id, or a list."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def expert_tensors(spec: ModelSpec, key: ExpertKey) -> Shapes:
    prefix = f"model.layers.{key.layer}.mlp.experts.{key.expert}."
    return _mlp(prefix, spec.hidden, spec.expert_width)


def trunk_tensors(spec: ModelSpec, key: TrunkKey) -> Shapes:
    """What every token uses of one layer, but for its gate (``gate_tensors``)."""
    layer, heads = f"model.layers.{key.layer}.", spec.heads
    attention = layer + "self_attn."
    query_width = heads * (spec.nope_dim + spec.rope_dim)
    found: Shapes = {"input_layernorm": (layer + "input_layernorm.weight", (spec.hidden,))}
    if spec.q_rank is None:
        found["q_proj"] = (attention + "q_proj.weight", (query_width, spec.hidden))
    else:
        found["q_a_proj"] = (attention + "q_a_proj.weight", (spec.q_rank, spec.hidden))
        found["q_a_layernorm"] = (attention + "q_a_layernorm.weight", (spec.q_rank,))
        found["q_b_proj"] = (attention + "q_b_proj.weight", (query_width, spec.q_rank))
    found["kv_a_proj"] = (attention + "kv_a_proj_with_mqa.weight", (spec.latent_dim, spec.hidden))
    found["kv_a_layernorm"] = (attention + "kv_a_layernorm.weight", (spec.kv_rank,))
    found["kv_b_proj"] = (attention + "kv_b_proj.weight", (heads * (spec.nope_dim + spec.value_dim), spec.kv_rank))
    found["o_proj"] = (attention + "o_proj.weight", (spec.hidden, heads * spec.value_dim))
    if not spec.is_moe(key.layer):
        found |= _mlp(layer + "mlp.", spec.hidden, spec.dense_width)
    elif spec.shared_experts:
        found |= _mlp(layer + "mlp.shared_experts.", spec.hidden, spec.shared_experts * spec.expert_width)
    return found


def gate_tensors(spec: ModelSpec) -> Shapes:
    """The small tensors that are always resident: final norm, and each layer's second norm and router.

    They are apart from the trunks because the layer before evaluates them, to know what comes next.
    """
    found: Shapes = {"norm": ("model.norm.weight", (spec.hidden,))}
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        found[f"{layer}.norm"] = (prefix + "post_attention_layernorm.weight", (spec.hidden,))
        if spec.is_moe(layer):
            found[f"{layer}.gate"] = (prefix + "mlp.gate.weight", (spec.experts, spec.hidden))
            if spec.router.score == "sigmoid":
                found[f"{layer}.bias"] = (prefix + "mlp.gate.e_score_correction_bias", (spec.experts,))
    return found


def embedding_name() -> str:
    return "model.embed_tokens.weight"


def head_name(spec: ModelSpec) -> str:
    return embedding_name() if spec.tied_head else "lm_head.weight"


def ignored(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor belongs to a layer past the last: multi-token prediction, which is not run."""
    parts = name.split(".")
    return name.startswith("model.layers.") and parts[2].isdigit() and int(parts[2]) >= spec.layers


def _mlp(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        "gate_proj": (prefix + "gate_proj.weight", (width, hidden)),
        "up_proj": (prefix + "up_proj.weight", (width, hidden)),
        "down_proj": (prefix + "down_proj.weight", (hidden, width)),
    }


def _rope(config: Mapping[str, Any], v2: bool, where: str) -> Rope:
    """RoPE from ``rope_scaling`` + ``rope_theta`` (as published), or transformers 5's ``rope_parameters``."""
    table: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = table.get("rope_theta") or config.get("rope_theta") or 10000.0
    if not isinstance(theta, (int, float)):
        raise CheckpointError(f"{where}: rope_theta: expected a number, found {theta!r}")
    kind = table.get("rope_type") or table.get("type") or "default"
    yarn = None
    if kind == "yarn":
        try:
            original = int(table["original_max_position_embeddings"])
            factor = table.get("factor") or config["max_position_embeddings"] / original
            yarn = Yarn(
                factor=float(factor),
                original_max_position=original,
                beta_fast=float(table.get("beta_fast") or 32),
                beta_slow=float(table.get("beta_slow") or 1),
                mscale=_optional(table, "mscale"),
                mscale_all_dim=_optional(table, "mscale_all_dim"),
                attention_factor=_optional(table, "attention_factor"),
                truncate=bool(table.get("truncate", True)),
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{where}: malformed YaRN parameters: {error!r} in {table}") from error
    elif kind != "default":
        raise UnsupportedModelError(f"{where}: rope type {kind!r} is not supported; default and yarn are")
    return Rope(float(theta), interleaved=v2 or bool(config.get("rope_interleave", True)), yarn=yarn)


def _optional(table: Mapping[str, Any], name: str) -> float | None:
    return None if table.get(name) is None else float(table[name])


def _refuse_unknown(config: Mapping[str, Any], where: str) -> None:
    """What would silently give wrong text: another quantisation, activation, scoring or layer pattern."""
    for name in ("quantization_config", "rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise CheckpointError(f"{where}: {name}: expected an object, found {config[name]!r}")
    quantization = config.get("quantization_config") or {}
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if quantization and (method != "fp8" or block != [128, 128]):
        raise UnsupportedModelError(
            f"{where}: quantization {method!r} with blocks {block} is not supported; fp8 with [128, 128] is"
        )
    v2 = config["model_type"] == "deepseek_v2"
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "scoring_func": ("softmax",) if v2 else ("sigmoid",),
        "topk_method": ("greedy", "group_limited_greedy") if v2 else ("noaux_tc",),
        "moe_layer_freq": (1,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    }
    for name, values in allowed.items():
        if config.get(name) is not None and config[name] not in values:
            wanted = " or ".join(map(repr, values))
            raise UnsupportedModelError(f"{where}: {name} {config[name]!r} is not supported; {wanted} is")


def _check(spec: ModelSpec, where: str) -> None:
    router = spec.router
    positive = ("vocab", "hidden", "layers", "heads", "kv_rank", "nope_dim", "rope_dim", "value_dim", "max_position")
    for name in positive:
        if getattr(spec, name) < 1:
            raise CheckpointError(f"{where}: {name} must be at least 1, found {getattr(spec, name)}")
    if spec.rope_dim % 2:
        raise CheckpointError(f"{where}: qk_rope_head_dim must be even, found {spec.rope_dim}")
    if spec.dense_layers == spec.layers:
        return
    if not 1 <= router.groups_chosen <= router.groups or spec.experts % max(1, router.groups):
        raise CheckpointError(
            f"{where}: {spec.experts} experts in {router.groups} groups, {router.groups_chosen} chosen"
        )
    group = spec.experts // router.groups
    if not 1 <= spec.experts_per_token <= group * router.groups_chosen or (router.score == "sigmoid" and group < 2):
        raise CheckpointError(
            f"{where}: {spec.experts_per_token} experts a token out of {router.groups_chosen} groups of {group}"
        )
