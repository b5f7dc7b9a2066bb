"""The specification of a model, layer by layer, and the keys of its records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tierlm.attention_spec import AttentionSpec, Delta, Latent, positive

STATES = 4  # sequences that have a state at a time


class ExpertKey(NamedTuple):
    """One routed expert of one layer."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of layer {self.layer}"


@dataclass(frozen=True, slots=True, order=True)
class TrunkKey:
    """The trunk of one layer."""

    layer: int

    def __str__(self) -> str:
        return f"trunk of layer {self.layer}"


@dataclass(frozen=True, slots=True, order=True)
class HeadKey:
    """One block of rows of the lm_head."""

    block: int

    def __str__(self) -> str:
        return f"block {self.block} of the lm_head"


@dataclass(frozen=True, slots=True)
class ResidentKey:
    """The small tensors that are always in memory: norms and routers."""

    def __str__(self) -> str:
        return "resident tensors"


UnitKey = TrunkKey | HeadKey  # used by every token, in a fixed cycle
Key = ExpertKey | TrunkKey | HeadKey | ResidentKey


def same_layer(one: Key, other: Key) -> bool:
    """Whether both are experts of one layer."""
    return isinstance(one, ExpertKey) and isinstance(other, ExpertKey) and one.layer == other.layer


@dataclass(frozen=True)
class RouterSpec:
    """How a router chooses experts.

    ``softmax``: DeepSeek-V2 (arXiv 2405.04434); a group's score is the score of its best expert.
    ``sigmoid``: DeepSeek-V3 (arXiv 2412.19437); a group's score is the sum of its two best.
    ``correction``: DeepSeek-V3's bias on the scores, for selection only. ``bias``: a bias on the logits.
    ``own_norm``: the router norms the residual stream itself, and router weights are multiplied by a scale of each
    expert (Gemma 4).
    """

    score: str  # "softmax" | "sigmoid"
    groups: int = 1
    groups_chosen: int = 1
    normalize: bool = True
    scale: float = 1.0
    correction: bool = False
    bias: bool = False
    own_norm: bool = False


@dataclass(frozen=True)
class Dense:
    """A SwiGLU used by every token, or with ``gelu`` a GeGLU."""

    width: int
    gelu: bool = False

    def __post_init__(self) -> None:
        positive(self, "width")


@dataclass(frozen=True)
class Moe:
    """Routed experts, each a SwiGLU of ``width``, plus a shared one of ``shared_width``; 0: none.

    ``shared_gate``: the shared expert's output is multiplied by the sigmoid of one more projection of its input.
    ``gelu``: experts are GeGLUs. ``beside``: the shared expert, routed experts and their sum have norms of their own
    (Gemma 4).
    ``clamped``: gpt-oss's experts: they have biases, clamp gate and up projections, and add one to the latter.
    ``stacked``: a layer's experts lie in one tensor, gate and up in one matrix: gate first, or with their rows
    interleaved if ``clamped``; ``transposed``: as [in, out].
    """

    experts: int
    experts_per_token: int
    width: int
    shared_width: int
    router: RouterSpec
    shared_gate: bool = False
    gelu: bool = False
    beside: bool = False
    clamped: bool = False
    stacked: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        router, chosen = self.router, self.experts_per_token
        positive(self, "width")
        if not 1 <= router.groups_chosen <= router.groups or self.experts % router.groups:
            raise ValueError(f"{self.experts} experts in {router.groups} groups, {router.groups_chosen} chosen")
        group = self.experts // router.groups
        if not 1 <= chosen <= group * router.groups_chosen or (router.score == "sigmoid" and group < 2):
            raise ValueError(f"{chosen} experts a token out of {router.groups_chosen} groups of {group}")


@dataclass(frozen=True)
class LayerSpec:
    attention: AttentionSpec
    feed_forward: Dense | Moe


@dataclass(frozen=True)
class ModelSpec:
    """A decoder. Each layer has its own spec; MoE layers may be at any position but must be identical.

    ``sandwich``: outputs of attention and feed-forward are normed before they are added. ``zero_centred``: norms are
    stored less one. ``scaled_embedding``: embeddings are multiplied by the square root of ``hidden``.
    ``scaled_layers``: the residual stream is multiplied by a scalar after each layer. ``logit_cap``: logits are bent to
    stay below it. ``mtp``: the last layer is one of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section
    2.2), which drafts tokens and is no part of the model itself.

    Derived: ``moe``, the spec of the MoE layers, or None; ``moe_layers``, their numbers; ``experts`` and
    ``experts_per_token`` of one MoE layer; ``index_widths``, values of the index key cached per token, by layer;
    ``cache_width`` and ``expanded_width``, sums over all layers; ``state_widths``, float32 values of a sequence's
    state, by layer.
    """

    model_type: str
    vocab: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    max_position: int
    bos: int | None
    eos: tuple[int, ...]
    tied_head: bool
    sandwich: bool = False
    zero_centred: bool = False
    scaled_embedding: bool = False
    scaled_layers: bool = False
    logit_cap: float | None = None
    mtp: bool = False
    moe: Moe | None = field(init=False, repr=False, compare=False)
    moe_layers: tuple[int, ...] = field(init=False, repr=False, compare=False)
    experts: int = field(init=False, repr=False, compare=False)
    experts_per_token: int = field(init=False, repr=False, compare=False)
    index_widths: tuple[int, ...] = field(init=False, repr=False, compare=False)
    cache_width: int = field(init=False, repr=False, compare=False)
    expanded_width: int = field(init=False, repr=False, compare=False)
    state_widths: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises ValueError for impossible sizes."""
        positive(self, "vocab", "hidden", "max_position")
        if not self.layers:
            raise ValueError("layers must be at least 1, found 0")
        routed = {i: layer.feed_forward for i, layer in enumerate(self.layers) if isinstance(layer.feed_forward, Moe)}
        kinds = set(routed.values())
        if len(kinds) > 1:
            raise ValueError(f"MoE layers must be alike, found {len(kinds)} kinds")
        moe = kinds.pop() if kinds else None
        index_widths = tuple(_index_width(layer.attention, number) for number, layer in enumerate(self.layers))
        found = {
            "moe": moe,
            "moe_layers": tuple(routed),
            "experts": 0 if moe is None else moe.experts,
            "experts_per_token": 0 if moe is None else moe.experts_per_token,
            "index_widths": index_widths,
            "cache_width": sum(layer.attention.cache_width for layer in self.layers) + sum(index_widths),
            "expanded_width": sum(layer.attention.expanded_width for layer in self.layers),
            "state_widths": tuple(
                layer.attention.state_width if isinstance(layer.attention, Delta) else 0 for layer in self.layers
            ),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def depth(self) -> int:
        """The number of the model's own layers."""
        return len(self.layers) - self.mtp


def _index_width(attention: AttentionSpec, layer: int) -> int:
    indexer = attention.indexer if isinstance(attention, Latent) else None
    return indexer.dim if indexer is not None and indexer.own(layer) else 0
