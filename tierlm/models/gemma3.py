"""Gemma 3, dense, after `Gemma3ForCausalLM` in transformers. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from tierlm.attention_spec import Rope
from tierlm.models.config_reader import GLOBAL, LOCAL, Config
from tierlm.models.family import Names
from tierlm.spec import Dense, LayerSpec, ModelSpec

UNSTATED = {  # what the configs of multi-modal checkpoints leave out
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def usual_layers(config: Config) -> Sequence[str]:
    """Five local layers, then a global one."""
    period = config.number("sliding_window_pattern", default=6)
    layers = range(1, config.number("num_hidden_layers") + 1)
    return [GLOBAL if period and layer % period == 0 else LOCAL for layer in layers]


class Gemma3(Names):
    """Grouped attention with QK-norm: five local layers, then a global one with another RoPE. Outputs of attention and
    GeGLU are normed."""

    def read_spec(self, config: Config) -> ModelSpec:
        config = Config({**UNSTATED, **config.fields}, config.where)
        config.allow(
            hidden_activation=("gelu_pytorch_tanh",),
            attention_bias=(False,),
            final_logit_softcapping=(None,),
            attn_logit_softcapping=(None,),
            use_bidirectional_attention=(False,),
        )
        divisor = config.number("query_pre_attn_scalar")
        attention = [
            config.grouped(self._rope(config, kind), qk_norm="head", window=window, scalar=divisor)
            for kind, window in ((GLOBAL, None), (LOCAL, config.number("sliding_window")))
        ]
        mlp = Dense(config.number("intermediate_size"), gelu=True)
        return config.model(
            tuple(LayerSpec(attention[local], mlp) for local in config.windowed(usual_layers(config))),
            1e-6,
            sandwich=True,
            zero_centred=config.flag("zero_centred_norms", True),  # false in GGUF
            scaled_embedding=True,
        )

    def _rope(self, config: Config, kind: str) -> Rope:
        """Of a kind of layer: transformers 5 has a table for each, published configs have other names."""
        if kind == LOCAL:
            table = {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
        else:
            table = {"rope_theta": config.get("rope_theta", 1e6), **config.part("rope_scaling").fields}
        table |= config.part("rope_parameters").part(kind).fields
        own = Config({**config.fields, "rope_parameters": table}, config.where)
        return own.rope(interleaved=False, dim=config.head_dim)
