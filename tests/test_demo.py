"""The embedded model: held-out perplexity against `transformers` at three budgets, text, chat, and its own size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

import tierlm.demo
from tierlm import LLM, Budget, SamplingParams
from tierlm.models.packing import pack_model

DEMO = Path(tierlm.demo.__file__).parent
WINDOW, WINDOWS = 256, 8  # of each held-out text
BUDGETS: dict[str, tuple[Budget, dict[str, Any]]] = {
    "everything fits": (Budget("8GiB"), {}),
    "a tenth of the experts, trunks streamed": (Budget("8GiB"), {"ram_slots": 19, "resident_trunks": 1}),
    "three tiers": (Budget("8GiB", vram="1GiB"), {"ram_slots": 40, "vram_slots": 8, "resident_trunks": 3}),
}


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    """Windows of WINDOW + 1 ids from the held-out texts, tokenised by `transformers`."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    found = []
    for name in ("heldout-python-docs.txt", "heldout-sotu.txt"):
        ids = tokenizer((DEMO / name).read_text(encoding="utf-8"))["input_ids"]
        found += [ids[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(WINDOWS)]
    assert all(len(window) == WINDOW + 1 for window in found)
    return found


@pytest.fixture(scope="module")
def reference(windows: list[list[int]]) -> float:
    model = DeepseekV3ForCausalLM.from_pretrained(DEMO, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        return perplexity([model(torch.tensor([window[:-1]])).logits[0] for window in windows], windows)


def perplexity(logits: list[Tensor], windows: list[list[int]]) -> float:
    """exp of the mean negative log likelihood of each window's ids after the first."""
    losses = [
        torch.nn.functional.cross_entropy(rows, torch.tensor(window[1:]))
        for rows, window in zip(logits, windows, strict=True)
    ]
    return math.exp(torch.stack(losses).mean())


@pytest.mark.parametrize("budget", BUDGETS)
def test_perplexity_equals_transformers(budget: str, windows: list[list[int]], reference: float) -> None:
    ram, limits = BUDGETS[budget]
    with LLM.load("demo", budget=ram, **limits) as llm:
        found = perplexity([llm.logits(window[:-1]) for window in windows], windows)
    assert f"{found:.4g}" == f"{reference:.4g}"
    assert abs(found / reference - 1) < 1e-5
    assert 5 < reference < 60  # better than chance


@pytest.mark.parametrize(("experts", "trunk", "limit"), [("int8", "int8", 0.005), ("int4", "int8", 0.03)])
def test_perplexity_of_fewer_bits(
    experts: str, trunk: str, limit: float, windows: list[list[int]], reference: float, tmp_path: Path
) -> None:
    pack_model(DEMO, tmp_path / "packed", experts=experts, trunk=trunk)
    with LLM.load(tmp_path / "packed", budget=Budget("8GiB")) as llm:
        found = perplexity([llm.logits(window[:-1]) for window in windows], windows)
    assert abs(found / reference - 1) < limit


def test_text_is_tokenised_as_transformers_does(windows: list[list[int]]) -> None:
    text = "The Congress of the United States — naïve façade, 日本語, 🙂\n\n.. code-block:: python"
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    with LLM.load("demo", budget=Budget("8GiB")) as llm:
        assert llm.codec.encode(text) == tokenizer(text)["input_ids"]
        assert llm.codec.decode(llm.codec.encode(text)) == text
        messages = [{"role": "user", "content": "Hello"}]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert llm.codec.template.render(messages) == expected


def test_streamed_text_is_the_generated_text() -> None:
    params = SamplingParams(max_new_tokens=40, temperature=0.9, top_p=0.95, seed=3, stop=["\n\n\n"])
    with LLM.load("demo", budget=Budget("8GiB"), ram_slots=30) as llm:
        result = llm.generate("The Congress of the United States", params)[0]
        pieces = list(llm.stream("The Congress of the United States", params))
        assert "".join(piece.text for piece in pieces) == result.text
        assert [token for piece in pieces for token in piece.ids] == result.ids
        assert pieces[-1].finish_reason == result.finish_reason
        answer = list(llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_new_tokens=5)))
        assert sum(len(piece.ids) for piece in answer) == 5


def test_a_stop_text_ends_the_text_before_it() -> None:
    with LLM.load("demo", budget=Budget("8GiB")) as llm:
        free = llm.generate("The Congress of the United States", SamplingParams(max_new_tokens=40))[0]
        assert free.text is not None
        stop = free.text[20:27]
        params = SamplingParams(max_new_tokens=40, stop=stop)
        result = llm.generate("The Congress of the United States", params)[0]
        assert result.finish_reason == "stop"
        assert result.text == free.text[: free.text.index(stop)]


def test_it_is_small_and_its_card_holds_the_measured_numbers() -> None:
    files = [file for file in DEMO.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6
    record = json.loads((DEMO / "training.json").read_text())
    card = (DEMO / "README.md").read_text()
    for value in (record["steps"], *(f"{p:.2f}" for p in record["held_out_perplexity"].values())):
        assert str(value) in card
    loads = record["expert_load"]
    assert len(loads) == 6 and all(len(layer) == 32 for layer in loads)
    assert max(max(layer) for layer in loads) < 3 / 32  # balanced: no expert gets three times its share
