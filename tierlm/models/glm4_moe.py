"""GLM-4.5 and GLM-4.6, after `Glm4MoeForCausalLM` in transformers. No torch."""

from __future__ import annotations

from tierlm.models.config_reader import Config
from tierlm.models.family import Names
from tierlm.spec import Dense, LayerSpec, ModelSpec, Moe, RouterSpec


class Glm4Moe(Names):
    """Grouped attention that rotates a part of each head; a few dense layers, then MoE as in DeepSeek-V3."""

    def read_spec(self, config: Config) -> ModelSpec:
        config.allow(hidden_act=("silu",))
        attention = config.grouped(
            config.rope(interleaved=False),
            qk_norm="head" if config.flag("use_qk_norm", False) else "",
            rope_dim=config.rotated(0.5),
            bias=config.flag("attention_bias", False),
        )
        width = config.number("moe_intermediate_size")
        router = RouterSpec(
            score="sigmoid",
            groups=config.number("n_group", default=1),
            groups_chosen=config.number("topk_group", default=1),
            normalize=config.flag("norm_topk_prob", True),
            scale=config.real("routed_scaling_factor", 1.0),
            correction=True,
        )
        moe = Moe(
            experts=config.number("n_routed_experts"),
            experts_per_token=config.number("num_experts_per_tok"),
            width=width,
            shared_width=width * config.number("n_shared_experts", default=1),
            router=router,
        )
        layers = config.number("num_hidden_layers")
        dense = min(config.number("first_k_dense_replace", default=1), layers)
        stack = [LayerSpec(attention, Dense(config.number("intermediate_size")))] * dense
        return config.model((*stack, *[LayerSpec(attention, moe)] * (layers - dense)), 1e-5)
