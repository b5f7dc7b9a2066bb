"""Qwen3-MoE, after `Qwen3MoeForCausalLM` in transformers. No torch."""

from __future__ import annotations

from tierlm.models.config_reader import Config
from tierlm.models.family import Names
from tierlm.spec import Dense, Grouped, LayerSpec, ModelSpec, Moe, RouterSpec


class Qwen3Moe(Names):
    """Grouped attention with QK-norm; every ``decoder_sparse_step``-th layer is MoE, except ``mlp_only_layers``."""

    def read_spec(self, config: Config) -> ModelSpec:
        config.allow(hidden_act=("silu",), attention_bias=(False,), use_sliding_window=(False,))
        heads, hidden = config.number("num_attention_heads"), config.number("hidden_size")
        attention = Grouped(
            heads=heads,
            kv_heads=config.number("num_key_value_heads", default=heads),
            head_dim=config.number("head_dim", default=hidden // max(1, heads)),
            rope=config.rope(interleaved=False),
            qk_norm="head",
        )
        router = RouterSpec("softmax", normalize=config.flag("norm_topk_prob", False))
        moe = Moe(
            experts=config.number("num_experts", "num_local_experts"),
            experts_per_token=config.number("num_experts_per_tok"),
            width=config.number("moe_intermediate_size"),
            shared_width=0,
            router=router,
        )
        step, dense_layers = config.number("decoder_sparse_step", default=1), set(config.listed("mlp_only_layers", int))
        layers = []
        for layer in range(config.number("num_hidden_layers")):
            sparse = layer not in dense_layers and (layer + 1) % max(1, step) == 0
            layers.append(LayerSpec(attention, moe if sparse else Dense(config.number("intermediate_size"))))
        return config.model(tuple(layers), 1e-6)
