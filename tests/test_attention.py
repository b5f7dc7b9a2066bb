"""Attention of a few tokens in the kernels, against torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.toys import COMMON, GQA
from tierlm import LLM, Budget, SamplingParams
from tierlm.attention_spec import Grouped, Rope
from tierlm.checkpoints.views import Weights
from tierlm.kernels import Weight, quantise
from tierlm.memory.kvcache import KvCache, Span
from tierlm.models import FAMILIES, grouped, latent, read_spec
from tierlm.models.attention import Rows
from tierlm.models.decoder import attention_of
from tierlm.spec import ModelSpec, TrunkKey

CPU = torch.device("cpu")
# Products with int8 and int4 round activations; a difference in the last bit may round one to the next number.
CLOSE = {"f32": 2e-5, "bf16": 2e-5, "f16": 2e-5, "fp8": 2e-5, "int8": 5e-3, "int4": 5e-3}


def spec_of(**changes: Any) -> ModelSpec:
    settings = {**COMMON, "model_type": "deepseek_v3", "v_head_dim": 16, "num_attention_heads": 6, **changes}
    return read_spec(settings, "here")


def weights_for(spec: ModelSpec, format: str) -> tuple[Weights, Weight]:
    """A layer's weights, and the norm after its attention."""
    torch.manual_seed(3)
    found: dict[str, Weight] = {}
    for role, (_, shape) in FAMILIES[spec.model_type].trunk_tensors(spec, TrunkKey(0)).items():
        if len(shape) == 1:
            found[role] = Weight((1 + 0.2 * torch.randn(shape)).bfloat16(), "bf16")
        else:
            found[role] = quantise(0.15 * torch.randn(shape), format)
    return found, Weight(1 + 0.2 * torch.randn(spec.hidden), "f32")


def run(spec: ModelSpec, format: str, lengths: list[tuple[int, int]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Sequences of (tokens before, new tokens) through one layer: the stream, its norm, and the cache."""
    trunk, norm = weights_for(spec, format)
    torch.manual_seed(4)
    kind = spec.layers[0].attention
    cache = KvCache([kind.cache_width] * 2, sum(map(sum, lengths)) + 5, dtype, CPU)
    cache.layer(1).copy_(torch.randn(cache.layer(1).shape))
    segments: list[Rows] = []
    cache.reserve(3)
    for before, new in lengths:
        span: Span = cache.reserve(before + new)
        span.length = before
        start = segments[-1].stop if segments else 0
        segments.append(Rows(start, start + new, span))
    hidden = torch.randn(segments[-1].stop, spec.hidden)
    made = attention_of(kind, spec.norm_eps, cache, CPU, spec.zero_centred)
    with torch.inference_mode():
        total, normed = made.forward(hidden, 1, trunk, norm, made.positions(segments))
    return total - hidden, normed, cache.layer(1).float()


def compare(spec: ModelSpec, format: str, lengths: list[tuple[int, int]], dtype: torch.dtype, monkeypatch: Any) -> None:
    """The kernels with torch, which replaces a kernel that declines."""
    found = run(spec, format, lengths, dtype)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(latent, "fused_mla_decode", lambda *arguments: asked.append(arguments))
        patch.setattr(grouped, "fused_gqa_decode", lambda *arguments: asked.append(arguments))
        patch.setattr(latent, "attend_latents", lambda *arguments: False)
        for module in (latent, grouped):
            patch.setattr(module, "attend_chunk", lambda *arguments: None)
        expected = run(spec, format, lengths, dtype)
    assert asked
    for mine, reference in zip(found, expected, strict=True):
        rounding = 8e-3 if dtype is torch.bfloat16 else 0  # of one cached value to the next bfloat16
        close = CLOSE[format] * reference.abs().max().item()
        assert (mine - reference).abs().max().item() <= close + rounding * reference.abs().max().item()


@pytest.mark.parametrize("format", CLOSE)
@pytest.mark.parametrize(
    ("changes", "lengths", "dtype"),
    [
        ({}, [(0, 1)], torch.float32),
        ({}, [(301, 1)], torch.bfloat16),
        ({"q_lora_rank": 20}, [(70, 1), (3, 1), (0, 1)], torch.float32),
        ({"num_attention_heads": 18}, [(4500, 1), (130, 1)], torch.float32),  # two tiles of heads, up to 12 ranges
        ({}, [(300, 9), (0, 140)], torch.float32),  # more than one call's: absorbed, and expanded
        ({"q_lora_rank": 20}, [(30, 20), (200, 150)], torch.bfloat16),
        ({"q_lora_rank": 40, "rope_interleave": False}, [(5, 5), (64, 3)], torch.bfloat16),
        ({"qk_rope_head_dim": 6, "kv_lora_rank": 50, "hidden_size": 75}, [(9, 2)], torch.float32),
    ],
)
def test_the_kernels_attend_as_torch_does(
    format: str, changes: dict[str, Any], lengths: list[tuple[int, int]], dtype: torch.dtype, monkeypatch: Any
) -> None:
    spec = spec_of(**changes)
    compare(spec, format, lengths, dtype, monkeypatch)


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_neither_threads_nor_neighbours_reach_the_result(format: str) -> None:
    spec, lengths = spec_of(q_lora_rank=20), [(70, 2), (9, 1)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(spec, format, lengths, torch.float32)
        torch.set_num_threads(5)
        five = run(spec, format, lengths, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, five, strict=True))


def test_the_kernels_are_asked_for_a_few_rows_of_weights_they_know(monkeypatch: Any) -> None:
    calls: list[int] = []
    real = latent.fused_mla_decode

    def count(*arguments: Any) -> Any:
        done = real(*arguments)
        calls.append(done is not None)
        return done

    monkeypatch.setattr(latent, "fused_mla_decode", count)
    run(spec_of(), "bf16", [(4, 8)], torch.float32)
    run(spec_of(), "bf16", [(4, 9)], torch.float32)  # too many
    run(spec_of(v_head_dim=12), "int4", [(4, 1)], torch.float32)  # a head starts within a tile
    assert calls == [1, 0, 0]


def test_latents_are_rounded_to_the_nearest_of_the_cache() -> None:
    exact = run(spec_of(), "bf16", [(5, 3), (2, 1)], torch.float32)[2]
    rounded = run(spec_of(), "bf16", [(5, 3), (2, 1)], torch.bfloat16)[2]
    assert torch.equal(rounded, exact.bfloat16().float())


GROUPED = {
    "num_key_value_heads": 3,
    "num_attention_heads": 6,
    "num_experts": 16,
    "head_dim": 10,
    "model_type": "qwen3_moe",
}


def grouped_spec(family: str, **changes: Any) -> ModelSpec:
    counts = {"num_local_experts": 8, "num_experts": 8, "n_routed_experts": 8, "n_group": 1, "topk_group": 1}
    settings = {**GQA, **counts, "moe_intermediate_size": 24, **changes, "model_type": family}
    return read_spec(settings, "here")


@pytest.mark.parametrize("format", CLOSE)
@pytest.mark.parametrize(
    ("family", "changes", "lengths", "dtype"),
    [
        ("llama", {}, [(0, 1), (3, 1)], torch.float32),
        ("llama", {"num_attention_heads": 9, "num_key_value_heads": 1, "head_dim": 18}, [(300, 1)], torch.bfloat16),
        ("qwen3_moe", {}, [(70, 1), (3, 1), (0, 1), (4500, 1)], torch.float32),  # up to nine ranges of 512 tokens
        ("qwen3_moe", {"head_dim": 10, "num_key_value_heads": 6}, [(5, 5), (254, 3)], torch.bfloat16),
        ("olmoe", {"head_dim": 8}, [(9, 2), (0, 4)], torch.float32),  # all heads normed together
        ("minimax_m2", {"rotary_dim": 6}, [(9, 2)], torch.float32),
        ("gpt_oss", {"sliding_window": 4}, [(9, 2), (1, 1)], torch.float32),  # sinks and biases
        ("gpt_oss", {"sliding_window": 300}, [(600, 3), (0, 2)], torch.bfloat16),
        ("gemma3_text", {"sliding_window": 5, "query_pre_attn_scalar": 9}, [(9, 3), (2, 1)], torch.float32),
        ("glm4_moe", {"partial_rotary_factor": 0.5, "attention_bias": True}, [(40, 20), (0, 44)], torch.float32),
        ("gpt_oss", {"sliding_window": 30}, [(40, 60), (0, 20)], torch.float32),  # more than one call's
        ("qwen3_moe", {}, [(140, 90)], torch.bfloat16),
    ],
)
def test_the_kernels_group_heads_as_torch_does(
    family: str,
    format: str,
    changes: dict[str, Any],
    lengths: list[tuple[int, int]],
    dtype: torch.dtype,
    monkeypatch: Any,
) -> None:
    compare(grouped_spec(family, **changes), format, lengths, dtype, monkeypatch)


@pytest.mark.parametrize("interleaved", [False, True])
def test_grouped_heads_rotate_both_kinds_of_pairs(interleaved: bool, monkeypatch: Any) -> None:
    spec = grouped_spec("llama")
    kind = replace(spec.layers[0].attention, rope=Rope(1e4, interleaved), rope_dim=6)
    compare(
        replace(spec, layers=(replace(spec.layers[0], attention=kind),)), "f32", [(9, 2)], torch.float32, monkeypatch
    )


def test_a_grouped_step_is_one_call_for_a_few_rows_of_weights_that_kernels_know(monkeypatch: Any) -> None:
    calls: list[bool] = []
    real = grouped.fused_gqa_decode

    def count(shape: Any, hidden: Tensor, trunk: Weights, *rest: Any) -> Any:
        strided = Weight(trunk["o_proj"].data.t().contiguous().t(), "f32")
        for weights in (trunk, {**trunk, "o_proj": strided}):
            calls.append((done := real(shape, hidden, weights, *rest)) is not None)
        return done

    monkeypatch.setattr(grouped, "fused_gqa_decode", count)
    run(grouped_spec("llama"), "f32", [(4, 63), (0, 1)], torch.float32)
    run(grouped_spec("llama"), "f32", [(4, 65)], torch.float32)  # too many
    assert calls == [True, False, False, False]


def test_grouped_heads_of_a_kind_that_the_kernel_does_not_know_are_left_to_torch(monkeypatch: Any) -> None:
    @dataclass(frozen=True)
    class Other(Grouped):
        more: bool = True

    calls: list[Any] = []
    monkeypatch.setattr(grouped, "fused_gqa_decode", lambda *arguments: calls.append(arguments))
    spec = grouped_spec("llama")
    run(spec, "f32", [(4, 1)], torch.float32)
    kind = Other(**{field.name: getattr(spec.layers[0].attention, field.name) for field in fields(Grouped)})
    run(replace(spec, layers=(replace(spec.layers[0], attention=kind),)), "f32", [(4, 1)], torch.float32)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_neighbours_reach_grouped_heads(dtype: torch.dtype) -> None:
    spec, lengths = grouped_spec("gpt_oss", sliding_window=700), [(900, 2), (9, 1)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(run(spec, "int4", lengths, dtype))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", ["latent", "grouped"])
def test_a_sequence_attends_alike_whoever_is_beside_it(kind: str, monkeypatch: Any) -> None:
    """Beside one long enough to take the other path: the same bits."""
    spec = spec_of(**(GROUPED if kind == "grouped" else {}))
    attention = spec.layers[0].attention
    trunk, norm = weights_for(spec, "f32")
    short, long = torch.randn(9, spec.hidden), torch.randn(latent.EXPAND_FROM + 1, spec.hidden)
    found: list[Tensor] = []
    asked: list[int] = []
    for name in ("attend_chunk", "attend_latents"):
        real = getattr(latent, name)
        sign = -1 if name == "attend_chunk" else 1
        counted = lambda q, *rest, real=real, sign=sign: (asked.append(sign * len(q)), real(q, *rest))[1]  # noqa: E731
        monkeypatch.setattr(latent, name, counted)
    for hidden in (short, torch.cat((short, long))):
        cache = KvCache([attention.cache_width], 500, torch.float32, CPU)
        made = attention_of(attention, spec.norm_eps, cache, CPU)
        rows = [Rows(0, 9, cache.reserve(9))]
        if len(hidden) > 9:
            rows.append(Rows(9, len(hidden), cache.reserve(len(long))))
        asked.clear()
        with torch.inference_mode():
            found.append(made.forward(hidden, 0, trunk, norm, made.positions(rows))[0][:9])
        if kind == "latent":
            assert set(asked) == ({-9} if len(rows) == 1 else {-9, len(long)})
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[0].abs().max()


def test_many_sequences_decode_in_the_kernel(toy_v3: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one call of the kernel takes, at different places. Their tokens are those of each alone; last bits
    differ by the router's path."""
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=1)
    prompts = [list(range(at, at + 9 + at % 5)) for at in range(19)]
    rows: list[int] = []
    real = latent.fused_mla_decode

    def noted(shape: Any, hidden: Tensor, *rest: Any) -> Any:
        found = real(shape, hidden, *rest)
        if len(hidden) <= 8:  # not a prompt
            rows.append(len(hidden) if found is not None else 0)
        return found

    with LLM.load(toy_v3[0], budget=Budget("8GiB")) as llm:
        alone = [llm.generate([prompt], params)[0] for prompt in prompts]
        monkeypatch.setattr(latent, "fused_mla_decode", noted)
        together = llm.generate(prompts, params)
    assert set(rows) == {8, 3}
    for one, other in zip(alone, together, strict=True):
        assert one.ids == other.ids and one.logprobs and other.logprobs
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
