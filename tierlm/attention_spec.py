"""Kinds of attention: what each caches per token, and the memory and multiply-adds that it takes."""

from __future__ import annotations

from dataclasses import dataclass

SCORE_VALUES = 2**23  # float32 scores held at a time by attention, unless one head has more
EXPANDED_VALUES = 2**18  # float32 values of kv_b_proj widened at a time by latent attention in torch
WIDENED_HEADS = 16  # heads of kv_b_proj widened at a time by latent attention in the kernels
DELTA_TOKENS = 64  # tokens of a prefill computed at a time by the gated delta rule


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
        positive(self, "heads", "dim", "chosen")
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
        positive(self, "heads", "kv_rank", "nope_dim", "rope_dim", "value_dim")
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
        positive(self, "heads", "kv_heads", "head_dim")
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
        positive(self, "key_heads", "value_heads", "key_dim", "value_dim")
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


def _scores(heads: int, chunk: int, context: int) -> int:
    """Scores of one group of heads: raw, masked, softmax."""
    return 3 * min(heads * chunk * context, max(SCORE_VALUES, chunk * context))


def positive(spec: object, *names: str) -> None:
    """Raise ValueError if a field is below 1."""
    for name in names:
        if getattr(spec, name) < 1:
            raise ValueError(f"{name} must be at least 1, found {getattr(spec, name)}")
