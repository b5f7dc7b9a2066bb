"""Values that are not finite: an error that names where they began, for the sequences that have them."""

from __future__ import annotations

import asyncio
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.test_llm import RAM
from tierlm import LLM, AsyncLLM, NumericsError, SamplingParams

PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)
BAD_TOKEN = 77
PROMPT = [5, 6, 7, 8]


def damaged(folder: Path, to: Path, name: str, value: float, at: Any = ...) -> Path:
    """A copy of the model in ``folder`` with ``value`` at ``at`` of the tensor ``name``."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name][at] = value
    save_file(tensors, to / "model.safetensors")
    return to


@pytest.mark.parametrize(
    ("name", "value", "layer", "where"),
    [
        ("model.layers.0.self_attn.o_proj.weight", math.nan, 0, "layer 0"),
        ("model.layers.0.mlp.up_proj.weight", math.inf, 0, "layer 0"),
        ("model.layers.1.input_layernorm.weight", math.nan, 1, "layer 1"),
        ("model.layers.1.post_attention_layernorm.weight", math.nan, 1, "layer 1"),
        ("model.layers.2.mlp.gate.weight", math.nan, 2, "layer 2"),
        ("model.layers.2.mlp.gate.e_score_correction_bias", math.nan, None, None),  # only chooses
        ("model.layers.2.mlp.shared_experts.down_proj.weight", 3e38, 2, "layer 2"),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", -math.inf, 3, "layer 3"),
        ("model.norm.weight", math.nan, None, "the final norm or the lm_head"),
        ("lm_head.weight", math.inf, None, "the final norm or the lm_head"),
        ("model.embed_tokens.weight", math.nan, None, "the embedding"),
    ],
)
@pytest.mark.parametrize("prompt", [[5], PROMPT * 5], ids=["one", "many"])  # tokens: the kernels' way and torch's
def test_the_layer_where_it_began_is_named(
    name: str, value: float, layer: int | None, where: str | None, prompt: list[int], toy_v3: Any, tmp_path: Path
) -> None:
    folder = damaged(toy_v3[0], tmp_path / "model", name, value)
    with LLM.load(folder, budget=RAM, heat=False) as llm:
        if where is None:
            assert len(llm.generate(prompt, PARAMS)[0].ids) == 6
            return
        with pytest.raises(NumericsError, match=f"began in {where}:") as caught:
            llm.generate(prompt, PARAMS)
        assert caught.value.layer == layer
        with pytest.raises(NumericsError, match=f"began in {where}:"):
            llm.logits(prompt)
        with pytest.raises(NumericsError, match=f"began in {where}:"):
            asyncio.run(AsyncLLM(llm).logits(prompt))


def test_other_sequences_go_on(toy_v3: Any, tmp_path: Path) -> None:
    """One token has no finite embedding: the sequences with it end with an error, in prefill or in decode."""
    folder = damaged(toy_v3[0], tmp_path / "model", "model.embed_tokens.weight", math.nan, BAD_TOKEN)
    prompts = [PROMPT, [*PROMPT, BAD_TOKEN], [9, 10]]
    with LLM.load(toy_v3[0], budget=RAM, heat=False) as llm:
        alone = [llm.generate(prompt, PARAMS)[0].ids for prompt in prompts]
    assert BAD_TOKEN not in [*alone[0], *alone[2]]
    with LLM.load(folder, budget=RAM, heat=False) as llm:
        good, bad, other = llm.generate(prompts, PARAMS)
        assert (good.ids, other.ids) == (alone[0], alone[2])
        assert isinstance(bad.error, NumericsError) and bad.finish_reason == "error" and not bad.ids
        assert llm.generate(PROMPT, PARAMS)[0].ids == alone[0]
