"""The indexer of sparse attention: which keys a query attends to (DeepSeek-V3.2, technical report, section 2).

After `DeepseekV32Indexer` and `GlmMoeDsaIndexer` in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tierlm.attention_spec import SCORE_VALUES, Indexer
from tierlm.checkpoints.views import Weights
from tierlm.kernels import linear
from tierlm.memory.kvcache import KvCache
from tierlm.models.attention import Positions, Rows
from tierlm.models.layers import rotate

KEY_NORM_EPS = 1e-6


class KeyChooser:
    """The indexers of all layers with this ``spec``; ``rope_dim``: rotated dimensions, a head's first."""

    def __init__(self, spec: Indexer, rope_dim: int, cache: KvCache):
        self.spec, self.rope_dim, self.cache = spec, rope_dim, cache

    def needed(self, segments: Sequence[Rows]) -> bool:
        """Whether a sequence has more keys than a query attends to."""
        return any(s.span.length + s.stop - s.start > self.spec.chosen for s in segments)

    def append(self, x: Tensor, layer: int, trunk: Weights, positions: Positions) -> list[Tensor]:
        """Cache the index keys of the normed ``x`` [T, hidden]. Returns those of each sequence, float32 [S, dim]."""
        if not self.spec.own(layer):
            return []
        keys = linear(x, trunk["index_k_proj"])
        weight, bias = trunk["index_k_norm"].data.float(), trunk["index_k_norm_bias"].data.float()
        keys = functional.layer_norm(keys, keys.shape[-1:], weight, bias, KEY_NORM_EPS)
        keys = self._rotated(keys[:, None], positions)[:, 0]  # [T, dim]
        return [self.cache.append_index(layer, s.span, keys[s.start : s.stop]).float() for s in positions.segments]

    def choose(self, x: Tensor, low: Tensor, layer: int, trunk: Weights, positions: Positions) -> None:
        """``append``, and write ``positions.chosen``; a layer without indexer leaves what the one before chose.

        ``low``: the normed low-rank queries, float32 [T, q_rank]."""
        past = self.append(x, layer, trunk, positions)
        if not past or not self.needed(positions.segments):
            return
        queries = linear(low, trunk["index_q_proj"]).view(len(x), self.spec.heads, self.spec.dim)
        queries = self._rotated(queries, positions) * self.spec.dim**-0.5  # [T, heads, dim]
        shares = linear(x, trunk["index_weights"]) * self.spec.heads**-0.5  # [T, heads]
        for segment, keys in zip(positions.segments, past, strict=True):
            if len(keys) > self.spec.chosen:
                rows = slice(segment.start, segment.stop)
                positions.chosen[segment.start] = self._best(queries[rows], shares[rows], keys)

    def _best(self, queries: Tensor, shares: Tensor, keys: Tensor) -> Tensor:
        """The chosen keys of each query, ascending: int64 [T, chosen]. Queries with fewer keys also get later ones."""
        tokens, heads, _ = queries.shape
        scores = queries.new_zeros(tokens, len(keys))
        group = max(1, min(heads, SCORE_VALUES // scores.numel()))
        for first in range(0, heads, group):
            mine = slice(first, first + group)
            each = (queries[:, mine].transpose(0, 1) @ keys.t()).relu_()  # [g, T, S]
            scores += each.mul_(shares[:, mine].t()[..., None]).sum(0)
        later = torch.ones_like(scores, dtype=torch.bool).triu_(len(keys) - tokens + 1)
        return scores.masked_fill_(later, float("-inf")).topk(self.spec.chosen, dim=-1).indices.sort(-1).values

    def _rotated(self, x: Tensor, positions: Positions) -> Tensor:
        """``x`` [T, heads, dim], its first dimensions rotated."""
        turned = rotate(x[..., : self.rope_dim], *positions.angles, self.spec.interleaved)
        return torch.cat((turned, x[..., self.rope_dim :]), dim=-1)
