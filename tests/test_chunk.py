"""Attention of many tokens in the kernels, against plain softmax attention in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tierlm.kernels import attend_chunk, attend_latents

# With a bfloat16 cache, queries and weights may be rounded too.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
NAN = float("nan")


def expected(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None = None, sinks: Tensor | None = None
) -> Tensor:
    """``attend_chunk``, in float64."""
    tokens, heads, _ = queries.shape
    sharing, past = heads // keys.shape[1], len(keys) - tokens
    keys, values = (part.double().repeat_interleave(sharing, 1) for part in (keys, values))
    scores = torch.einsum("thd,shd->hts", queries.double(), keys) * scale
    distance = past + torch.arange(tokens)[:, None] - torch.arange(len(keys))
    scores[:, (distance < 0) | (distance >= (window or len(keys)))] = -torch.inf
    if sinks is not None:
        extra = sinks.double()[:, None, None].expand(-1, tokens, 1)
        scores = torch.cat((scores, extra), dim=-1)
    return torch.einsum("hts,shd->thd", scores.softmax(-1)[..., : len(keys)], values)


def cached(past: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """A sequence's rows in a cache, with NaN before and after them."""
    cache = torch.full((past + tokens + 4, width), NAN, dtype=dtype)
    cache[2:-2] = torch.randn(past + tokens, width)
    return cache[2:-2]


def compare(found: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == reference.shape
    assert (found - reference).abs().max() <= CLOSE[dtype] * reference.abs().max()


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    ("past", "tokens", "heads", "groups", "dim", "value", "window", "sinks"),
    [
        (0, 1, 1, 1, 2, 1, None, False),
        (0, 40, 4, 2, 32, 32, None, False),
        (127, 17, 6, 6, 10, 18, None, True),  # tokens in an odd number, dimensions that fill no vector
        (300, 70, 8, 1, 64, 48, None, False),
        (150, 150, 3, 1, 9, 16, None, True),  # keys of an odd number of dimensions
        (400, 33, 4, 2, 16, 16, 5, False),
        (200, 300, 4, 1, 16, 16, 129, True),
        (5, 20, 2, 1, 16, 16, 1, False),
        (2300, 1, 18, 1, 24, 16, None, False),  # one token: ranges, and two tiles of heads
        (700, 1, 6, 2, 16, 16, 300, True),
    ],
)
def test_a_chunk_attends_as_softmax_does(
    past: int,
    tokens: int,
    heads: int,
    groups: int,
    dim: int,
    value: int,
    window: int | None,
    sinks: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(5)
    rows = cached(past, tokens, groups * (dim + value), dtype)
    keys, values = rows.split((groups * dim, groups * value), dim=1)
    keys, values = keys.unflatten(1, (groups, dim)), values.unflatten(1, (groups, value))
    extra = torch.randn(heads) if sinks else None
    queries = 3 * torch.randn(tokens, heads, dim)
    found = attend_chunk(queries, keys, values, dim**-0.5, window, extra)
    assert found is not None
    compare(found, expected(queries, keys, values, dim**-0.5, window, extra), dtype)


def latent_case(past: int, dtype: torch.dtype, transposed: bool, rank: int = 40) -> tuple[Any, ...]:
    """Queries of three heads of 200 tokens, two projections, latents, and the scale. ``transposed``: as in GGUF."""
    torch.manual_seed(6)
    heads, nope, rope, value, tokens = 3, 24, 8, 20, 200
    up = torch.randn(heads, nope + value, rank).transpose(1, 2)
    to_keys, to_values = up[..., :nope], up[..., nope:]
    if transposed:
        to_keys = to_keys.contiguous()
    queries = torch.randn(tokens, heads, nope + rope)
    return queries, to_keys, to_values, cached(past, tokens, rank + rope, dtype), (nope + rope) ** -0.5


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("past", "transposed", "rank"), [(0, False, 40), (131, True, 40), (300, False, 7)])
def test_heads_expand_latents(past: int, transposed: bool, rank: int, dtype: torch.dtype) -> None:
    queries, to_keys, to_values, latents, scale = latent_case(past, dtype, transposed, rank)
    shared = latents[:, None, rank:].expand(-1, 3, -1).double()
    plain = latents[:, :rank].double()
    keys = torch.cat((torch.einsum("sr,hrd->shd", plain, to_keys.double()), shared), dim=-1)
    values = torch.einsum("sr,hrd->shd", plain, to_values.double())
    outputs = torch.full((200, 5, 20), NAN)
    assert attend_latents(queries, to_keys, to_values, latents, scale, outputs[:, 1:4])
    compare(outputs[:, 1:4], expected(queries, keys, values, scale), dtype)
    assert outputs[:, [0, 4]].isnan().all()


@pytest.mark.parametrize("dtype", CLOSE)
def test_neither_threads_nor_later_tokens_reach_a_chunk(dtype: torch.dtype) -> None:
    latent = latent_case(131, dtype, False)
    rows = cached(131, 200, 2 * 4 * 16, dtype).view(-1, 2, 4, 16)
    queries, threads, found = torch.randn(200, 8, 16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out = torch.empty(200, 3, 20)
            attend_latents(*latent, out)
            one = attend_chunk(queries[-1:], rows[:, 0], rows[:, 1], 0.2)
            found.append((out, attend_chunk(queries, rows[:, 0], rows[:, 1], 0.2), one))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    first = attend_chunk(queries[:90], rows[:-110, 0], rows[:-110, 1], 0.2)
    assert torch.equal(first, found[0][1][:90])


@pytest.mark.parametrize("dtype", CLOSE)
def test_nan_in_a_key_reaches_those_who_see_it(dtype: torch.dtype) -> None:
    rows = cached(0, 40, 2 * 16, dtype).view(-1, 2, 1, 16)
    rows[7, 0, 0, 3] = NAN
    found = attend_chunk(torch.randn(40, 2, 16), rows[:, 0], rows[:, 1], 0.2)
    assert found is not None
    assert found[:7].isfinite().all()
    assert found[7:].isnan().all()
