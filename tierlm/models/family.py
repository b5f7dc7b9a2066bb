"""What a family of models says of itself: config -> spec, and the names and shapes of its tensors. No torch."""

from __future__ import annotations

from typing import Any, Protocol

from tierlm.errors import UnsupportedModelError
from tierlm.models.config_reader import Config
from tierlm.spec import Dense, ExpertKey, Grouped, Latent, LayerSpec, ModelSpec, Moe, TrunkKey

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # role -> (tensor name, shape)


class Family(Protocol):
    """One family. ``Names`` implements all but ``read_spec`` for checkpoints named as most are."""

    def read_spec(self, config: Config) -> ModelSpec:
        """Raises UnsupportedModelError, CheckpointError, and ValueError for sizes that no model has."""

    def expert_tensors(self, spec: ModelSpec, key: ExpertKey) -> Shapes:
        """What one routed expert consists of."""

    def trunk_tensors(self, spec: ModelSpec, key: TrunkKey) -> Shapes:
        """What every token uses of one layer, but for its second norm and its router."""

    def resident_tensors(self, spec: ModelSpec) -> Shapes:
        """The final norm, and each layer's second norm and router. They are apart from the trunks because the layer
        before evaluates them, to predict what comes next."""

    def embedding_name(self) -> str: ...

    def head_name(self, spec: ModelSpec) -> str: ...

    def ignored(self, spec: ModelSpec, name: str) -> bool:
        """Whether a tensor is of a part that is not run."""


class Names:
    """The names that most families give their tensors. A family overrides those that differ."""

    moe = "mlp."  # of the MoE within its layer
    router = "gate."  # within the MoE
    router_bias = "gate.bias"
    correction = "gate.e_score_correction_bias"
    projections = ("gate_proj", "up_proj", "down_proj")  # of an expert

    def expert_tensors(self, spec: ModelSpec, key: ExpertKey) -> Shapes:
        moe = spec.moe
        assert moe is not None, "an expert of a model without any"
        prefix = f"model.layers.{key.layer}.{self.moe}experts.{key.expert}."
        found = mlp(prefix, spec.hidden, moe.width, self.projections)
        if moe.clamped:
            found["gate_up_bias"] = (prefix + "gate_up_proj_bias", (2 * moe.width,))
            found["down_bias"] = (prefix + "down_proj_bias", (spec.hidden,))
        return found

    def trunk_tensors(self, spec: ModelSpec, key: TrunkKey) -> Shapes:
        prefix, layer = f"model.layers.{key.layer}.", spec.layers[key.layer]
        found: Shapes = {"input_layernorm": (prefix + "input_layernorm.weight", (spec.hidden,))}
        found |= attention(prefix + "self_attn.", spec.hidden, layer)
        if isinstance(layer.feed_forward, Dense):
            found |= mlp(prefix + "mlp.", spec.hidden, layer.feed_forward.width)
        elif layer.feed_forward.shared_width:
            found |= mlp(f"{prefix}{self.moe}shared_experts.", spec.hidden, layer.feed_forward.shared_width)
        return found

    def resident_tensors(self, spec: ModelSpec) -> Shapes:
        found: Shapes = {"norm": ("model.norm.weight", (spec.hidden,))}
        for number, layer in enumerate(spec.layers):
            prefix, moe = f"model.layers.{number}.", layer.feed_forward
            found[f"{number}.norm"] = (prefix + "post_attention_layernorm.weight", (spec.hidden,))
            if isinstance(moe, Moe):
                found[f"{number}.router"] = (f"{prefix}{self.moe}{self.router}weight", (moe.experts, spec.hidden))
                if moe.router.correction:
                    found[f"{number}.correction"] = (prefix + self.moe + self.correction, (moe.experts,))
                if moe.router.bias:
                    found[f"{number}.router_bias"] = (prefix + self.moe + self.router_bias, (moe.experts,))
        return found

    def embedding_name(self) -> str:
        return "model.embed_tokens.weight"

    def head_name(self, spec: ModelSpec) -> str:
        return self.embedding_name() if spec.tied_head else "lm_head.weight"

    def ignored(self, spec: ModelSpec, name: str) -> bool:
        """Layers past the last one: multi-token prediction."""
        parts = name.split(".")
        return name.startswith("model.layers.") and parts[2].isdigit() and int(parts[2]) >= len(spec.layers)


def attention(prefix: str, hidden: int, layer: LayerSpec) -> Shapes:
    """The tensors of a layer's attention, by its kind."""
    spec = layer.attention
    if isinstance(spec, Grouped):
        return _grouped(prefix, hidden, spec)
    return _latent(prefix, hidden, spec)


def mlp(prefix: str, hidden: int, width: int, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
    """A SwiGLU; ``names``: of its gate, up and down projections."""
    gate, up, down = names
    return {
        "gate_proj": (f"{prefix}{gate}.weight", (width, hidden)),
        "up_proj": (f"{prefix}{up}.weight", (width, hidden)),
        "down_proj": (f"{prefix}{down}.weight", (hidden, width)),
    }


def missing(spec: ModelSpec) -> list[str]:
    """What the engine lacks to run such a model; the planner needs none of it."""
    layers = [layer.attention for layer in spec.layers]
    grouped = [attention for attention in layers if isinstance(attention, Grouped)]
    moe = spec.moe
    lacks: dict[str, Any] = {
        "attention sinks": any(attention.sinks for attention in grouped),
        "sliding windows": any(attention.window is not None for attention in grouped),
        "biases of attention": any(attention.bias for attention in grouped),
        "biases of routers": moe is not None and moe.router.bias,
        "clamped experts with biases": moe is not None and moe.clamped,
    }
    return [name for name, needed in lacks.items() if needed]


def require_runnable(spec: ModelSpec, where: str) -> None:
    """Raises UnsupportedModelError, naming what is missing."""
    if lacks := missing(spec):
        raise UnsupportedModelError(
            f"{where}: {spec.model_type} can be planned for, but not run yet; missing: {', '.join(lacks)}"
        )


def _latent(prefix: str, hidden: int, spec: Latent) -> Shapes:
    if spec.q_rank is None:
        found: Shapes = {"q_proj": (prefix + "q_proj.weight", (spec.query_width, hidden))}
    else:
        found = {
            "q_a_proj": (prefix + "q_a_proj.weight", (spec.q_rank, hidden)),
            "q_a_layernorm": (prefix + "q_a_layernorm.weight", (spec.q_rank,)),
            "q_b_proj": (prefix + "q_b_proj.weight", (spec.query_width, spec.q_rank)),
        }
    kv_b = spec.heads * (spec.nope_dim + spec.value_dim), spec.kv_rank
    return found | {
        "kv_a_proj": (prefix + "kv_a_proj_with_mqa.weight", (spec.cache_width, hidden)),
        "kv_a_layernorm": (prefix + "kv_a_layernorm.weight", (spec.kv_rank,)),
        "kv_b_proj": (prefix + "kv_b_proj.weight", kv_b),
        "o_proj": (prefix + "o_proj.weight", (hidden, spec.heads * spec.value_dim)),
    }


def _grouped(prefix: str, hidden: int, spec: Grouped) -> Shapes:
    keys = spec.kv_heads * spec.head_dim
    rows = {"q": spec.query_width, "k": keys, "v": keys, "o": hidden}
    found: Shapes = {f"{name}_proj": (f"{prefix}{name}_proj.weight", (rows[name], hidden)) for name in "qkv"}
    found["o_proj"] = (prefix + "o_proj.weight", (hidden, spec.query_width))
    if spec.qk_norm:
        found |= {f"{name}_norm": (f"{prefix}{name}_norm.weight", (spec.head_dim,)) for name in "qk"}
    if spec.sinks:
        found["sinks"] = (prefix + "sinks", (spec.heads,))
    if spec.bias:
        found |= {f"{name}_bias": (f"{prefix}{name}_proj.bias", (size,)) for name, size in rows.items()}
    return found
