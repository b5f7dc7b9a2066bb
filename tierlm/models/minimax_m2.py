"""MiniMax-M2, after `MiniMaxM2ForCausalLM` in transformers. No torch."""

from __future__ import annotations

from tierlm.models.config_reader import Config
from tierlm.models.family import Names
from tierlm.spec import LayerSpec, ModelSpec, Moe, RouterSpec


class MiniMaxM2(Names):
    """Grouped attention that norms all heads together and rotates a part of each; MoE in every layer."""

    moe = "block_sparse_moe."
    correction = "e_score_correction_bias"
    projections = ("w1", "w3", "w2")

    def read_spec(self, config: Config) -> ModelSpec:
        config.allow(hidden_act=("silu",), scoring_func=("sigmoid",), use_qk_norm=(True,), qk_norm_type=("per_layer",))
        attention = config.grouped(
            config.rope(interleaved=False, theta=5e6),
            qk_norm="all",
            rope_dim=config.number("rotary_dim", default=config.rotated(1.0)),
        )
        moe = Moe(
            experts=config.number("num_local_experts"),
            experts_per_token=config.number("num_experts_per_tok"),
            width=config.number("intermediate_size"),
            shared_width=0,
            router=RouterSpec("sigmoid", correction=True),
        )
        return config.model((LayerSpec(attention, moe),) * config.number("num_hidden_layers"), 1e-6)
