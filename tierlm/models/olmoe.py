"""OLMoE, after `OlmoeForCausalLM` in transformers. No torch."""

from __future__ import annotations

from tierlm.models.config_reader import Config
from tierlm.models.family import Names
from tierlm.spec import LayerSpec, ModelSpec, Moe, RouterSpec


class Olmoe(Names):
    """Grouped attention that norms all heads together; MoE in every layer."""

    def read_spec(self, config: Config) -> ModelSpec:
        config.allow(hidden_act=("silu",), attention_bias=(False,), clip_qkv=(None,))
        attention = config.grouped(config.rope(interleaved=False), qk_norm="all")
        moe = Moe(
            experts=config.number("num_experts"),
            experts_per_token=config.number("num_experts_per_tok"),
            width=config.number("intermediate_size"),
            shared_width=0,
            router=RouterSpec("softmax", normalize=config.flag("norm_topk_prob", False)),
        )
        return config.model((LayerSpec(attention, moe),) * config.number("num_hidden_layers"), 1e-5)
