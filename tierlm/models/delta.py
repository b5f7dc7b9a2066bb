"""Gated DeltaNet (Yang et al., arXiv 2412.06464), after `Qwen3NextGatedDeltaNet` in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from tierlm.attention_spec import DELTA_TOKENS, Delta
from tierlm.checkpoints.views import Weights
from tierlm.kernels import Weight, linear
from tierlm.memory.kvcache import KvCache
from tierlm.models.attention import Positions, Rows
from tierlm.models.layers import rms_norm

UNIT_EPS = 1e-6  # of the norm of queries and keys
BY_KEY_HEAD = ("qkvz", "ba")  # matrices whose rows go key head by key head


class DeltaHeads:
    """``Attention`` for layers with this ``spec``; ``norm_eps``: of all norms; ``zero_centred``: of those around."""

    def __init__(self, spec: Delta, norm_eps: float, cache: KvCache, zero_centred: bool = False):
        self.spec, self.cache = spec, cache
        self._eps = norm_eps
        self._normed = partial(rms_norm, eps=norm_eps, zero_centred=zero_centred)

    def positions(self, segments: Sequence[Rows]) -> Positions:
        nothing = torch.empty(0)
        return Positions(segments, nothing, (nothing, nothing))

    def forward(
        self, hidden: Tensor, layer: int, trunk: Weights, next_norm: Weight, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Each sequence goes through the convolution and the delta rule alone, and leaves its next state."""
        spec = self.spec
        parts = self._projected(self._normed(hidden, trunk["input_layernorm"]), trunk)
        inputs = torch.cat([parts[part] for part in "qkv"], dim=1)  # [T, mixed]
        kernel = trunk["convolution"].data.float().view(spec.mixed_width, spec.kernel)
        decay, bias = trunk["decay"].data.float(), trunk["decay_bias"].data.float()
        base = -decay.exp() if spec.log_decay else decay
        decays = base * functional.softplus(parts["a"] + bias)  # [T, heads], logarithms
        betas = parts["b"].sigmoid()  # [T, heads]
        out = hidden.new_empty(len(hidden), spec.value_heads, spec.value_dim)
        for segment in positions.segments:
            rows = slice(segment.start, segment.stop)
            (matrix, past), (next_matrix, next_past) = map(self._divided, self.cache.state(layer, segment.span))
            seen = torch.cat((past, inputs[rows]))  # [kernel - 1 + T, mixed]
            next_past.copy_(seen[len(seen) - len(past) :])
            queries, keys, values = self._heads(_convolved(seen, kernel))
            rule = delta_step if segment.stop - segment.start == 1 else delta_rule
            out[rows] = rule(queries, keys, values, decays[rows], betas[rows], next_matrix.copy_(matrix))
        gates = functional.silu(parts["z"]).view_as(out)
        normed = rms_norm(out, trunk["output_norm"], self._eps).mul_(gates)
        total = hidden + linear(normed.view(len(hidden), -1), trunk["o_proj"])
        return total, self._normed(total, next_norm)

    def _projected(self, x: Tensor, trunk: Weights) -> dict[str, Tensor]:
        """The parts of the projections of ``x`` [T, hidden], by their letters: [T, width]."""
        spec = self.spec
        found: dict[str, Tensor] = {}
        for name in spec.projections:
            heads = spec.key_heads if name in BY_KEY_HEAD else 1
            together = linear(x, trunk[f"in_proj_{name}"]).view(len(x), heads, -1)
            split = together.split_with_sizes([spec.widths[part] // heads for part in name], dim=-1)
            found |= {part: values.flatten(1) for part, values in zip(name, split, strict=True)}
        return found

    def _divided(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices [heads, key_dim, value_dim] and the convolution's last inputs [kernel - 1, mixed] in a state."""
        spec = self.spec
        shape = spec.value_heads, spec.key_dim, spec.value_dim
        inputs = (spec.kernel - 1) * spec.mixed_width
        matrix, past = state.split_with_sizes([len(state) - inputs, inputs])
        return matrix.view(shape), past.view(spec.kernel - 1, spec.mixed_width)

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [T, heads, key_dim] and values [T, heads, value_dim] of each value head."""
        spec, tokens = self.spec, len(mixed)
        queries, keys, values = mixed.split_with_sizes([spec.widths[part] for part in "qkv"], dim=1)
        queries, keys = (_unit(x.reshape(tokens, spec.key_heads, spec.key_dim)) for x in (queries, keys))
        queries = queries * spec.key_dim**-0.5
        sharing = spec.value_heads // spec.key_heads
        if spec.tiled:
            queries, keys = (x.repeat(1, sharing, 1) for x in (queries, keys))
        else:
            queries, keys = (x.repeat_interleave(sharing, dim=1) for x in (queries, keys))
        return queries, keys, values.reshape(tokens, spec.value_heads, spec.value_dim)


def delta_step(queries: Tensor, keys: Tensor, values: Tensor, decays: Tensor, betas: Tensor, state: Tensor) -> Tensor:
    """The gated delta rule for one token. Queries and keys [1, heads, key_dim], values [1, heads, value_dim], decays
    (logarithms) and betas [1, heads] -> outputs [1, heads, value_dim]. Changes ``state`` [heads, key_dim, value_dim].
    """
    query, key, value = queries[0, :, None], keys[0, :, None], values[0, :, None]  # [heads, 1, .]
    state *= decays[0].exp()[:, None, None]
    change = (value - key @ state) * betas[0][:, None, None]
    state.baddbmm_(key.transpose(1, 2), change)
    return (query @ state).transpose(0, 1)


def delta_rule(queries: Tensor, keys: Tensor, values: Tensor, decays: Tensor, betas: Tensor, state: Tensor) -> Tensor:
    """``delta_step`` for T tokens, DELTA_TOKENS at a time (section 3.3 of the paper).

    Within a chunk, the changes of the state are the solution of one triangular system: the change by a token is its
    value less what its key reads from the state before the chunk and from the changes by the tokens before it.
    """
    out = torch.empty_like(values)
    for start in range(0, len(values), DELTA_TOKENS):
        chunk = slice(start, start + DELTA_TOKENS)
        query, key, value = (x[chunk].transpose(0, 1) for x in (queries, keys, values))  # [heads, n, .]
        beta = betas[chunk].t()[..., None]  # [heads, n, 1]
        total = decays[chunk].t().cumsum(-1)  # [heads, n], since the chunk's start
        later = torch.ones(total.shape[1], total.shape[1], dtype=torch.bool, device=total.device).triu(1)
        between = (total[:, :, None] - total[:, None, :]).masked_fill_(later, float("-inf")).exp_()  # [heads, n, n]
        since = total.exp()[..., None]  # [heads, n, 1]
        system = (key @ key.transpose(1, 2)).mul_(between).mul_(beta)
        known = (value - (key * since) @ state) * beta
        changes = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)  # [heads, n, value]
        within = (query @ key.transpose(1, 2)).mul_(between)
        out[chunk] = ((query * since) @ state + within @ changes).transpose(0, 1)
        until = (total[:, -1:] - total).exp()[..., None]  # [heads, n, 1], to the chunk's end
        state.mul_(since[:, -1:]).baddbmm_((key * until).transpose(1, 2), changes)
    return out


def _convolved(seen: Tensor, kernel: Tensor) -> Tensor:
    """``kernel`` [mixed, n] over the tokens in ``seen`` [n - 1 + T, mixed], and SiLU -> [T, mixed]."""
    taps = kernel.shape[1]
    tokens = len(seen) - taps + 1
    total = seen[:tokens] * kernel[:, 0]
    for tap in range(1, taps):
        total.addcmul_(seen[tap : tap + tokens], kernel[:, tap])
    return functional.silu(total, inplace=True)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + UNIT_EPS)
