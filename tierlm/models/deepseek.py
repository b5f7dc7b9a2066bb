"""DeepSeek-V2, V2-Lite, V3, R1 and V3.1, and Kimi-K2, which shares their architecture. No torch."""

from __future__ import annotations

from tierlm.models.config_reader import Config
from tierlm.models.family import Names
from tierlm.spec import Dense, Latent, LayerSpec, ModelSpec, Moe, RouterSpec


class DeepSeek(Names):
    """Latent attention; a few dense layers, then MoE with a shared expert and, since V3, a correction bias."""

    def read_spec(self, config: Config) -> ModelSpec:
        v2 = config.model_type == "deepseek_v2"
        config.allow_fp8_blocks()
        config.allow(
            hidden_act=("silu",),
            scoring_func=("softmax",) if v2 else ("sigmoid",),
            topk_method=("greedy", "group_limited_greedy") if v2 else ("noaux_tc",),
            moe_layer_freq=(1,),
            attention_bias=(False,),
            mlp_bias=(False,),
        )
        attention = Latent(
            heads=config.number("num_attention_heads"),
            q_rank=config.number("q_lora_rank", default=0) or None,
            kv_rank=config.number("kv_lora_rank"),
            nope_dim=config.number("qk_nope_head_dim"),
            rope_dim=config.number("qk_rope_head_dim"),
            value_dim=config.number("v_head_dim"),
            rope=config.rope(interleaved=v2 or config.flag("rope_interleave", True)),
        )
        layers = config.number("num_hidden_layers")
        dense = min(config.number("first_k_dense_replace", default=0), layers)
        stack = [LayerSpec(attention, Dense(config.number("intermediate_size")))] * dense
        if dense < layers:
            stack += [LayerSpec(attention, self._moe(config, v2))] * (layers - dense)
        return config.model(tuple(stack), 1e-6)

    def _moe(self, config: Config, v2: bool) -> Moe:
        chosen, width = config.number("num_experts_per_tok"), config.number("moe_intermediate_size")
        grouped = not v2 or config.get("topk_method", "greedy") == "group_limited_greedy"
        normalize = config.flag("norm_topk_prob", not v2) and chosen > 1
        router = RouterSpec(
            score="softmax" if v2 else "sigmoid",
            groups=config.number("n_group", default=1) if grouped else 1,
            groups_chosen=config.number("topk_group", default=1) if grouped else 1,
            normalize=normalize,
            scale=1.0 if v2 and normalize else config.real("routed_scaling_factor", 1.0),
            correction=not v2,
        )
        shared = width * config.number("n_shared_experts", default=0)
        return Moe(config.number("n_routed_experts"), chosen, width, shared, router)
