"""DeepSeek-V2, V2-Lite, V3, R1 and V3.1; Kimi-K2 and GLM-4.7-Flash, which share their architecture; and DeepSeek-V3.2
and GLM-5, whose attention is sparse in contexts longer than ``index_topk``. No torch."""

from __future__ import annotations

from tierlm.attention_spec import Indexer, Latent
from tierlm.errors import UnsupportedModelError
from tierlm.models.config_reader import Config
from tierlm.models.family import Names
from tierlm.spec import Dense, LayerSpec, ModelSpec, Moe, RouterSpec

INDEX_HEADS = {"deepseek_v32": 64, "glm_moe_dsa": 32}  # of sparse attention, by default


class DeepSeek(Names):
    """Latent attention; a few dense layers, then MoE with a shared expert and, since V3, a correction bias."""

    def read_spec(self, config: Config) -> ModelSpec:
        v2 = config.model_type == "deepseek_v2"
        config.allow(
            hidden_act=("silu",),
            scoring_func=("softmax",) if v2 else ("sigmoid",),
            topk_method=("greedy", "group_limited_greedy") if v2 else ("noaux_tc",),
            moe_layer_freq=(1,),
            attention_bias=(False,),
            mlp_bias=(False,),
        )
        attention = Latent(
            heads=config.number("num_attention_heads"),
            q_rank=config.number("q_lora_rank", default=0) or None,
            kv_rank=config.number("kv_lora_rank"),
            nope_dim=config.number("qk_nope_head_dim"),
            rope_dim=config.number("qk_rope_head_dim"),
            value_dim=config.number("v_head_dim"),
            rope=config.rope(interleaved=v2 or config.flag("rope_interleave", True)),
            split=config.flag("kv_b_split", False),
            indexer=self._indexer(config),
        )
        layers = config.number("num_hidden_layers")
        dense = min(config.number("first_k_dense_replace", default=self._dense(config)), layers)
        stack = [LayerSpec(attention, Dense(config.number("intermediate_size")))] * dense
        if dense < layers:
            stack += [LayerSpec(attention, self._moe(config, v2))] * (layers - dense)
        return config.model(tuple(stack), 1e-6)

    def _indexer(self, config: Config) -> Indexer | None:
        if config.model_type not in INDEX_HEADS:
            return None
        chosen = config.number("index_topk", default=2048)
        if chosen < 1:
            raise config.wrong("index_topk", "a whole number of at least 1", chosen)
        return Indexer(
            heads=config.number("index_n_heads", default=INDEX_HEADS[config.model_type]),
            dim=config.number("index_head_dim", default=128),
            chosen=chosen,
            interleaved=config.model_type == "glm_moe_dsa",
            shared=self._shared(config),
        )

    def _shared(self, config: Config) -> frozenset[int]:
        """Layers without an indexer of their own (GLM-5), by ``indexer_types``, ``index_topk_pattern`` or a period."""
        layers = config.number("num_hidden_layers")
        pattern = config.get("index_topk_pattern", ())
        kinds = list(pattern) if isinstance(pattern, str) else config.listed("index_topk_pattern", str)
        kinds = config.listed("indexer_types", str) or kinds
        if not kinds:
            every = max(1, config.number("index_topk_freq", default=1))
            offset = config.number("index_skip_topk_offset", default=2)
            return frozenset(at for at in range(layers) if max(at - offset + 1, 0) % every)
        if len(kinds) != layers or not set(kinds) <= {"full", "shared", "F", "S"}:
            raise config.wrong("indexer_types", f"full or shared for {layers} layers", kinds)
        return frozenset(at for at, kind in enumerate(kinds) if kind in ("shared", "S"))

    def _dense(self, config: Config) -> int:
        """The leading dense layers, where ``first_k_dense_replace`` does not say."""
        kinds = config.listed("mlp_layer_types", str)
        count = next((at for at, kind in enumerate(kinds) if kind != "dense"), len(kinds))
        if "dense" in kinds[count:]:
            raise UnsupportedModelError(f"{config.where}: mlp_layer_types: dense layers after others are not supported")
        return count if kinds else int(config.model_type == "glm4_moe_lite")

    def _moe(self, config: Config, v2: bool) -> Moe:
        chosen, width = config.number("num_experts_per_tok"), config.number("moe_intermediate_size")
        grouped = not v2 or config.get("topk_method", "greedy") == "group_limited_greedy"
        normalize = config.flag("norm_topk_prob", not v2) and chosen > 1
        router = RouterSpec(
            score="softmax" if v2 else "sigmoid",
            groups=config.number("n_group", default=1) if grouped else 1,
            groups_chosen=config.number("topk_group", default=1) if grouped else 1,
            normalize=normalize,
            scale=1.0 if v2 and normalize else config.real("routed_scaling_factor", 1.0),
            correction=not v2,
        )
        shared = width * config.number("n_shared_experts", default=0)
        return Moe(config.number("n_routed_experts"), chosen, width, shared, router)
