"""What a model is: its dimensions and rules, read once from its config, and the keys of its records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ExpertKey(NamedTuple):
    """One routed expert of one layer."""

    layer: int
    expert: int


class TrunkKey(NamedTuple):
    """The trunk of one layer, or one block of rows of the lm_head (``layer`` counts on past the last layer)."""

    layer: int


Key = ExpertKey | TrunkKey


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
    """Rotary position embedding. ``interleaved``: pairs are (0, 1), (2, 3), ...; else (0, n/2), (1, n/2 + 1), ..."""

    theta: float
    interleaved: bool
    yarn: Yarn | None = None


@dataclass(frozen=True)
class RouterSpec:
    """How a token's experts are chosen.

    ``softmax``: DeepSeek-V2 (arXiv 2405.04434), a group's score is its best expert's.
    ``sigmoid``: DeepSeek-V3 (arXiv 2412.19437), with a correction bias that only the choice sees; a group's score is
    the sum of its two best.
    """

    score: str  # "softmax" | "sigmoid"
    groups: int
    groups_chosen: int
    normalize: bool
    scale: float


@dataclass(frozen=True)
class ModelSpec:
    """A DeepSeek-style mixture-of-experts decoder with multi-head latent attention. All sizes are counts."""

    model_type: str
    vocab: int
    hidden: int
    layers: int
    dense_layers: int
    dense_width: int
    expert_width: int
    experts: int
    experts_per_token: int
    shared_experts: int
    router: RouterSpec
    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    norm_eps: float
    rope: Rope
    max_position: int
    bos: int | None
    eos: tuple[int, ...]
    tied_head: bool

    def is_moe(self, layer: int) -> bool:
        return layer >= self.dense_layers

    @property
    def moe_layers(self) -> range:
        return range(self.dense_layers, self.layers)

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: the compressed latent and the one rotated key (MLA)."""
        return self.kv_rank + self.rope_dim
