"""Gemma 4 without per-layer embeddings (26B-A4B and 31B), after `Gemma4ForCausalLM` in transformers. No torch."""

from __future__ import annotations

from tierlm.attention_spec import Grouped
from tierlm.models.config_reader import GLOBAL, LOCAL, Config
from tierlm.models.family import Names, Shapes
from tierlm.models.gemma3 import usual_layers
from tierlm.spec import Dense, LayerSpec, ModelSpec, Moe, RouterSpec, TrunkKey

UNSTATED = {  # the defaults of transformers
    "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 256,
    "global_head_dim": 512,
    "rope_parameters": {
        LOCAL: {"rope_type": "default", "rope_theta": 10000.0},
        GLOBAL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    },
}


class Gemma4(Names):
    """Local and global layers, the latter with larger heads and, in large models, keys as values. Beside the routed
    experts, a dense GeGLU, as the shared expert; each with norms of its own."""

    moe = ""
    shared = "mlp."
    router = "router.proj."

    def read_spec(self, config: Config) -> ModelSpec:
        config = Config({**UNSTATED, **config.fields}, config.where)
        config.allow(
            hidden_activation=("gelu_pytorch_tanh",),
            attention_bias=(False,),
            hidden_size_per_layer_input=(0,),
            num_kv_shared_layers=(0,),
            use_bidirectional_attention=(None, "vision"),
        )
        width = config.number("intermediate_size")
        mlp: Dense | Moe = Dense(width, gelu=True)
        if config.flag("enable_moe_block", False):
            mlp = Moe(
                experts=config.number("num_experts"),
                experts_per_token=config.number("top_k_experts"),
                width=config.number("moe_intermediate_size"),
                shared_width=width,
                router=RouterSpec("softmax", own_norm=True),
                gelu=True,
                beside=True,
                stacked=True,
            )
        windowed = config.windowed(usual_layers(config))
        stack = (LayerSpec(self._attention(config, layer, local), mlp) for layer, local in enumerate(windowed))
        cap = config.optional("final_logit_softcapping")
        return config.model(tuple(stack), 1e-6, sandwich=True, scaled_embedding=True, scaled_layers=True, logit_cap=cap)

    def _attention(self, config: Config, layer: int, local: bool) -> Grouped:
        """Published configs have sizes of global layers; transformers writes ``per_layer_config``."""
        shared = not local and config.flag("attention_k_eq_v", False)
        rope = config.part("rope_parameters").part(LOCAL if local else GLOBAL)
        own = {**config.fields, "rope_parameters": rope.fields}
        if local:
            own["rope_divisors"] = None
        if (layers := config.part("per_layer_config")).fields:
            own |= layers.part(str(layer)).fields
        elif not local:
            own["head_dim"] = config.get("global_head_dim")
            if shared:
                own["num_key_value_heads"] = config.get("num_global_key_value_heads", config.get("num_key_value_heads"))
        sizes = Config(own, config.where)
        return sizes.grouped(
            sizes.rope(interleaved=False, dim=sizes.head_dim),
            qk_norm="head",
            window=config.number("sliding_window") if local else None,
            scalar=1,
            keys_as_values=shared,
            value_norm=True,
        )

    def trunk_tensors(self, spec: ModelSpec, key: TrunkKey) -> Shapes:
        prefix, vector = f"model.layers.{key.layer}.", (spec.hidden,)
        found = super().trunk_tensors(spec, key) | {"layer_scale": (prefix + "layer_scalar", (1,))}
        if isinstance(spec.layers[key.layer].feed_forward, Moe):
            found["shared_out_norm"] = (prefix + "post_feedforward_layernorm_1.weight", vector)
            found["experts_norm"] = (prefix + "pre_feedforward_layernorm_2.weight", vector)
            found["experts_out_norm"] = (prefix + "post_feedforward_layernorm_2.weight", vector)
        return found

    def resident_tensors(self, spec: ModelSpec) -> Shapes:
        found = super().resident_tensors(spec)
        for layer in spec.moe_layers:
            prefix = f"model.layers.{layer}.router."
            found[f"{layer}.router_norm"] = (prefix + "scale", (spec.hidden,))
            found[f"{layer}.expert_scale"] = (prefix + "per_expert_scale", (spec.experts,))
        return found
