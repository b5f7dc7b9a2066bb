"""Models of transformers with their experts served by tierlm, in families that tierlm does not have."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import nothing_left_behind
from test_published import HOW, MODELS, SIZES, quantise_toy
from toys import GQA, edit_config, load_toy, make_toy
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from tierlm import BudgetError, CheckpointError, StorageError, TierlmError, UnsupportedModelError, UsageError
from tierlm.integrations import transformers as integration
from tierlm.integrations.transformers import ServedModel, load
from tierlm.integrations.transformers.layout import experts_in
from tierlm.models.packing import pack_model

COMMON: dict[str, Any] = {**GQA, "num_hidden_layers": 3, "moe_intermediate_size": 24, "pad_token_id": 2}
# Experts one by one, after a dense layer and beside shared ones; and in stacks of other names.
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "dots1": (Dots1ForCausalLM, Dots1Config, {"n_routed_experts": 16, "n_shared_experts": 1, "n_group": 1}),
    "ernie": (Ernie4_5_MoeForCausalLM, Ernie4_5_MoeConfig, {"moe_num_experts": 16, "moe_k": 4, "head_dim": 8}),
    "granite": (GraniteMoeForCausalLM, GraniteMoeConfig, {"num_local_experts": 16, "head_dim": 8}),
}
SOME: dict[str, Any] = {"ram": "8GiB", "probe": "off", "heat": False}
TIGHT: dict[str, Any] = {**SOME, "ram_slots": 5}
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


def make(kind: str, folder: Path, **changes: Any) -> Any:
    made, config, more = KINDS[kind]
    torch.manual_seed(7)
    model = made(config(**{**COMMON, "topk_group": 1, "first_k_dense_replace": 1, **more, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith((".gate.weight", ".router.weight")):
                parameter.normal_(0, 0.5)
    model.set_experts_implementation("eager")
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=KINDS)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make(request.param, folder)


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("dots1")
    return folder, make("dots1", folder)


def logits(model: Any, *prompts: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor(prompts)).logits
    return found


def text(model: Any, *prompts: list[int]) -> list[list[int]]:
    """Greedy text, of prompts that are padded on the left."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found: list[list[int]] = model.generate(padded, attention_mask=mask, **GREEDY).tolist()
    return found


@pytest.mark.parametrize(
    "options", [TIGHT, SOME, {**TIGHT, "prefill_chunk": 7, "ram_slots": 1}, {**TIGHT, "predictor": "ensemble"}]
)
def test_logits_and_tokens_equal_transformers(toy: tuple[Path, Any], ids: list[int], options: dict[str, Any]) -> None:
    """In tight memory and resident, in chunks, with predictions; in prefill, decode and a batch."""
    folder, reference = toy
    with load(folder, **options) as model:
        expected = logits(reference, ids)
        assert torch.allclose(logits(model, ids), expected, rtol=0, atol=1e-4 * expected.abs().max())
        for prompts in ([ids], [ids, ids[:9], ids[20:]]):
            assert text(model, *prompts) == text(reference, *prompts)


def test_experts_are_read_again_only_where_memory_is_short(toy: tuple[Path, Any], ids: list[int]) -> None:
    folder, _ = toy
    counts = {}
    for slots in (5, 48):
        with load(folder, **{**SOME, "ram_slots": slots}) as model:
            text(model, ids)
            found = model.stats()
            assert found.plan.ram.expert_slots == min(slots, 16 * len(experts_in(model)))
            assert found.tokens == len(ids) + 9 and found.hit_rate is not None
            counts[slots] = found.ram.misses, found.links["disk->ram"].bytes
            assert "hit rate" in repr(found)
    all_experts = 16 * len(experts_in(model))
    assert counts[48][0] <= all_experts < counts[5][0]
    assert counts[48][1] < counts[5][1]


def test_warm_up_fills_memory(dots: tuple[Path, Any], ids: list[int]) -> None:
    for _ in range(2):  # the second time, the heat of the first is known
        with load(dots[0], probe="off") as model:
            assert text(model, ids) == text(dots[1], ids)
            assert model.stats().ram.warmed > 0


def test_the_model_has_no_experts_in_memory(toy: tuple[Path, Any], tmp_path: Path) -> None:
    folder, reference = toy
    with load(folder, **TIGHT) as model:
        assert isinstance(model, ServedModel) and isinstance(model, type(reference))
        experts = {id(p) for module in experts_in(reference).values() for p in module.parameters()}
        others = sum(p.numel() for p in reference.parameters() if id(p) not in experts)
        assert sum(p.numel() for p in model.parameters()) == others
        with pytest.raises(UsageError, match="cannot be saved"):
            model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["as Kimi-K2-Thinking", "nvfp4 of modelopt", "fp8 of modelopt", "fp8 with bf16 scales"]
)
def test_quantised_checkpoints(name: str, tmp_path: Path, ids: list[int]) -> None:
    """Experts are computed in their format. What else is quantised becomes floats."""
    how, quantization, only = MODELS[name]
    make_toy("v3", tmp_path / "model", **SIZES)
    meant = quantise_toy(tmp_path / "model", HOW[how][1], only)
    edit_config(tmp_path / "model", quantization_config=quantization)
    (tmp_path / "meant").mkdir()
    save_file({name: part.contiguous() for name, part in meant.items()}, tmp_path / "meant/model.safetensors")
    (tmp_path / "meant/config.json").write_bytes((tmp_path / "model/config.json").read_bytes())
    edit_config(tmp_path / "meant", quantization_config=None)
    expected = logits(load_toy(tmp_path / "meant"), ids)
    with load(tmp_path / "model", **TIGHT) as model:
        record = model.tierlm_experts.records.record(model.tierlm_experts.records.experts()[0])
        assert record.places["up_proj"].format == HOW[how][0]
        assert torch.allclose(logits(model, ids), expected, rtol=0, atol=1e-4 * expected.abs().max())


def test_bfloat16(tmp_path: Path, ids: list[int]) -> None:
    reference = make("ernie", tmp_path / "wide")
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "toy")
    expected = logits(reference.float(), ids)
    with load(tmp_path / "toy", **TIGHT) as model:
        assert model.dtype == torch.bfloat16
        assert (logits(model, ids) - expected).abs().max() < 0.05 * expected.abs().max()


WRONG: dict[str, tuple[dict[str, Any], type[TierlmError], str]] = {
    "option": ({"context": 9}, UsageError, "context: expected one of policy, predictor"),
    "value": ({"prefill_chunk": 0}, UsageError, "prefill_chunk"),
    "reserve": ({"reserve": "much"}, UsageError, "reserve: expected a size"),
    "policy": ({"policy": "best"}, UsageError, "policy"),
    "predictor": ({"predictor": "gate"}, UsageError, "needs no routers, found 'gate'"),
    "budget": ({"ram": "300MiB"}, BudgetError, "below the floor"),
    "mirror": ({"mirrors": ["none/such"]}, TierlmError, "none/such"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_leaves_nothing_open(name: str, dots: tuple[Path, Any]) -> None:
    options, kind, message = WRONG[name]
    with nothing_left_behind(), pytest.raises(kind, match=message):
        load(dots[0], **{**SOME, **options})


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_load_leaves_nothing_open(
    error: type[BaseException], dots: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While transformers loads its part."""

    def interrupted(*arguments: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr("transformers.modeling_utils.convert_and_load_state_dict_in_model", interrupted)
    with nothing_left_behind(), pytest.raises(error):
        load(dots[0], **SOME)


def test_a_model_that_is_closed_or_dropped_gives_everything_back(dots: tuple[Path, Any], ids: list[int]) -> None:
    with nothing_left_behind():
        model = load(dots[0], **TIGHT)
        logits(model, ids)
        model.close()
        model.close()
        assert model.stats().ram.misses > 0
        with pytest.raises(UsageError, match="this model was closed"):
            logits(model, ids)
    with nothing_left_behind():
        model = load(dots[0], **TIGHT)
        logits(model, ids)
        del model
        gc.collect()


def test_several_threads_share_a_model(dots: tuple[Path, Any], ids: list[int]) -> None:
    prompts = [ids[start : start + 12] for start in range(0, 40, 10)]
    with load(dots[0], **TIGHT) as model, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: text(model, prompt), prompts))
    assert found == [text(dots[1], prompt) for prompt in prompts]


def test_an_interrupt_leaves_the_model_whole(
    dots: tuple[Path, Any], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is interrupted while a layer runs. The layer ends, and the next call is right."""

    def interrupted(self: Any, timeout: float | None = None) -> Any:
        raise KeyboardInterrupt

    with load(dots[0], **TIGHT) as model:
        with monkeypatch.context() as patch:
            patch.setattr(Future, "result", interrupted)
            for _ in range(3):
                with pytest.raises(KeyboardInterrupt):
                    logits(model, ids)
        assert torch.allclose(logits(model, ids), logits(dots[1], ids), atol=1e-3)


def test_a_failed_read_is_the_error_of_its_call_alone(
    dots: tuple[Path, Any], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise StorageError("made up")

    with load(dots[0], **{**TIGHT, "reader": "mmap"}) as model:
        with monkeypatch.context() as patch:
            patch.setattr(model.tierlm_experts._reader, "descriptor", lambda file: None)
            patch.setattr(model.tierlm_experts._reader, "read", fail)
            with pytest.raises(StorageError, match="made up"):
                logits(model, ids[:3])
        assert torch.allclose(logits(model, ids), logits(dots[1], ids), atol=1e-3)


def test_gradients_are_refused(dots: tuple[Path, Any]) -> None:
    with load(dots[0], **TIGHT) as model:
        inputs = model.get_input_embeddings()(torch.tensor([[3, 4]])).requires_grad_(True)
        with pytest.raises(UsageError, match="no gradients"):
            model(inputs_embeds=inputs)


def test_other_experts_are_not_served(dots: tuple[Path, Any]) -> None:
    load(dots[0], **TIGHT).close()  # registers the implementation
    reference = Dots1ForCausalLM.from_pretrained(dots[0], experts_implementation=integration.NAME)
    with pytest.raises(UsageError, match=r"load the model with tierlm\.integrations\.transformers"):
        logits(reference, [3, 4])


def dense(folder: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**{**COMMON, "head_dim": 8})).save_pretrained(folder)


def without(part: str) -> Callable[[Path], None]:
    """The toy without the tensors that have ``part`` in their name."""

    def made(folder: Path) -> None:
        make("dots1", folder)
        file = folder / "model.safetensors"
        save_file({name: tensor for name, tensor in load_file(file).items() if part not in name}, file)

    return made


def packed(folder: Path) -> None:
    make_toy("v3", folder.parent / "source")
    pack_model(folder.parent / "source", folder, experts="keep", trunk="keep")


def changed(**changes: Any) -> Callable[[Path], None]:
    def made(folder: Path) -> None:
        make("dots1", folder)
        edit_config(folder, **changes)

    return made


UNFIT: dict[str, tuple[Callable[[Path], Any], type[TierlmError], str]] = {
    "no experts": (dense, UnsupportedModelError, "LlamaForCausalLM: expected modules that call .* found none"),
    "gelu": (lambda folder: make("granite", folder, hidden_act="gelu"), UnsupportedModelError,
             r"model\.layers\.0\.block_sparse_moe\.experts \(GraniteMoeExperts\): .* another activation"),
    "biases": (lambda folder: make_toy("gpt-oss", folder), UnsupportedModelError, "GptOssExperts.* found biases"),
    "packed": (packed, UnsupportedModelError, "found a packed store"),
    "an expert missing": (without("experts.3.up_proj"), CheckpointError, r"tensors of 16 experts, found \[16, 15\]"),
    "a layer missing": (without("layers.2.mlp.experts."), CheckpointError, "layers.2.mlp.experts.* found none"),
    "a norm missing": (without("layers.1.input_layernorm"), CheckpointError, "layers.1.input_layernorm.weight"),
    "other sizes": (changed(moe_intermediate_size=16), CheckpointError, r"has shape \[48, 24\], expected \[48, 16\]"),
    "another trunk": (changed(vocab_size=132), CheckpointError, "transformers cannot load it"),
    "no architecture": (changed(architectures=None), UnsupportedModelError, "architecture None"),
    "unknown architecture": (changed(architectures=["logging"]), UnsupportedModelError, "architecture 'logging'"),
    "unknown quantisation": (changed(quantization_config={"quant_method": "hqq"}), UnsupportedModelError, "'hqq'"),
    "unknown model_type": (changed(model_type="nope"), UnsupportedModelError, "transformers cannot read it"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_does_not_fit(name: str, tmp_path: Path) -> None:
    made, kind, message = UNFIT[name]
    made(tmp_path / "model")
    with nothing_left_behind(), pytest.raises(kind, match=message):
        load(tmp_path / "model", **SOME)
