"""A dense model split into experts by bench/upcycle.py: with all of them chosen it is the dense model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from made_gguf import write_gguf
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tierlm import LLM

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import upcycle

EXPERTS, WIDTH, NEURONS = 4, 16, 96


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": NEURONS, "num_hidden_layers": 3, "vocab_size": 131}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.2, rms_norm_eps=1e-5)
    LlamaForCausalLM(config).save_pretrained(folder)
    write_gguf(folder, folder / "dense.gguf")
    return folder / "dense.gguf"


@pytest.fixture(scope="module")
def split(dense: Path) -> Path:
    tokens = torch.randint(0, 131, (4, 32), generator=torch.Generator().manual_seed(1))
    upcycle.write_model(dense, dense.parent / "split", tokens, EXPERTS, WIDTH, chosen=2)
    return dense.parent / "split"


def logits_of(model: Path) -> torch.Tensor:
    with LLM.load(model, probe="off", context=256) as llm:
        return llm.logits([3, 5, 7, 100, 4] * 9)


def test_all_experts_are_the_dense_model(dense: Path, split: Path) -> None:
    config = json.loads((split / "config.json").read_text())
    expected = logits_of(dense)
    scale = expected.abs().max()
    some = logits_of(split)
    upcycle.write_config(split, {**config, "num_experts_per_tok": EXPERTS})
    everything = logits_of(split)
    upcycle.write_config(split, config)
    assert (everything - expected).abs().max() < 1e-2 * scale  # float16, of random weights that amplify
    assert (some - expected).abs().max() > 5e-2 * scale


def test_every_neuron_is_in_one_expert(dense: Path, split: Path) -> None:
    """And the router chooses better than chance: see the norms of what it chooses."""
    found, model = load_file(split / "model.safetensors"), upcycle.Dense(dense)
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp."
        names = [f"{prefix}shared_experts", *(f"{prefix}experts.{expert}" for expert in range(EXPERTS))]
        rows = torch.cat([found[f"{name}.up_proj.weight"] for name in names])
        expected = model.tensor(f"layers.{layer}.mlp.up_proj").half()
        assert rows.shape == expected.shape
        assert {tuple(row.tolist()) for row in rows} == {tuple(row.tolist()) for row in expected}


def test_the_router_prefers_the_experts_that_act_most() -> None:
    """Two groups of neurons act on inputs of opposite signs."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=random)
    on = torch.stack((x[:, 0] > 0, x[:, 0] < 0), 1).float().repeat_interleave(4, 1)  # [N, 8]
    neurons = torch.cat((on, 5 * torch.ones(256, 2)), 1)  # the last two act always, and most
    parts = upcycle.split(x, neurons, torch.randn(8, 10, generator=random), 2, 4, random)
    assert set(parts.shared.tolist()) == {8, 9}
    assert sorted(sorted(own.tolist()) for own in parts.experts) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    first = int(parts.experts[0, 0] >= 4)  # the group of expert 0
    chosen = (x @ parts.router.T + 4 * parts.correction).argmax(1)
    clear = x[:, 0].abs() > 0.5
    assert ((chosen == first) == (x[:, 0] > 0))[clear].float().mean() > 0.9


def test_impossible_sizes(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of the width"):
        upcycle.write_model(dense, tmp_path / "out", torch.zeros(1, 4, dtype=torch.long), 6, WIDTH, chosen=2)
    assert not (tmp_path / "out").exists()
