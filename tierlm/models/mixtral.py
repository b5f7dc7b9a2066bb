"""Mixtral, after `MixtralForCausalLM` in transformers. No torch."""

from __future__ import annotations

from tierlm.models.config_reader import Config
from tierlm.models.family import Names
from tierlm.spec import LayerSpec, ModelSpec, Moe, RouterSpec


class Mixtral(Names):
    """Grouped attention, and MoE in every layer."""

    moe = "block_sparse_moe."
    projections = ("w1", "w3", "w2")

    def read_spec(self, config: Config) -> ModelSpec:
        config.allow(hidden_act=("silu",))
        attention = config.grouped(
            config.rope(interleaved=config.flag("rope_interleave", False), theta=1e6),
            window=config.number("sliding_window", default=0) or None,
        )
        moe = Moe(
            experts=config.number("num_local_experts"),
            experts_per_token=config.number("num_experts_per_tok"),
            width=config.number("intermediate_size"),
            shared_width=0,
            router=RouterSpec("softmax"),
        )
        return config.model((LayerSpec(attention, moe),) * config.number("num_hidden_layers"), 1e-5)
