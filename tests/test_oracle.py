"""Logits against `transformers`, for every kind of toy: prefill, chunked prefill, decode, and each stored format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import TOYS, edit_config, load_toy, make_toy, settings_of
from transformers import GlmMoeDsaConfig

from tierlm import LLM, Budget, CheckpointError, SamplingParams
from tierlm.attention_spec import Latent
from tierlm.models import latent, read_spec
from tierlm.models.decoder import Segment

BUDGET = Budget("8GiB")


def reference(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def decoded_logits(llm: LLM, ids: list[int], prompt: int) -> Tensor:
    """Logits of ``ids`` from a prefill of ``prompt`` tokens and one step per further token, [1 + steps, vocab]."""
    scheduler, chunk = llm._runtime.scheduler, llm._runtime.scheduler.chunk
    decoder, span = scheduler.decoder, scheduler.cache.reserve(len(ids))
    for start in range(0, prompt, chunk):
        first = decoder.forward([Segment(ids[start : min(start + chunk, prompt)], span)], prefill=True)
    rows = [decoder.forward([Segment([token], span)], prefill=False)[0] for token in ids[prompt:]]
    scheduler.cache.release(span)
    return torch.stack([first[0], *rows])


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("name", TOYS)
def test_logits_equal_transformers(name: str, tmp_path: Path, ids: list[int]) -> None:
    expected = reference(make_toy(name, tmp_path), ids)
    with LLM.load(tmp_path, budget=BUDGET, prefill_chunk=7) as llm:
        assert_close(llm.logits(ids), expected)  # seven chunks
        prompt = len(ids) - 16
        assert_close(decoded_logits(llm, ids, prompt), expected[prompt - 1 :])


@pytest.mark.parametrize("name", ["qwen3", "v32-sparse", "gemma4"])
def test_batch_equals_transformers(name: str, tmp_path: Path, ids: list[int]) -> None:
    """Sequences of a step do not affect each other."""
    model, prompts = make_toy(name, tmp_path), [ids[:9], ids[9:12], ids[12:40]]
    with LLM.load(tmp_path, budget=BUDGET) as llm:
        scheduler = llm._runtime.scheduler
        steps = [Segment(prompt, scheduler.cache.reserve(len(prompt) + 1)) for prompt in prompts]
        found = scheduler.decoder.forward(steps, prefill=True)
        assert_close(found, torch.stack([reference(model, prompt)[-1] for prompt in prompts]))
        found = scheduler.decoder.forward([Segment([5], step.span) for step in steps], prefill=False)
    assert_close(found, torch.stack([reference(model, [*prompt, 5])[-1] for prompt in prompts]))


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_scores_are_taken_a_few_heads_at_a_time(heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One head; some; all four heads that share keys and values."""
    model = make_toy("qwen3", tmp_path, num_attention_heads=8, num_hidden_layers=2)
    ids = [(7 * i) % 129 + 2 for i in range(60)]
    monkeypatch.setattr("tierlm.models.grouped.SCORE_VALUES", heads * len(ids) ** 2)
    with LLM.load(tmp_path, budget=BUDGET, prefill_chunk=len(ids)) as llm:
        assert_close(llm.logits(ids), reference(model, ids))


@pytest.mark.parametrize("name", ["v3", "v32-sparse"])
def test_long_prefill_expands_keys_and_values(name: str, tmp_path: Path) -> None:
    """From EXPAND_FROM tokens of a sequence on, attention takes its other path."""
    model = make_toy(name, tmp_path)
    ids = [(7 * i) % 129 + 2 for i in range(latent.EXPAND_FROM + 60)]
    with LLM.load(tmp_path, budget=BUDGET, prefill_chunk=latent.EXPAND_FROM + 20) as llm:
        assert_close(llm.logits(ids), reference(model, ids))


def test_routing_of_the_toys_is_not_trivial(toy_v3: tuple[Path, Any], ids: list[int]) -> None:
    with LLM.load(toy_v3[0], budget=BUDGET, heat=False, predictor="none") as llm:
        llm.logits(ids)
        assert llm.stats().experts["ram"].misses > 3 * 12  # of 3 * 16 experts


@pytest.mark.parametrize("name", ["v3", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_widened_exactly(name: str, dtype: torch.dtype, tmp_path: Path, ids: list[int]) -> None:
    model = make_toy(name, tmp_path, dtype)
    with LLM.load(tmp_path, budget=BUDGET) as llm:
        found = llm.logits(ids)
    with torch.no_grad():
        own = model(torch.tensor([ids])).logits[0].float()
    assert_close(found, reference(load_toy(tmp_path), ids))  # the same weights, float32 arithmetic
    # transformers' arithmetic in the 16-bit type; rounding sends a few tokens to other experts
    far = (found - own).abs().amax(-1) > 0.05 * own.abs().max()
    assert far.float().mean() < 0.2


def quantise_fp8(folder: Path) -> None:
    """Rewrite a checkpoint as DeepSeek-V3 is published: e4m3 with 128 x 128 block scales, except norms, gates,
    embedding and head."""
    tensors = load_file(folder / "model.safetensors")
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ends = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")
        if tensor.dim() != 2 or name.endswith(ends):
            out[name] = tensor.bfloat16() if tensor.dim() == 2 else tensor
            continue
        rows, columns = (-(-size // 128) for size in tensor.shape)
        scale = torch.ones(rows, columns)
        quantised = torch.empty_like(tensor)
        for r in range(rows):
            for c in range(columns):
                block = tensor[r * 128 : (r + 1) * 128, c * 128 : (c + 1) * 128]
                scale[r, c] = block.abs().max() / 448
                quantised[r * 128 : (r + 1) * 128, c * 128 : (c + 1) * 128] = block / scale[r, c]
        out[name] = quantised.to(torch.float8_e4m3fn)
        out[name + "_scale_inv"] = scale
    save_file(out, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})


def dequantise(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        out[name] = tensor.float()
        if (scale := tensors.get(name + "_scale_inv")) is not None:
            wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            out[name] *= wide[: tensor.shape[0], : tensor.shape[1]]
    return out


@pytest.mark.parametrize("name", ["v3", "v2-grouped", "qwen3"])
def test_block_scaled_fp8_equals_the_dequantised_weights(name: str, tmp_path: Path, ids: list[int]) -> None:
    """Sizes that 128 does not divide, and several blocks in each direction."""
    sizes = {"hidden_size": 160, "moe_intermediate_size": 136, "intermediate_size": 264, "kv_lora_rank": 144}
    source, plain = tmp_path / "fp8", tmp_path / "plain"
    if name == "qwen3":
        del sizes["kv_lora_rank"]
    model = make_toy(name, source, **sizes)
    quantise_fp8(source)
    model.save_pretrained(plain)
    save_file(dequantise(source), plain / "model.safetensors", metadata={"format": "pt"})
    expected = reference(load_toy(plain), ids)
    with LLM.load(source, budget=BUDGET) as llm:
        assert_close(llm.logits(ids), expected)
        assert_close(decoded_logits(llm, ids, 40), expected[39:])


def test_shards_and_index(tmp_path: Path, ids: list[int]) -> None:
    model = make_toy("v3", tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    with LLM.load(tmp_path / "many", budget=BUDGET) as llm:
        assert_close(llm.logits(ids), reference(model, ids))


def test_kimi_k2_is_read_as_the_v3_architecture(tmp_path: Path, ids: list[int]) -> None:
    model = make_toy("v3-one-group", tmp_path)
    published = {"model_type": "kimi_k2", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    edit_config(tmp_path, **published, architectures=["DeepseekV3ForCausalLM"])
    with LLM.load(tmp_path, budget=BUDGET) as llm:
        assert_close(llm.logits(ids), reference(model, ids))


@pytest.mark.parametrize("name", ["v32", "glm5"])
def test_sparse_attention_begins_above_index_topk(name: str, tmp_path: Path, ids: list[int]) -> None:
    """Up to there every key is chosen, and the fused kernel runs; the step that crosses it uses the index keys that
    steps before it cached."""
    model = make_toy(name, tmp_path, index_topk=36)
    with LLM.load(tmp_path, budget=BUDGET) as llm:
        assert_close(decoded_logits(llm, ids, 29), reference(model, ids)[28:])


@pytest.mark.parametrize("name", ["v32-sparse", "glm5-sparse"])
def test_index_scores_are_taken_a_few_heads_at_a_time(
    name: str, tmp_path: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierlm.models.indexer.SCORE_VALUES", len(ids) ** 2)
    model = make_toy(name, tmp_path)
    with LLM.load(tmp_path, budget=BUDGET) as llm:
        assert_close(llm.logits(ids), reference(model, ids))


def test_indexers_that_cannot_be(tmp_path: Path) -> None:
    make_toy("glm5-sparse", tmp_path)
    for changes, words in (
        ({"index_topk": 0}, "index_topk: expected a whole number of at least 1, found 0"),
        ({"index_topk": 8, "indexer_types": ["shared"] * 4}, "the first layer must have an indexer"),
        ({"indexer_types": ["full"] * 3}, "indexer_types: expected full or shared for 4 layers"),
        ({"indexer_types": None, "q_lora_rank": None}, "an indexer needs q_lora_rank"),
    ):
        edit_config(tmp_path, **changes)
        with pytest.raises(CheckpointError, match=words):
            LLM.load(tmp_path, budget=BUDGET)


@pytest.mark.parametrize(
    ("changes", "shared"),
    [({}, []), ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, [1, 3]), ({"index_topk_pattern": "FSSF"}, [1, 2])],
)
def test_layers_without_an_indexer_are_told_as_transformers_does(changes: dict[str, Any], shared: list[int]) -> None:
    config = {**settings_of("glm5"), **changes}
    attention = read_spec(config, "here").layers[0].attention
    assert isinstance(attention, Latent) and attention.indexer is not None
    assert sorted(attention.indexer.shared) == shared
    kinds = GlmMoeDsaConfig(**config).indexer_types
    assert shared == [at for at, kind in enumerate(kinds) if kind == "shared"]


def test_published_rope_scaling_dialect(tmp_path: Path, ids: list[int]) -> None:
    """Published configs have rope_scaling and rope_theta where transformers 5 writes rope_parameters."""
    expected = reference(make_toy("v3-yarn", tmp_path), ids)
    config = json.loads((tmp_path / "config.json").read_text())
    table = config.pop("rope_parameters")
    config |= {"rope_theta": table.pop("rope_theta"), "rope_scaling": {**table, "type": table.pop("rope_type")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with LLM.load(tmp_path, budget=BUDGET) as llm:
        assert_close(llm.logits(ids), expected)


def test_multi_token_prediction_layers_are_ignored_with_a_note(tmp_path: Path, ids: list[int]) -> None:
    expected = reference(make_toy("v3", tmp_path), ids)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {f"model.layers.4.{name}": torch.ones(3) for name in ("enorm.weight", "mlp.experts.0.up_proj.weight")}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    with LLM.load(tmp_path, budget=BUDGET) as llm:
        assert_close(llm.logits(ids), expected)
        assert any("2 tensors of multi-token prediction" in note for note in llm.stats().notes)


@pytest.mark.parametrize("toy", ["toy_v3", "toy_qwen3"])
def test_greedy_tokens_equal_transformers_generate(toy: str, request: pytest.FixtureRequest, ids: list[int]) -> None:
    folder, model = request.getfixturevalue(toy)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)[0, len(ids) :]
    with LLM.load(folder, budget=BUDGET) as llm:
        assert llm.generate([ids], SamplingParams(max_new_tokens=24))[0].ids == expected.tolist()
