"""The bench's synthetic models run, equal `transformers`, and route as requested; their GGUF twins equal them."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import load_toy, make_toy

from tierlm import LLM, Budget, SamplingParams
from tierlm.models import read_spec
from tierlm.spec import ModelSpec

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import popularity
import routing
import synthetic
from noise import CHOICES
from shapes import config_of

BUDGET = Budget("8GiB")
PROMPT = [(37 * i + 11) % 1024 for i in range(20)]
TOYS = [(f"toy-{kind}", fp8) for fp8 in (False, True) for kind in ("v2", "v3", "qwen3")]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """Every toy, (shape, fp8) -> its folder, with hot experts and sticky routing."""
    root = tmp_path_factory.mktemp("synthetic")
    folders = {toy: root / f"{toy[0]}-{'fp8' if toy[1] else 'bf16'}" for toy in TOYS}
    for (shape, fp8), folder in folders.items():
        synthetic.write_model(shape, folder, fp8=fp8, skew=0.6, stickiness=0.4)
    return folders


def spec_of(shape: str) -> ModelSpec:
    return read_spec(config_of(shape, None, False), shape)


@pytest.mark.parametrize(("shape", "fp8"), TOYS)
def test_greedy_decoding_goes_through_the_vocabulary_and_logits_are_of_order_one(
    shape: str, fp8: bool, toys: dict[tuple[str, bool], Path]
) -> None:
    """From block to block of eight ids but for rare leaps, without a loop; the id within a block looks random."""
    with LLM.load(toys[shape, fp8], budget=BUDGET) as llm:
        logits = llm.logits(PROMPT)
        ids = llm.generate([PROMPT], SamplingParams(max_new_tokens=96, ignore_eos=True))[0].ids
    steps = [(b // CHOICES - a // CHOICES) % 256 for a, b in pairwise(PROMPT[-1:] + ids)]
    assert steps.count(1) > 90 and len(set(ids)) > 90
    within = [token % CHOICES for token in ids]
    assert all(4 <= within.count(choice) <= 24 for choice in range(CHOICES))
    assert 1 < logits.std() < 4 and logits.abs().max() < 40


@pytest.mark.parametrize("shape", ["toy-v2", "toy-v3", "toy-qwen3"])
def test_every_layer_matters_to_the_text(shape: str, tmp_path: Path) -> None:
    """In any layer, the greedy tokens change if attention's or a dense layer's output or the router is negated, or if
    two experts are exchanged. The logits change with one weight of these."""
    synthetic.write_model(shape, tmp_path / "model", layers=4)
    with LLM.load(tmp_path / "model", budget=BUDGET) as llm:
        ids = llm.generate([PROMPT], SamplingParams(max_new_tokens=128, ignore_eos=True))[0].ids
    model = load_toy(tmp_path / "model")

    @torch.no_grad()
    def logits() -> Tensor:
        found: Tensor = model(torch.tensor([PROMPT + ids[:-1]])).logits[0, len(PROMPT) - 1 :]
        return found

    plain = logits()
    assert plain.argmax(-1).tolist() == ids
    for number, layer in enumerate(model.model.layers):
        parts = {"attention": layer.self_attn.o_proj.weight}
        if hasattr(layer.mlp, "experts"):
            parts |= {"experts": layer.mlp.experts.down_proj, "router": layer.mlp.gate.weight}
        else:
            parts |= {"dense": layer.mlp.down_proj.weight}
        for name, weights in parts.items():
            changed, kept = weights.data, weights.detach().clone()
            if name == "experts":
                changed[[0, 17]] = kept[[17, 0]]
            else:
                changed.neg_()
            assert logits().argmax(-1).tolist() != ids, f"{name} of layer {number}"
            changed.copy_(kept)
            changed.view(-1)[5] += 1
            assert not torch.equal(logits(), plain), f"one weight of {name} of layer {number}"
            changed.copy_(kept)


@pytest.mark.parametrize("shape", ["toy-v2", "toy-v3", "toy-qwen3"])
def test_bf16_equals_transformers(shape: str, toys: dict[tuple[str, bool], Path]) -> None:
    with torch.no_grad():
        expected = load_toy(toys[shape, False])(torch.tensor([PROMPT])).logits[0]
    with LLM.load(toys[shape, False], budget=BUDGET) as llm:
        found = llm.logits(PROMPT)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_hidden_states_stay_of_order_one_at_any_depth(tmp_path: Path) -> None:
    for layers in (2, 24):
        synthetic.write_model("toy-v2", tmp_path / str(layers), layers=layers)
        with torch.no_grad():
            states = load_toy(tmp_path / str(layers))(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
        assert all(0.8 < state.square().mean().sqrt() < 2 for state in states)


def test_fp8_is_scaled_in_blocks_of_which_bf16_holds_the_product(toys: dict[tuple[str, bool], Path]) -> None:
    matrix = torch.randn(200, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    matrix[:128, :128] *= 50
    stored, scale = synthetic.to_fp8(matrix)
    wide = stored.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    assert stored.dtype == torch.float8_e4m3fn and scale.shape == (2, 3)
    assert torch.equal(wide, wide.bfloat16().float())
    assert ((wide - matrix.float()).abs() <= matrix.float().abs() / 16 + scale.max() / 512).all()
    tensors = load_file(toys["toy-v3", True] / "model-00001-of-00001.safetensors")
    scaled = {name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")}
    eights = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert scaled == eights and "model.layers.1.mlp.experts.0.up_proj.weight" in eights
    assert not any(name.endswith(("gate.weight", "norm.weight", "head.weight", "tokens.weight")) for name in eights)


def test_a_cut_keeps_layers_with_experts() -> None:
    assert config_of("deepseek-v3", None, False)["first_k_dense_replace"] == 3
    assert config_of("deepseek-v3", 4, True)["first_k_dense_replace"] == 1
    assert config_of("deepseek-v3", 41, False)["first_k_dense_replace"] == 2


@pytest.mark.parametrize("shape", ["toy-v2", "toy-v3", "toy-qwen3"])
def test_hot_and_sticky_routing_is_as_asked(shape: str, tmp_path: Path) -> None:
    """Over 160 tokens, one round of the topics."""
    found: dict[tuple[float, float], dict[str, float]] = {}
    for skew, stickiness in ((0.0, 0.0), (0.6, 0.0), (0.6, 0.4)):
        folder = tmp_path / f"{skew}-{stickiness}"
        synthetic.write_model(shape, folder, layers=3, skew=skew, stickiness=stickiness)
        log, experts = routing.log_routing(folder, "8GiB", 160, PROMPT)
        found[skew, stickiness] = routing.summarize(log, experts)
        if not skew and not stickiness:
            chance = routing.summarize(routing.uniform(log, experts), experts)
    plain = found[0.0, 0.0]
    assert plain["same"] < 0.01 and abs(plain["reuse"] - chance["reuse"]) < 0.04
    assert plain["hot_share"] - chance["hot_share"] < 0.1
    assert all(numbers["same"] < 0.1 for numbers in found.values())
    asked = float(popularity.zipf(spec_of(shape), 0.6)[:6].sum()) / 4  # the hottest fifth of 32, of 4 choices
    for sticky in (0.0, 0.4):
        assert abs(found[0.6, sticky]["hot_share"] - asked) < 0.12
        assert found[0.6, sticky]["hot_share"] > plain["hot_share"] + 0.1
    assert abs(found[0.6, 0.4]["reuse"] - 0.4) < 0.08 and found[0.6, 0.0]["reuse"] < 0.3


def test_popularity_falls_with_the_rank_and_sums_to_the_choices() -> None:
    for skew in (0.0, 0.5, 3.0):
        shares = popularity.zipf(spec_of("deepseek-v3"), skew)
        assert abs(float(shares.sum()) - 8) < 1e-2 and shares.max() <= popularity.CEILING
        assert (shares.diff() <= 0).all()


@pytest.mark.parametrize(
    "arguments", [["--stickiness", "0.95"], ["--skew", "-1"], ["--layers", "0"], ["--skew", "1", "--stickiness", "0.1"]]
)
def test_what_cannot_be_is_refused(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["synthetic.py", "toy-v2", str(tmp_path / "model"), *arguments])
    with pytest.raises(SystemExit) as raised:
        synthetic.main()
    assert raised.value.code == 2 and not (tmp_path / "model").exists()


@pytest.mark.parametrize(("shape", "fp8"), [toy for toy in TOYS if toy[0] != "toy-qwen3"])
def test_llama_cpp_computes_the_same_from_the_twin(
    shape: str, fp8: bool, toys: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    """llama.cpp rounds activations to bfloat16, which sends single tokens to other experts: most rows must be close.
    Each of its tokens follows ours, since a rounded tie would part the texts."""
    pytest.importorskip("gguf", reason="needs gguf: pip install tierlm[peers]")
    from gguf_twin import write_twin

    write_twin(toys[shape, fp8], tmp_path / "twin.gguf")
    compare_with_llamacpp(toys[shape, fp8], tmp_path / "twin.gguf")


@pytest.mark.parametrize(
    ("shape", "mix"), [("toy-v2", "q4_k_m"), ("toy-v3", "q8_0"), ("toy-qwen3", "q4_k_m"), ("toy-gpt-oss", "mxfp4")]
)
def test_a_file_written_alone_is_the_same_to_llama_cpp(shape: str, mix: str, tmp_path: Path) -> None:
    """The toys' rows are too short for K-quants; those of the other types that take their place stand in."""
    pytest.importorskip("gguf", reason="needs gguf: pip install tierlm[peers]")
    synthetic.write_file(shape, tmp_path / "alone.gguf", mix, layers=4, skew=0.6, stickiness=0.4, seed=0)
    compare_with_llamacpp(tmp_path / "alone.gguf", tmp_path / "alone.gguf")


def compare_with_llamacpp(model: Path, file: Path) -> None:
    """The log-probabilities of tierlm on ``model`` and of llama.cpp on ``file``, token by token."""
    pytest.importorskip("xllamacpp", reason="needs xllamacpp: pip install tierlm[peers]")
    import llamacpp

    count = 12
    with LLM.load(model, budget=BUDGET) as llm:
        ids = llm.generate([PROMPT], SamplingParams(max_new_tokens=count, ignore_eos=True))[0].ids
        expected = llm.logits(PROMPT + ids)[len(PROMPT) - 1 : -1].log_softmax(-1)
    server = llamacpp.open_server(file, context=256, threads=1)
    far, same = [], []
    for at, row in enumerate(expected):
        replies: list[dict[str, Any]] = []
        server.handle_completions(llamacpp.request_of(PROMPT + ids[:at], 1, n_probs=20), replies.append)
        step = replies[0]["choices"][0]["logprobs"]["content"][0]
        far.append(max(abs(top["logprob"] - float(row[top["id"]])) for top in step["top_logprobs"]))
        same.append(step["id"] == ids[at])
    assert sorted(far)[count // 2] < 0.2  # logits spread over 2.4
    assert same.count(True) > count // 2


@pytest.mark.parametrize("name", ["qwen3-next", "qwen35"])
def test_llama_cpp_reads_twins_of_gated_deltanet(tmp_path: Path, name: str) -> None:
    """And computes the same from them, so they are what its converter writes. It needs heads of equal dimensions."""
    pytest.importorskip("gguf", reason="needs gguf: pip install tierlm[peers]")
    pytest.importorskip("xllamacpp", reason="needs xllamacpp: pip install tierlm[peers]")
    import llamacpp
    from made_gguf import write_gguf

    sizes = {"hidden_size": 64, "head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
    more = {"num_hidden_layers": 4, "num_attention_heads": 4, "linear_num_value_heads": 4}
    make_toy(name, tmp_path, **sizes, **more)
    write_gguf(tmp_path, tmp_path / "model.gguf", merges=["a b"])
    ids = [(7 * i) % 129 + 2 for i in range(90)]
    with LLM.load(tmp_path / "model.gguf", budget=BUDGET, probe="off") as llm:
        expected = llm.logits(ids).log_softmax(-1)
    server = llamacpp.open_server(tmp_path / "model.gguf", context=256, threads=1)
    for tokens in (2, 31, 90):
        replies: list[dict[str, Any]] = []
        server.handle_completions(llamacpp.request_of(ids[:tokens], 1, n_probs=20), replies.append)
        found = replies[0]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        assert len(found) == 20
        assert all(abs(top["logprob"] - float(expected[tokens - 1, top["id"]])) < 0.02 for top in found)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_twins_hold_the_weights(kind: str, toys: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install tierlm[peers]")
    from gguf_twin import write_twin

    write_twin(toys["toy-v3", False], tmp_path / "twin.gguf", kind)
    source = load_file(toys["toy-v3", False] / "model-00001-of-00001.safetensors")
    twin = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "twin.gguf").tensors}
    stacked = twin["blk.2.ffn_down_exps.weight"]
    found = torch.tensor(gguf.quants.dequantize(stacked.data, stacked.tensor_type))
    expected = torch.stack([source[f"model.layers.2.mlp.experts.{e}.down_proj.weight"].float() for e in range(32)])
    assert (found - expected).square().mean() < {"q8_0": 1e-4, "q4_0": 2e-2}[kind] * expected.square().mean()
    gate = torch.tensor(twin["blk.2.ffn_gate_inp.weight"].data)
    assert torch.equal(gate, source["model.layers.2.mlp.gate.weight"].float())
