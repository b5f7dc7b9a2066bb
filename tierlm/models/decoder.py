"""The decoder: embed -> layers -> norm -> logits, with one layer's weights at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tierlm.attention_spec import AttentionSpec, Delta, Grouped
from tierlm.checkpoints.views import Weights
from tierlm.errors import NumericsError
from tierlm.kernels import gated_mlp, glu_mlp, linear
from tierlm.memory.kvcache import KvCache, Span
from tierlm.memory.trunks import Trunks
from tierlm.models.attention import Attention, Rows
from tierlm.models.delta import DeltaHeads
from tierlm.models.embedding import Embedding
from tierlm.models.grouped import GroupedHeads
from tierlm.models.latent import LatentHeads
from tierlm.models.layers import rms_norm
from tierlm.models.moe import MixtureOfExperts
from tierlm.spec import Dense, HeadKey, ModelSpec, Moe, TrunkKey
from tierlm.timeline import Timeline, span


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's new tokens in a step. In decode, these are its last token and drafts of those that follow; each is
    computed as a row of its own, as if it were another sequence's, so drafts do not change the others' logits."""

    ids: Sequence[int]
    span: Span


class Decoder:
    """``resident``: the tensors of ResidentKey. ``head``: keys of the lm_head's blocks, in row order."""

    def __init__(
        self,
        spec: ModelSpec,
        embedding: Embedding,
        resident: Weights,
        trunks: Trunks,
        head: Sequence[HeadKey],
        cache: KvCache,
        moe: MixtureOfExperts,
        device: torch.device,
        timeline: Timeline | None = None,
    ):
        self.timeline = timeline
        self.spec, self.embedding, self.trunks, self.head, self.moe = spec, embedding, trunks, head, moe
        self._norm = resident["norm"]
        kinds = list(dict.fromkeys(layer.attention for layer in spec.layers[: spec.depth]))
        self._attention = [attention_of(kind, spec.norm_eps, cache, device, spec.zero_centred) for kind in kinds]
        self._normed = partial(rms_norm, eps=spec.norm_eps, zero_centred=spec.zero_centred)
        self._layers = [  # per layer: trunk, kind of attention, norm after attention, feed-forward
            (TrunkKey(i), kinds.index(layer.attention), resident[f"{i}.norm"], layer.feed_forward)
            for i, layer in enumerate(spec.layers[: spec.depth])
        ]

    @torch.inference_mode()
    def forward(
        self,
        steps: Sequence[Segment],
        *,
        prefill: bool,
        out: Tensor | None = None,
        states: Tensor | None = None,
        watch: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Run new tokens of several sequences through the model, and advance the sequences.

        Returns logits, float32 on the CPU: in prefill of each sequence's last token [len(steps), vocab], unless ``out``
        [T, vocab] is given; else of every new token [T, vocab], written into ``out`` if given. ``states``: filled with
        the normed residual stream of every new token [T, hidden], if given. ``watch``: called before each layer; it
        may raise to abandon the step.
        Raises StorageError, and NumericsError if a logit is not finite. After an error, no sequence has advanced.
        """
        recorder = self.moe.recorder
        if recorder is not None:
            recorder.begin([(step.span, step.span.length, len(step.ids)) for step in steps], prefill)
        hidden = self._layers_of(steps, prefill, watch)
        if states is not None:
            states.copy_(self._normed(hidden, self._norm))
        if out is None:
            if prefill:
                hidden = hidden[[end - 1 for end in accumulate(len(step.ids) for step in steps)]]
            out = torch.empty(len(hidden), self.spec.vocab)
        self.read_out(self._normed(hidden, self._norm), out)
        if not _finite(out):
            self._layers_of(steps, prefill, lambda: None, check=True)  # finds the layer
            raise _not_finite("the final norm or the lm_head")
        if recorder is not None:
            recorder.end()
        for step in steps:
            step.span.advance(len(step.ids))
        return out

    def _layers_of(
        self, steps: Sequence[Segment], prefill: bool, watch: Callable[[], None], check: bool = False
    ) -> Tensor:
        """The residual stream after the last layer, float32 [T, hidden]. ``check``: raise NumericsError where it is not
        finite."""
        hidden = self.embedding.read([i for step in steps for i in step.ids])  # [T, hidden]
        if self.spec.scaled_embedding:
            hidden *= math.sqrt(self.spec.hidden)
        if check and not _finite(hidden):
            raise _not_finite("the embedding")
        segments = _rows(steps, prefill)
        positions = [attention.positions(segments) for attention in self._attention]
        for layer, (key, kind, norm, feed_forward) in enumerate(self._layers):
            watch()
            trunk = self.trunks.get(key)
            if isinstance(feed_forward, Moe):
                self.moe.before_attention(hidden, layer, prefill)
            with span(self.timeline, "compute", f"attention {layer}"):
                hidden, normed = self._attention[kind].forward(hidden, layer, trunk, norm, positions[kind])
            if isinstance(feed_forward, Moe):
                hidden = self.moe.forward(hidden, normed, layer, trunk, prefill)
            else:
                hidden = hidden + self._mlp(normed, feed_forward, trunk)
            if self.spec.scaled_layers:
                hidden = hidden * trunk["layer_scale"].data.float()
            if check and not _finite(hidden):
                raise _not_finite(f"layer {layer}", layer)
        return hidden

    def _mlp(self, x: Tensor, spec: Dense, trunk: Weights) -> Tensor:
        """A dense feed-forward block: float32 [T, hidden] -> float32 [T, hidden]."""
        if spec.gelu:
            added = glu_mlp(x, trunk, gelu=True)
        else:
            added = gated_mlp(x, trunk["gate_proj"], trunk["up_proj"], trunk["down_proj"])
        norm = trunk.get("feed_forward_norm")
        return added if norm is None else self._normed(added, norm)

    def read_out(self, x: Tensor, out: Tensor) -> None:
        """Logits of the normed ``x``: float32 [T, hidden] -> ``out`` [T, vocab], block by block of the lm_head."""
        start = 0
        for key in self.head:
            block = self.trunks.get(key)["lm_head"]
            with span(self.timeline, "compute", "lm_head"):
                linear(x, block, out[:, start : start + block.shape[0]])
            start += block.shape[0]
        if (cap := self.spec.logit_cap) is not None:
            out.div_(cap).tanh_().mul_(cap)


def _rows(steps: Sequence[Segment], prefill: bool) -> list[Rows]:
    """The rows of each sequence; in decode, of each token."""
    ends = accumulate((len(step.ids) for step in steps), initial=0)
    edges = list(zip(pairwise(ends), steps, strict=True))
    if prefill:
        return [Rows(*edge, step.span) for edge, step in edges]
    return [
        Rows(row, row + 1, step.span.ahead(row - start)) for (start, stop), step in edges for row in range(start, stop)
    ]


def _finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; without a temporary of their size. Not in torch, which would wake its own
    threads for the logits, and they spin beside the kernels'."""
    found = values.cpu().numpy()
    return math.isfinite(found.min()) and math.isfinite(found.max())


def _not_finite(where: str, layer: int | None = None) -> NumericsError:
    return NumericsError(
        f"the logits are not finite (NaN or infinity); this began in {where}: expected weights that belong to this "
        "config.json, found damaged or other ones; download the model again, or pack it again",
        layer=layer,
    )


def attention_of(
    spec: AttentionSpec, norm_eps: float, cache: KvCache, device: torch.device, zero_centred: bool = False
) -> Attention:
    """The implementation of one kind of attention. ``zero_centred``: see ModelSpec; not for latent attention."""
    if isinstance(spec, Grouped):
        return GroupedHeads(spec, norm_eps, cache, device, zero_centred)
    if isinstance(spec, Delta):
        return DeltaHeads(spec, norm_eps, cache, zero_centred)
    return LatentHeads(spec, norm_eps, cache, device)
