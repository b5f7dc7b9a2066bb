"""The specification of a model, layer by layer, and the keys of its records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

SCORE_VALUES = 2**23  # float32 scores held at a time by attention, unless one head has more
EXPANDED_VALUES = 2**18  # float32 values of kv_b_proj widened at a time by latent attention in torch
WIDENED_HEADS = 16  # heads of kv_b_proj widened at a time by latent attention in the kernels
DELTA_TOKENS = 64  # tokens of a prefill computed at a time by the gated delta rule
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
class Yarn:
    """YaRN context extension of RoPE (Peng et al., arXiv 2309.00071), with DeepSeek's two mscale terms."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. ``interleaved``: pairs are (0, 1), (2, 3), ...; else (0, n/2), (1, n/2 + 1), ...
    ``divisors``: of the angle of each pair; empty: none."""

    theta: float
    interleaved: bool
    yarn: Yarn | None = None
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Indexer:
    """Sparse attention (DeepSeek-V3.2): ``heads`` of ``dim`` score all keys for a query, which attends to the best
    ``chosen``. ``interleaved``: as in Rope, of the indexer's own rotation. ``shared``: layers without an indexer, which
    attend to the keys that the layer before them chose."""

    heads: int
    dim: int
    chosen: int
    interleaved: bool
    shared: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        _positive(self, "heads", "dim", "chosen")
        if 0 in self.shared:
            raise ValueError("the first layer must have an indexer of its own")

    def own(self, layer: int) -> bool:
        """Whether ``layer`` has an indexer."""
        return layer not in self.shared


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): a token caches one compressed latent and one
    rotated key for all heads. ``q_rank`` is None if queries have a single projection.

    ``indexer``: attention is sparse in contexts longer than it chooses. ``split``: kv_b_proj is stored in two parts:
    k_b_proj [heads * kv_rank, nope_dim], transposed in each head, and v_b_proj [heads * value_dim, kv_rank].
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope
    split: bool = False
    indexer: Indexer | None = None

    def __post_init__(self) -> None:
        _positive(self, "heads", "kv_rank", "nope_dim", "rope_dim", "value_dim")
        if self.indexer is not None and (self.q_rank is None or self.indexer.dim < self.rope_dim):
            raise ValueError(f"an indexer needs q_lora_rank and index_head_dim of at least {self.rope_dim}")
        if self.rope_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, found {self.rope_dim}")

    @property
    def query_width(self) -> int:
        return self.heads * (self.nope_dim + self.rope_dim)

    @property
    def cache_width(self) -> int:
        """Values cached per token: the latent and the rotated key."""
        return self.kv_rank + self.rope_dim

    @property
    def expanded_width(self) -> int:
        """Values per token if expanded keys and values were cached."""
        return self.heads * (self.nope_dim + self.rope_dim + self.value_dim)

    @property
    def multiply_adds(self) -> int:
        """Per new token and token of context."""
        return self.expanded_width

    def workspace(self, chunk: int, context: int) -> int:
        """Peak float32 values for a step of ``chunk`` tokens: queries, their rotated copy, outputs, latents, and the
        scores, keys and values of one group of heads, or the projections of one."""
        per_token = self.heads * (2 * (self.nope_dim + self.rope_dim) + 2 * self.value_dim + self.kv_rank)
        per_token += 2 * self.cache_width
        group = min(self.heads * (self.nope_dim + self.value_dim), EXPANDED_VALUES // self.kv_rank)
        scores = _scores(self.heads, chunk, context)
        if (indexer := self.indexer) is not None and context > indexer.chosen:
            scores = max(scores, _scores(indexer.heads, chunk, context)) + chunk * (2 * context + 6 * indexer.chosen)
            per_token += 3 * indexer.heads * indexer.dim
            group += indexer.dim
        widened = min(self.heads, WIDENED_HEADS) * (self.nope_dim + self.value_dim) * self.kv_rank
        return chunk * per_token + max(widened, scores + context * (self.cache_width + group))


@dataclass(frozen=True)
class Grouped:
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245): a token caches the keys and values of ``kv_heads``.

    ``qk_norm``: RMSNorm of queries and keys before rotation, "head" by head or of "all" heads together; empty: none.
    ``rope_dim``: rotated dimensions of a head, its first; 0: all. ``bias``: the projections of queries, keys and values
    have biases; ``output_bias``: so has the output's. ``sinks``: each head has an extra logit in the softmax.
    ``window``: tokens visible to a query; None: all. ``scalar``: scores are divided by its square root; 0: head_dim's.
    ``keys_as_values``: values are the keys before norm and rotation. ``value_norm``: RMSNorm of values, head by head,
    without a weight.
    ``gated``: q_proj also gives a gate, head by head after the query; outputs are multiplied by its sigmoid.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    qk_norm: str = ""
    rope_dim: int = 0
    bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    window: int | None = None
    scalar: int = 0
    keys_as_values: bool = False
    value_norm: bool = False
    gated: bool = False

    def __post_init__(self) -> None:
        _positive(self, "heads", "kv_heads", "head_dim")
        if self.rotated % 2 or self.rotated > self.head_dim:
            raise ValueError(f"a head's rotated dimensions must be even, found {self.rotated} of {self.head_dim}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} heads of keys and values evenly")

    @property
    def rotated(self) -> int:
        return self.rope_dim or self.head_dim

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def cache_width(self) -> int:
        """Values cached per token: keys and values."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def expanded_width(self) -> int:
        """The same as ``cache_width``: heads use cached keys and values directly."""
        return self.cache_width

    @property
    def multiply_adds(self) -> int:
        """Per new token and token of context."""
        return 2 * self.query_width

    def workspace(self, chunk: int, context: int) -> int:
        """Peak float32 values for a step of ``chunk`` tokens: queries and outputs with one copy of each, new keys and
        values with one copy, the sequence's keys and values, and the scores of one group of heads."""
        per_token = (6 if self.gated else 4) * self.query_width + 2 * self.cache_width
        return chunk * per_token + _scores(self.heads, chunk, context) + context * self.cache_width


@dataclass(frozen=True)
class Delta:
    """Gated DeltaNet (Yang et al., arXiv 2412.06464): a sequence has a state of constant size, and no cache of tokens.

    ``kernel``: tokens of the convolution before queries (q), keys (k) and values (v). ``projections``: the matrices as
    stored, named by what their rows give, with output gate (z), beta (b) and decay (a); "qkvz" and "ba" go key head by
    key head. ``tiled``: value head i belongs to key head i modulo ``key_heads``; else neighbours share a key head.
    ``log_decay``: the base of the decay, A, is stored as the logarithm of -A.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    projections: tuple[str, ...]
    tiled: bool = False
    log_decay: bool = True

    def __post_init__(self) -> None:
        _positive(self, "key_heads", "value_heads", "key_dim", "value_dim")
        if self.kernel < 2:
            raise ValueError(f"the convolution's kernel must be at least 2, found {self.kernel}")
        if self.value_heads % self.key_heads:
            raise ValueError(f"{self.value_heads} value heads cannot share {self.key_heads} key heads evenly")

    @property
    def widths(self) -> dict[str, int]:
        """Values per token of each part of the projections."""
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return {"q": keys, "k": keys, "v": values, "z": values, "b": self.value_heads, "a": self.value_heads}

    @property
    def mixed_width(self) -> int:
        """Values per token that go through the convolution."""
        return sum(self.widths[part] for part in "qkv")

    @property
    def cache_width(self) -> int:
        return 0

    @property
    def expanded_width(self) -> int:
        return 0

    @property
    def state_width(self) -> int:
        """Values of a sequence's state: the matrix of each value head, and the convolution's last inputs."""
        return self.value_heads * self.key_dim * self.value_dim + (self.kernel - 1) * self.mixed_width

    @property
    def multiply_adds(self) -> int:
        """Per new token and token of context."""
        return 0

    def workspace(self, chunk: int, context: int) -> int:
        """Peak float32 values for a step of ``chunk`` tokens: the projections with one copy, the convolution, outputs
        with their gates; and for DELTA_TOKENS: queries, keys and values by value head with two copies, and products of
        all pairs of tokens; two matrices of each value head."""
        per_token = 2 * sum(self.widths.values()) + 3 * self.mixed_width + 3 * self.widths["v"]
        per_head = 6 * (self.key_dim + self.value_dim) + 4 * DELTA_TOKENS
        return chunk * per_token + self.value_heads * (DELTA_TOKENS * per_head + 2 * self.key_dim * self.value_dim)


AttentionSpec = Latent | Grouped | Delta


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
        _positive(self, "width")


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
        _positive(self, "width")
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
        _positive(self, "vocab", "hidden", "max_position")
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


def _scores(heads: int, chunk: int, context: int) -> int:
    """Scores of one group of heads: raw, masked, softmax."""
    return 3 * min(heads * chunk * context, max(SCORE_VALUES, chunk * context))


def _positive(spec: object, *names: str) -> None:
    for name in names:
        if getattr(spec, name) < 1:
            raise ValueError(f"{name} must be at least 1, found {getattr(spec, name)}")
