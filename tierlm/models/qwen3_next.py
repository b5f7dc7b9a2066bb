"""Qwen3-Next and Qwen3.5, after `Qwen3NextForCausalLM`, `Qwen3_5MoeForCausalLM` and `Qwen3_5ForCausalLM` in
transformers. No torch."""

from __future__ import annotations

from dataclasses import replace

from tierlm.attention_spec import Delta
from tierlm.models.config_reader import Config
from tierlm.models.family import Names
from tierlm.spec import Dense, LayerSpec, ModelSpec, Moe, RouterSpec

LINEAR, FULL = "linear_attention", "full_attention"


class Qwen3Next(Names):
    """Three layers of gated DeltaNet, then one of gated attention with QK-norm that rotates a part of each head; MoE
    with one shared expert behind a gate of its own, or in Qwen3.5 a SwiGLU.

    GGUF files order some matrices otherwise, and store the decay's base and norms as they are used."""

    shared = "shared_expert."

    def read_spec(self, config: Config) -> ModelSpec:
        config.allow(hidden_act=("silu",), attention_bias=(False,))
        full = config.grouped(config.rope(interleaved=False), qk_norm="head", rope_dim=config.rotated(0.25), gated=True)
        count, period = config.number("num_hidden_layers"), config.number("full_attention_interval", default=4)
        usual = [FULL if period and (layer + 1) % period == 0 else LINEAR for layer in range(count)]
        kinds = config.listed("layer_types", str, usual)
        if len(kinds) != count or not set(kinds) <= {LINEAR, FULL}:
            raise config.wrong("layer_types", f"{LINEAR} or {FULL} for {count} layers", kinds)
        if config.number("num_experts", default=0):
            layers = config.sparse(full, self._moe(config))
        else:
            layers = (LayerSpec(full, Dense(config.number("intermediate_size"))),) * count
        linear = self._linear(config)
        stack = (
            replace(layer, attention=linear) if kind == LINEAR else layer
            for layer, kind in zip(layers, kinds, strict=True)
        )
        return config.model(tuple(stack), 1e-6, zero_centred=config.flag("zero_centred_norms", True))

    def _moe(self, config: Config) -> Moe:
        return Moe(
            experts=config.number("num_experts"),
            experts_per_token=config.number("num_experts_per_tok"),
            width=config.number("moe_intermediate_size"),
            shared_width=config.number("shared_expert_intermediate_size"),
            router=RouterSpec("softmax", normalize=config.flag("norm_topk_prob", True)),
            shared_gate=True,
        )

    def _linear(self, config: Config) -> Delta:
        first = config.model_type == "qwen3_next"  # Qwen3.5 has more and smaller matrices
        joined = config.flag("linear_qkvz_joined", first)
        return Delta(
            key_heads=config.number("linear_num_key_heads"),
            value_heads=config.number("linear_num_value_heads"),
            key_dim=config.number("linear_key_head_dim"),
            value_dim=config.number("linear_value_head_dim"),
            kernel=config.number("linear_conv_kernel_dim", default=4),
            projections=(*(("qkvz",) if joined else ("qkv", "z")), *(("ba",) if first else ("b", "a"))),
            tiled=config.flag("linear_heads_tiled", False),
            log_decay=config.flag("linear_decay_log", True),
        )
