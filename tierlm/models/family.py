"""The interface of model families: config -> spec, and the names and shapes of tensors. No torch."""

from __future__ import annotations

from typing import Protocol

from tierlm.attention_spec import Delta, Grouped, Indexer, Latent
from tierlm.models.config_reader import Config
from tierlm.spec import Dense, ExpertKey, ModelSpec, Moe, TrunkKey

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # role -> (tensor name, shape)


class Family(Protocol):
    """One family. ``Names`` implements all but ``read_spec``, for the usual tensor names."""

    def read_spec(self, config: Config) -> ModelSpec:
        """Raises UnsupportedModelError, CheckpointError, and ValueError for impossible sizes."""

    def expert_tensors(self, spec: ModelSpec, key: ExpertKey) -> Shapes:
        """The tensors of one routed expert."""

    def trunk_tensors(self, spec: ModelSpec, key: TrunkKey) -> Shapes:
        """The tensors of one layer that every token uses, except its second norm and its router."""

    def resident_tensors(self, spec: ModelSpec) -> Shapes:
        """The final norm, and each layer's second norm and router. Predictions use them before the layer's trunk is
        read, so they are not in the trunk."""

    def embedding_name(self) -> str: ...

    def head_name(self, spec: ModelSpec) -> str: ...


class Names:
    """The usual tensor names. A family overrides the ones that differ."""

    moe = "mlp."  # prefix of the MoE within its layer
    shared = "shared_experts."  # prefix of the shared expert within the MoE
    router = "gate."  # prefix of the router within the MoE
    router_bias = "gate.bias"
    correction = "gate.e_score_correction_bias"
    projections = ("gate_proj", "up_proj", "down_proj")  # an expert's matrices

    def expert_tensors(self, spec: ModelSpec, key: ExpertKey) -> Shapes:
        moe = spec.moe
        assert moe is not None, "a model without experts"
        prefix = f"model.layers.{key.layer}.{self.moe}experts.{key.expert}."
        if moe.stacked:
            return _stacked(prefix, spec.hidden, moe)
        found = mlp(prefix, spec.hidden, moe.width, self.projections)
        if moe.clamped:
            sizes = moe.width, moe.width, spec.hidden
            for role, name, size in zip(("gate", "up", "down"), self.projections, sizes, strict=True):
                found[f"{role}_bias"] = (f"{prefix}{name}.bias", (size,))
        return found

    def trunk_tensors(self, spec: ModelSpec, key: TrunkKey) -> Shapes:
        prefix, layer = f"model.layers.{key.layer}.", spec.layers[key.layer]
        found: Shapes = {"input_layernorm": (prefix + "input_layernorm.weight", (spec.hidden,))}
        if spec.sandwich:
            found["attention_norm"] = (prefix + "post_attention_layernorm.weight", (spec.hidden,))
            found["feed_forward_norm"] = (prefix + "post_feedforward_layernorm.weight", (spec.hidden,))
        if isinstance(layer.attention, Grouped):
            found |= _grouped(prefix + "self_attn.", spec.hidden, layer.attention)
        elif isinstance(layer.attention, Delta):
            found |= _delta(prefix + "linear_attn.", spec.hidden, layer.attention)
        else:
            found |= _latent(prefix + "self_attn.", spec.hidden, layer.attention)
            if (indexer := layer.attention.indexer) is not None and indexer.own(key.layer):
                found |= _indexer(prefix + "self_attn.indexer.", spec.hidden, layer.attention.q_rank or 0, indexer)
        if isinstance(layer.feed_forward, Dense):
            found |= mlp(prefix + "mlp.", spec.hidden, layer.feed_forward.width)
        elif layer.feed_forward.shared_width:
            shared = prefix + self.moe + self.shared
            found |= mlp(shared, spec.hidden, layer.feed_forward.shared_width)
            if layer.feed_forward.shared_gate:
                found["shared_gate"] = (f"{shared[:-1]}_gate.weight", (1, spec.hidden))
        return found | (_mtp(prefix, spec.hidden) if key.layer == spec.depth else {})

    def resident_tensors(self, spec: ModelSpec) -> Shapes:
        found: Shapes = {"norm": ("model.norm.weight", (spec.hidden,))}
        second = "pre_feedforward_layernorm" if spec.sandwich else "post_attention_layernorm"
        for number, layer in enumerate(spec.layers):
            prefix, moe = f"model.layers.{number}.", layer.feed_forward
            found[f"{number}.norm"] = (f"{prefix}{second}.weight", (spec.hidden,))
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


def _mtp(prefix: str, hidden: int) -> Shapes:
    """What a multi-token prediction layer has besides a layer's tensors. Embedding and head are the model's."""
    norms = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "head_norm": "shared_head.norm"}
    found: Shapes = {role: (f"{prefix}{name}.weight", (hidden,)) for role, name in norms.items()}
    return found | {"joined_proj": (prefix + "eh_proj.weight", (hidden, 2 * hidden))}


def mlp(prefix: str, hidden: int, width: int, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
    """The tensors of a SwiGLU; ``names``: its gate, up and down projections."""
    gate, up, down = names
    return {
        "gate_proj": (f"{prefix}{gate}.weight", (width, hidden)),
        "up_proj": (f"{prefix}{up}.weight", (width, hidden)),
        "down_proj": (f"{prefix}{down}.weight", (hidden, width)),
    }


def _stacked(prefix: str, hidden: int, moe: Moe) -> Shapes:
    """An expert's part of stacks."""
    found: Shapes = {}
    for name, (outs, ins) in {"gate_up": (2 * moe.width, hidden), "down": (hidden, moe.width)}.items():
        found[f"{name}_proj"] = (f"{prefix}{name}_proj", (ins, outs) if moe.transposed else (outs, ins))
        if moe.clamped:
            found[f"{name}_bias"] = (f"{prefix}{name}_proj_bias", (outs,))
    return found


def _latent(prefix: str, hidden: int, spec: Latent) -> Shapes:
    if spec.q_rank is None:
        found: Shapes = {"q_proj": (prefix + "q_proj.weight", (spec.query_width, hidden))}
    else:
        found = {
            "q_a_proj": (prefix + "q_a_proj.weight", (spec.q_rank, hidden)),
            "q_a_layernorm": (prefix + "q_a_layernorm.weight", (spec.q_rank,)),
            "q_b_proj": (prefix + "q_b_proj.weight", (spec.query_width, spec.q_rank)),
        }
    if spec.split:
        found["k_b_proj"] = (prefix + "k_b_proj.weight", (spec.heads * spec.kv_rank, spec.nope_dim))
        found["v_b_proj"] = (prefix + "v_b_proj.weight", (spec.heads * spec.value_dim, spec.kv_rank))
    else:
        rows = spec.heads * (spec.nope_dim + spec.value_dim)
        found["kv_b_proj"] = (prefix + "kv_b_proj.weight", (rows, spec.kv_rank))
    return found | {
        "kv_a_proj": (prefix + "kv_a_proj_with_mqa.weight", (spec.cache_width, hidden)),
        "kv_a_layernorm": (prefix + "kv_a_layernorm.weight", (spec.kv_rank,)),
        "o_proj": (prefix + "o_proj.weight", (hidden, spec.heads * spec.value_dim)),
    }


def _indexer(prefix: str, hidden: int, q_rank: int, spec: Indexer) -> Shapes:
    return {
        "index_q_proj": (prefix + "wq_b.weight", (spec.heads * spec.dim, q_rank)),
        "index_k_proj": (prefix + "wk.weight", (spec.dim, hidden)),
        "index_k_norm": (prefix + "k_norm.weight", (spec.dim,)),
        "index_k_norm_bias": (prefix + "k_norm.bias", (spec.dim,)),
        "index_weights": (prefix + "weights_proj.weight", (spec.heads, hidden)),
    }


def _grouped(prefix: str, hidden: int, spec: Grouped) -> Shapes:
    keys = spec.kv_heads * spec.head_dim
    rows = {"q": spec.query_width * (1 + spec.gated), "k": keys, "v": keys, "o": hidden}
    inputs = "qk" if spec.keys_as_values else "qkv"
    found: Shapes = {f"{name}_proj": (f"{prefix}{name}_proj.weight", (rows[name], hidden)) for name in inputs}
    found["o_proj"] = (prefix + "o_proj.weight", (hidden, spec.query_width))
    if spec.qk_norm:
        sizes = {"q": spec.head_dim, "k": spec.head_dim} if spec.qk_norm == "head" else rows
        found |= {f"{name}_norm": (f"{prefix}{name}_norm.weight", (sizes[name],)) for name in "qk"}
    if spec.sinks:
        found["sinks"] = (prefix + "sinks", (spec.heads,))
    biased = "qkv" * spec.bias + "o" * spec.output_bias
    found |= {f"{name}_bias": (f"{prefix}{name}_proj.bias", (rows[name],)) for name in biased}
    return found


def _delta(prefix: str, hidden: int, spec: Delta) -> Shapes:
    widths, values = spec.widths, spec.widths["v"]
    rows = {name: sum(widths[part] for part in name) for name in spec.projections}
    found: Shapes = {f"in_proj_{name}": (f"{prefix}in_proj_{name}.weight", (rows[name], hidden)) for name in rows}
    return found | {
        "convolution": (prefix + "conv1d.weight", (spec.mixed_width, 1, spec.kernel)),
        "decay": (prefix + "A_log", (spec.value_heads,)),
        "decay_bias": (prefix + "dt_bias", (spec.value_heads,)),
        "output_norm": (prefix + "norm.weight", (spec.value_dim,)),
        "o_proj": (prefix + "out_proj.weight", (hidden, values)),
    }
