"""Llama, Mistral and Qwen3, dense, after `LlamaForCausalLM`, `MistralForCausalLM` and `Qwen3ForCausalLM` in
transformers; the language model of Qwen3-VL is a Qwen3. No torch."""

from __future__ import annotations

from tierlm.models.config_reader import Config
from tierlm.models.family import Names
from tierlm.spec import Dense, LayerSpec, ModelSpec


class Llama(Names):
    """Grouped attention, with QK-norm in Qwen3, and a SwiGLU in every layer: a layer is one trunk, and nothing else."""

    def read_spec(self, config: Config) -> ModelSpec:
        config.allow(hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,), use_sliding_window=(False,))
        qwen3 = "qwen3" in config.model_type
        attention = config.grouped(
            config.rope(interleaved=config.flag("rope_interleave", False), dim=config.head_dim),
            qk_norm="head" if qwen3 else "",
            window=None if qwen3 else config.number("sliding_window", default=0) or None,
        )
        layer = LayerSpec(attention, Dense(config.number("intermediate_size")))
        return config.model((layer,) * config.number("num_hidden_layers"), 1e-6)
