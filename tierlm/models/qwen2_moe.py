"""Qwen1.5-MoE and Qwen2-MoE, after `Qwen2MoeForCausalLM` in transformers. No torch."""

from __future__ import annotations

from tierlm.models.config_reader import Config
from tierlm.models.family import Names
from tierlm.spec import ModelSpec, Moe, RouterSpec


class Qwen2Moe(Names):
    """Grouped attention with biases; MoE with one shared expert behind a gate of its own."""

    shared = "shared_expert."

    def read_spec(self, config: Config) -> ModelSpec:
        config.allow(hidden_act=("silu",), use_sliding_window=(False,))
        attention = config.grouped(config.rope(interleaved=False), bias=config.flag("qkv_bias", True))
        moe = Moe(
            experts=config.number("num_experts"),
            experts_per_token=config.number("num_experts_per_tok"),
            width=config.number("moe_intermediate_size"),
            shared_width=config.number("shared_expert_intermediate_size"),
            router=RouterSpec("softmax", normalize=config.flag("norm_topk_prob", False)),
            shared_gate=True,
        )
        return config.model(config.sparse(attention, moe), 1e-6)
