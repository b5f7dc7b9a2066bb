"""Qwen3-MoE, after `Qwen3MoeForCausalLM` in transformers, and the language model of Qwen3-VL-MoE. No torch."""

from __future__ import annotations

from tierlm.models.config_reader import Config
from tierlm.models.family import Names
from tierlm.spec import ModelSpec, Moe, RouterSpec


class Qwen3Moe(Names):
    """Grouped attention with QK-norm; every ``decoder_sparse_step``-th layer is MoE, except ``mlp_only_layers``.

    Qwen3-VL-MoE's files have a layer's experts in one tensor, transposed."""

    def read_spec(self, config: Config) -> ModelSpec:
        config.allow(hidden_act=("silu",), attention_bias=(False,), use_sliding_window=(False,))
        attention = config.grouped(config.rope(interleaved=False), qk_norm="head")
        vl = config.model_type == "qwen3_vl_moe_text"
        router = RouterSpec("softmax", normalize=vl or config.flag("norm_topk_prob", False))
        moe = Moe(
            experts=config.number("num_experts", "num_local_experts"),
            experts_per_token=config.number("num_experts_per_tok"),
            width=config.number("moe_intermediate_size"),
            shared_width=0,
            router=router,
            stacked=vl,
            transposed=vl,
        )
        return config.model(config.sparse(attention, moe), 1e-6)
