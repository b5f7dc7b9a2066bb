"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one more layer, which predicts the token after
the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tierlm.checkpoints.views import Weights
from tierlm.kernels import gated_mlp, linear
from tierlm.memory.kvcache import KvCache, Span
from tierlm.models.attention import Rows
from tierlm.models.decoder import Decoder, attention_of
from tierlm.models.layers import rms_norm
from tierlm.models.moe import MixtureOfExperts
from tierlm.spec import Moe, TrunkKey

FEW = 8  # tokens that are computed as in decode


class PredictionLayer:
    """The layer after the last one of ``decoder``, whose embedding and head it shares. ``resident``: the tensors of
    ResidentKey. ``moe``: of its experts alone, so that prefetch for the model's layers knows nothing of them."""

    def __init__(
        self, decoder: Decoder, resident: Weights, cache: KvCache, moe: MixtureOfExperts, device: torch.device
    ):
        self.decoder, self.moe, spec = decoder, moe, decoder.spec
        self._layer, self._eps = spec.depth, spec.norm_eps
        self._norm, self._spec = resident[f"{spec.depth}.norm"], spec.layers[spec.depth]
        self._attention = attention_of(self._spec.attention, spec.norm_eps, cache, device)

    @torch.inference_mode()
    def forward(self, states: Tensor, ids: Sequence[int], span: Span) -> Tensor:
        """``states``, float32 [T, hidden]: of T tokens, the model's (see ``Decoder.forward``) or this layer's own;
        ``ids``: the token after each. Returns this layer's states, float32 [T, hidden], and advances ``span``, its own
        part of the cache. Raises StorageError."""
        trunk, eps = self.decoder.trunks.get(TrunkKey(self._layer)), self._eps
        embedded = rms_norm(self.decoder.embedding.read(ids), trunk["embedding_norm"], eps)
        joined = torch.cat((embedded, rms_norm(states, trunk["hidden_norm"], eps)), dim=-1)  # [T, 2 * hidden]
        positions = self._attention.positions([Rows(0, len(ids), span)])
        x = linear(joined, trunk["joined_proj"])
        x, normed = self._attention.forward(x, self._layer, trunk, self._norm, positions)
        if isinstance(self._spec.feed_forward, Moe):
            x = self.moe.forward(x, normed, self._layer, trunk, prefill=len(ids) > FEW)
        else:
            x = x + gated_mlp(normed, trunk["gate_proj"], trunk["up_proj"], trunk["down_proj"])
        span.advance(len(ids))
        return x

    @torch.inference_mode()
    def token(self, state: Tensor) -> int:
        """The likeliest token by a state of this layer [1, hidden]."""
        trunk = self.decoder.trunks.get(TrunkKey(self._layer))
        normed, logits = rms_norm(state, trunk["head_norm"], self._eps), torch.empty(1, self.decoder.spec.vocab)
        self.decoder.read_out(normed, logits)
        return int(logits.argmax())
