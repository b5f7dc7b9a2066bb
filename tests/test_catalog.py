"""A model folder against its config: what is refused, with which message; the public dialects of config.json."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import TOYS, edit_config, make_toy

from tierlm.attention_spec import Latent
from tierlm.checkpoints.hub import find_model
from tierlm.errors import CheckpointError, UnsupportedModelError
from tierlm.models import FAMILIES, read_spec
from tierlm.models.catalog import Catalog
from tierlm.planning.known import find_config
from tierlm.spec import Dense, ExpertKey, HeadKey, ModelSpec, Moe, ResidentKey, TrunkKey

EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
Tensors = dict[str, torch.Tensor]
NAN, INF = float("nan"), float("inf")
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def toy(originals: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the v3 toy to damage."""
    return Path(shutil.copytree(originals("v3"), tmp_path / "toy"))


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a toy's file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def drop_config(folder: Path, *names: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in names}))


def refused(folder: Path, error: type[CheckpointError], *words: str) -> str:
    """Check that the folder is refused with exactly ``error`` and all of ``words``; returns the message."""
    with pytest.raises(CheckpointError) as caught:
        Catalog(folder)
    assert type(caught.value) is error, caught.value
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# --- valid models


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_catalogued_whole(originals: Callable[[str], Path], name: str) -> None:
    catalog = Catalog(originals(name))
    spec = catalog.spec
    assert [len(catalog.layers), len(catalog.experts())] == [len(spec.layers), len(spec.moe_layers) * spec.experts]
    assert catalog.trunks == [*map(TrunkKey, range(len(spec.layers))), *map(HeadKey, range(len(catalog.head)))]
    assert catalog.files == [originals(name) / "model.safetensors"] and catalog.ignored == [] and catalog.eos == (1,)
    keys = [*catalog.trunks, *catalog.experts(), ResidentKey()]
    used = {t.name for key in keys for extent in catalog.record(key).extents for t in extent.tensors}
    assert used | {catalog.embedding.name} == set(catalog.checkpoint.tensors)
    assert all(catalog.size(key) == catalog.record(key).nbytes > 0 for key in keys)
    assert spec.moe is not None
    expert = catalog.record(ExpertKey(spec.moe_layers[-1], spec.experts - 1)).places
    width, hidden = spec.moe.width, spec.hidden
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    if spec.moe.stacked:
        stack = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
        shapes = {role: shape[::-1] if spec.moe.transposed else shape for role, shape in stack.items()}
    if spec.moe.clamped:
        shapes |= {"gate_up_bias": (2 * width,), "down_bias": (hidden,)}
    assert {role: place.shape for role, place in expert.items()} == shapes
    layouts = [catalog.record(key).places for key in catalog.experts()]
    assert all((one is other) == (one == other) for one in layouts for other in layouts), "alike: the same mapping"


def test_head_is_cut_into_blocks_of_rows(originals: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierlm.models.catalog.HEAD_BLOCK_BYTES", 48 * 4 * 50)  # fifty rows of this toy
    catalog = Catalog(originals("v3"))
    shapes = [catalog.record(key).places["lm_head"].shape for key in catalog.head]
    assert shapes == [(50, 48), (50, 48), (31, 48)]
    extents = [catalog.record(key).extents[0] for key in catalog.head]
    assert [a.stop for a in extents[:-1]] == [b.start for b in extents[1:]]
    assert extents[-1].stop - extents[0].start == 131 * 48 * 4


def test_tied_head_is_the_embedding(toy: Path) -> None:
    rewrite(toy, drop("lm_head.weight"))
    refused(toy, CheckpointError, str(toy), "lm_head.weight")
    edit_config(toy, tie_word_embeddings=True)
    catalog = Catalog(toy)
    extent = catalog.record(catalog.head[0]).extents[0]
    assert extent.start == catalog.embedding.offset and extent.stop - extent.start == catalog.embedding.nbytes


@pytest.mark.parametrize(
    ("config", "generation", "eos"),
    [
        (1, None, (1,)),
        (1, 1, (1,)),
        (1, [2, 1, 3], (1, 2, 3)),
        ([1, 2], 3, (1, 2, 3)),
        (None, 5, (5,)),
        (None, None, ()),
    ],
)
def test_eos_ids_of_both_configs(toy: Path, config: Any, generation: Any, eos: tuple[int, ...]) -> None:
    edit_config(toy, eos_token_id=config)
    (toy / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert Catalog(toy).eos == eos
    (toy / "generation_config.json").unlink()
    assert set(Catalog(toy).eos) <= set(eos)


@pytest.mark.parametrize("eos", ["</s>", [1, "</s>"], [None], {"id": 1}, 2.5])
def test_eos_that_is_no_id(toy: Path, eos: Any) -> None:
    (toy / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    refused(toy, CheckpointError, str(toy), "eos_token_id")


def test_layers_past_the_last_are_ignored_and_reported(tmp_path: Path) -> None:
    """Multi-token prediction is published as one layer more than num_hidden_layers says."""
    make_toy("v3", tmp_path, num_hidden_layers=5)
    edit_config(tmp_path, num_hidden_layers=4, num_nextn_predict_layers=1)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.4.eh_proj.weight": torch.zeros(48, 96)}))
    catalog = Catalog(tmp_path)
    beyond = {name for name in catalog.checkpoint.tensors if name.startswith("model.layers.4.")}
    assert "model.layers.4.eh_proj.weight" in beyond and len(beyond) > 50
    assert set(catalog.ignored) == beyond
    keys = [*catalog.trunks, *catalog.experts(), ResidentKey()]
    used = {t.name for key in keys for extent in catalog.record(key).extents for t in extent.tensors}
    assert not used & beyond


# --- damaged models


@pytest.mark.parametrize("model_type", ["mamba", "deepseek_v4", "", None, 3, ["deepseek_v3"]])
def test_unsupported_architecture_lists_the_supported(toy: Path, model_type: Any) -> None:
    edit_config(toy, model_type=model_type)
    message = refused(toy, UnsupportedModelError, str(toy / "config.json"), repr(model_type))
    assert all(name in message for name in FAMILIES)
    drop_config(toy, "model_type")
    refused(toy, UnsupportedModelError, *FAMILIES)


@pytest.mark.parametrize(
    "name",
    [
        EXPERT,
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.shared_experts.gate_proj.weight",
        "model.layers.1.self_attn.kv_b_proj.weight",
        "model.layers.1.self_attn.q_a_layernorm.weight",
        "model.layers.2.post_attention_layernorm.weight",
    ],
)
def test_missing_misshapen_and_mistyped_tensors_are_named(toy: Path, name: str) -> None:
    whole = load_file(toy / "model.safetensors")[name]
    rewrite(toy, lambda tensors: tensors.update({name: whole[1:].clone()}))
    shapes = f"has shape {[len(whole) - 1, *whole.shape[1:]]}, expected {list(whole.shape)}"
    refused(toy, CheckpointError, str(toy / "model.safetensors"), name, shapes)
    rewrite(toy, lambda tensors: tensors.update({name: whole.int()}))
    refused(toy, UnsupportedModelError, str(toy / "model.safetensors"), name, "I32")
    rewrite(toy, drop(name))
    refused(toy, CheckpointError, str(toy), name, "missing")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["gptq", "fp8"]),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, ["[64, 64]", "[128, 128]"]),
        ({"quantization_config": {"bits": 4}}, ["quantization"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"scoring_func": "softmax"}, ["scoring_func", "'softmax'", "'sigmoid'"]),
        ({"topk_method": "greedy"}, ["topk_method", "'greedy'", "'noaux_tc'"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq", "2"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ["rope", "'linear'", "yarn"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope", "'dynamic'"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, ["rope", "'llama3'"]),
    ],
    ids=str,
)
def test_what_would_give_wrong_text_is_unsupported(toy: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_config(toy, **changes)
    refused(toy, UnsupportedModelError, str(toy / "config.json"), *words)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"topk_method": "noaux_tc"}, "topk_method"),
    ],
)
def test_v2_has_its_own_choices(
    originals: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    folder = Path(shutil.copytree(originals("v2"), tmp_path / "v2"))
    edit_config(folder, **changes)
    refused(folder, UnsupportedModelError, word)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_size": "48"}, "hidden_size"),
        ({"hidden_size": 48.0}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 0}, "hidden"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "layers"),
        ({"vocab_size": 0}, "vocab"),
        ({"n_routed_experts": [16]}, "n_routed_experts"),
        ({"num_experts_per_tok": 0}, "0 experts"),
        ({"num_experts_per_tok": 17}, "17 experts"),
        ({"n_group": 3}, "3 groups"),
        ({"n_group": 0}, "0 groups"),
        ({"n_group": 16, "topk_group": 8}, "groups of 1"),
        ({"topk_group": 5}, "5 chosen"),
        ({"topk_group": 0}, "0 chosen"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"rms_norm_eps": NAN}, "rms_norm_eps"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": INF}, "rms_norm_eps"),
        ({"routed_scaling_factor": True}, "routed_scaling_factor"),
        ({"routed_scaling_factor": INF}, "routed_scaling_factor"),
        ({"routed_scaling_factor": 10**400}, "routed_scaling_factor"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob"),
        ({"bos_token_id": "<s>"}, "bos_token_id"),
        ({"eos_token_id": [1, True]}, "eos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "original_max_position_embeddings"),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 0}}, "YaRN"),
        (
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": "x"}},
            "original_max_position_embeddings",
        ),
        ({"rope_parameters": "yarn"}, "rope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": NAN}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 1}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": True}}, "rope_theta"),
        ({"rope_parameters": {**ROPE, "factor": 0.5}}, "factor"),
        ({"rope_parameters": {**ROPE, "factor": INF}}, "factor"),
        ({"rope_parameters": {**ROPE, "original_max_position_embeddings": 64.5}}, "original_max_position_embeddings"),
        ({"rope_parameters": {**ROPE, "beta_fast": 1, "beta_slow": 32}}, "beta_fast"),
        ({"rope_parameters": {**ROPE, "beta_slow": 0}}, "beta_slow"),
        ({"rope_parameters": {**ROPE, "beta_slow": -1}}, "beta_slow"),
        ({"rope_parameters": {**ROPE, "mscale": NAN}}, "mscale"),
        ({"rope_parameters": {**ROPE, "mscale_all_dim": "1"}}, "mscale_all_dim"),
        ({"rope_parameters": {**ROPE, "attention_factor": -1}}, "attention_factor"),
        ({"rope_parameters": {**ROPE, "truncate": 1}}, "truncate"),
        ({"quantization_config": "fp8"}, "quantization"),
    ],
    ids=str,
)
def test_malformed_config_names_the_file_and_the_field(toy: Path, changes: dict[str, Any], word: str) -> None:
    edit_config(toy, **changes)
    refused(toy, CheckpointError, str(toy / "config.json"), word)


@pytest.mark.parametrize(
    "name", ["hidden_size", "num_hidden_layers", "vocab_size", "n_routed_experts", "kv_lora_rank", "v_head_dim"]
)
def test_config_without_a_needed_field(toy: Path, name: str) -> None:
    drop_config(toy, name)
    refused(toy, CheckpointError, str(toy / "config.json"), name)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_config_that_is_no_object(toy: Path, text: str) -> None:
    (toy / "config.json").write_text(text)
    refused(toy, CheckpointError, str(toy / "config.json"))


def test_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, CheckpointError, str(tmp_path / "config.json"))


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_generation_config_that_is_no_object(toy: Path, text: str) -> None:
    (toy / "generation_config.json").write_text(text)
    refused(toy, CheckpointError, str(toy / "generation_config.json"))


# --- fp8

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def quantize(tensors: Tensors) -> None:
    """Make the attention's and the MLPs' matrices float8 with block scales, as DeepSeek-V3 is published."""
    for name in [n for n in tensors if "_proj" in n and n.endswith("weight")]:
        blocks = [-(-size // 128) for size in tensors[name].shape]
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.ones(blocks)


@pytest.fixture
def fp8(toy: Path) -> Path:
    rewrite(toy, quantize)
    edit_config(toy, quantization_config=FP8)
    return toy


def test_fp8_tensors_come_with_their_scales(fp8: Path) -> None:
    catalog = Catalog(fp8)
    places = catalog.record(ExpertKey(2, 5)).places
    assert set(places) == {p + s for p in ("gate_proj", "up_proj", "down_proj") for s in ("", ".scale")}
    assert (places["up_proj"].dtype, places["up_proj.scale"].dtype, places["up_proj.scale"].shape) == (
        "F8_E4M3",
        "F32",
        (1, 1),
    )
    assert places["up_proj"].nbytes == 24 * 48
    trunk = catalog.record(TrunkKey(1)).places
    assert "o_proj.scale" in trunk and "input_layernorm.scale" not in trunk
    assert catalog.ignored == []


def test_fp8_without_its_scale(fp8: Path) -> None:
    rewrite(fp8, drop(EXPERT + "_scale_inv"))
    refused(fp8, CheckpointError, str(fp8), EXPERT + "_scale_inv", "missing")


def test_fp8_with_a_scale_of_wrong_shape(fp8: Path) -> None:
    rewrite(fp8, lambda tensors: tensors.update({EXPERT + "_scale_inv": torch.ones(2, 1)}))
    refused(fp8, CheckpointError, EXPERT + "_scale_inv", "[2, 1]", "[1, 1]")


def test_fp8_with_a_scale_of_wrong_dtype(fp8: Path) -> None:
    rewrite(fp8, lambda tensors: tensors.update({EXPERT + "_scale_inv": torch.ones(1, 1).int()}))
    refused(fp8, UnsupportedModelError, EXPERT + "_scale_inv", "I32", "F32")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_fp8_where_it_is_not_supported(fp8: Path, name: str) -> None:
    rewrite(fp8, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    refused(fp8, UnsupportedModelError, name, "F8_E4M3")


def test_other_float8_is_unsupported(toy: Path) -> None:
    rewrite(toy, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(torch.float8_e5m2)}))
    refused(toy, UnsupportedModelError, EXPERT, "F8_E5M2")


# --- published configs

YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
ALL: dict[str, Any] = {
    **MLA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
V2_LITE: dict[str, Any] = {
    **ALL,
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
V2: dict[str, Any] = {
    **V2_LITE,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
V3: dict[str, Any] = {
    **ALL,
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": FP8,
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
KIMI_K2: dict[str, Any] = {
    **V3,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**V3["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
PUBLISHED = {"V2-Lite": V2_LITE, "V2": V2, "V3": V3, "Kimi-K2": KIMI_K2}


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return read_spec(config, "config.json")


def latent_of(spec: ModelSpec) -> Latent:
    """The attention of all layers."""
    (kind,) = {layer.attention for layer in spec.layers}
    assert isinstance(kind, Latent)
    return kind


def moe_of(spec: ModelSpec) -> Moe:
    assert spec.moe is not None
    return spec.moe


def dense_of(spec: ModelSpec) -> list[tuple[int, int]]:
    """Number and width of the dense layers."""
    layers = enumerate(layer.feed_forward for layer in spec.layers)
    return [(number, layer.width) for number, layer in layers if isinstance(layer, Dense)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_share_their_attention(name: str) -> None:
    config = copy.deepcopy(PUBLISHED[name])
    spec = spec_of(config)
    assert config == PUBLISHED[name]  # reading changes nothing
    latent = latent_of(spec)
    assert (latent.kv_rank, latent.nope_dim, latent.rope_dim, latent.value_dim) == (512, 128, 64, 128)
    assert latent.cache_width == 576 and spec.norm_eps == 1e-6 and not spec.tied_head
    assert latent.rope.interleaved and latent.rope.yarn is not None
    assert latent.rope.yarn.original_max_position == 4096 and latent.rope.yarn.truncate
    assert latent.rope.yarn.attention_factor is None
    assert spec.model_type == config["model_type"] and spec.max_position == config["max_position_embeddings"]


def test_published_v2_lite() -> None:
    spec = spec_of(V2_LITE)
    latent = latent_of(spec)
    assert (spec.vocab, spec.hidden, len(spec.layers), latent.heads, latent.q_rank) == (102400, 2048, 27, 16, None)
    assert spec.moe_layers == tuple(range(1, 27)) and dense_of(spec) == [(0, 10944)]
    assert (moe_of(spec).width, spec.experts) == (1408, 64)
    assert (spec.experts_per_token, moe_of(spec).shared_width) == (6, 2 * 1408)
    assert (spec.bos, spec.eos) == (100000, (100001,))
    router = moe_of(spec).router
    assert (router.score, router.groups, router.groups_chosen) == ("softmax", 1, 1)
    assert (router.normalize, router.scale) == (False, 1.0)
    yarn, theta = latent.rope.yarn, latent.rope.theta
    assert yarn is not None and theta == 10000.0
    assert (yarn.factor, yarn.beta_fast, yarn.beta_slow, yarn.mscale, yarn.mscale_all_dim) == (40, 32, 1, 0.707, 0.707)


def test_published_v2() -> None:
    spec = spec_of(V2)
    latent = latent_of(spec)
    assert (spec.hidden, len(spec.layers), latent.heads, latent.q_rank) == (5120, 60, 128, 1536)
    assert dense_of(spec) == [(0, 12288)] and moe_of(spec).width == 1536
    assert (spec.experts, spec.experts_per_token) == (160, 6)
    router = moe_of(spec).router
    assert (router.score, router.groups, router.groups_chosen) == ("softmax", 8, 3)
    assert (router.normalize, router.scale) == (False, 16.0)


def test_published_v3() -> None:
    spec = spec_of(V3)
    latent = latent_of(spec)
    assert (spec.vocab, spec.hidden, len(spec.layers), latent.heads, latent.q_rank) == (129280, 7168, 61, 128, 1536)
    assert spec.moe_layers == tuple(range(3, 61)) and dense_of(spec) == [(0, 18432), (1, 18432), (2, 18432)]
    assert (moe_of(spec).width, spec.experts) == (2048, 256)
    assert (spec.experts_per_token, moe_of(spec).shared_width) == (8, 2048)
    assert (spec.bos, spec.eos) == (0, (1,))
    router = moe_of(spec).router
    assert (router.score, router.groups, router.groups_chosen) == ("sigmoid", 8, 4)
    assert (router.normalize, router.scale) == (True, 2.5)
    yarn, theta = latent.rope.yarn, latent.rope.theta
    assert yarn is not None and theta == 10000.0
    assert (yarn.factor, yarn.beta_fast, yarn.beta_slow, yarn.mscale, yarn.mscale_all_dim) == (40, 32, 1, 1, 1)


def test_published_kimi_k2() -> None:
    spec = spec_of(KIMI_K2)
    latent = latent_of(spec)
    assert (spec.vocab, spec.hidden, len(spec.layers), latent.heads, latent.q_rank) == (163840, 7168, 61, 64, 1536)
    assert spec.moe_layers == tuple(range(1, 61))
    assert (spec.experts, spec.experts_per_token, moe_of(spec).shared_width, moe_of(spec).width) == (384, 8, 2048, 2048)
    assert (spec.bos, spec.eos) == (163584, (163585,))
    router = moe_of(spec).router
    assert (router.score, router.groups, router.groups_chosen) == ("sigmoid", 1, 1)
    assert (router.normalize, router.scale) == (True, 2.827)
    yarn, theta = latent.rope.yarn, latent.rope.theta
    assert yarn is not None and theta == 50000.0
    assert (yarn.factor, yarn.beta_fast, yarn.beta_slow) == (32.0, 1.0, 1.0)


def test_published_shapes_of_tensors() -> None:
    """Names as in the published model.safetensors.index.json files, shapes as in their headers."""
    lite, v3, deepseek = spec_of(V2_LITE), spec_of(V3), FAMILIES["deepseek_v3"]
    trunk = deepseek.trunk_tensors(lite, TrunkKey(1))
    assert trunk["q_proj"] == ("model.layers.1.self_attn.q_proj.weight", (3072, 2048)) and "q_a_proj" not in trunk
    assert trunk["kv_a_proj"] == ("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", (576, 2048))
    assert trunk["up_proj"] == ("model.layers.1.mlp.shared_experts.up_proj.weight", (2816, 2048))
    assert deepseek.trunk_tensors(lite, TrunkKey(0))["up_proj"] == ("model.layers.0.mlp.up_proj.weight", (10944, 2048))
    assert not any(role.endswith((".correction", "bias")) for role in deepseek.resident_tensors(lite))
    trunk = deepseek.trunk_tensors(v3, TrunkKey(3))
    assert trunk["q_a_proj"] == ("model.layers.3.self_attn.q_a_proj.weight", (1536, 7168)) and "q_proj" not in trunk
    assert trunk["q_b_proj"] == ("model.layers.3.self_attn.q_b_proj.weight", (24576, 1536))
    assert trunk["kv_b_proj"] == ("model.layers.3.self_attn.kv_b_proj.weight", (32768, 512))
    assert trunk["o_proj"] == ("model.layers.3.self_attn.o_proj.weight", (7168, 16384))
    resident = deepseek.resident_tensors(v3)
    assert resident["3.router"] == ("model.layers.3.mlp.gate.weight", (256, 7168)) and "2.router" not in resident
    assert resident["3.correction"] == ("model.layers.3.mlp.gate.e_score_correction_bias", (256,))
    expert = deepseek.expert_tensors(v3, ExpertKey(60, 255))
    assert expert["down_proj"] == ("model.layers.60.mlp.experts.255.down_proj.weight", (7168, 2048))


@pytest.mark.parametrize("name", ["v2-yarn", "v3-yarn", "v3", "v2-grouped"])
def test_both_dialects_of_rope_say_the_same(originals: Callable[[str], Path], name: str) -> None:
    """transformers 5 writes rope_parameters; published models have rope_theta and rope_scaling."""
    config = json.loads((originals(name) / "config.json").read_text())
    table = dict(config.pop("rope_parameters"))
    published = config | {"rope_theta": table.pop("rope_theta")}
    kind = table.pop("rope_type")
    published["rope_scaling"] = {**table, "type": kind} if kind == "yarn" else None
    assert spec_of(published) == Catalog(originals(name)).spec
    assert (latent_of(spec_of(published)).rope.yarn is not None) == name.endswith("yarn")


def test_v2_normalized_weights_are_not_scaled() -> None:
    """As in V2's published modeling_deepseek.py; V3 normalizes and scales."""
    assert moe_of(spec_of({**V2, "norm_topk_prob": True})).router.scale == 1.0
    assert moe_of(spec_of({**V2, "norm_topk_prob": True})).router.normalize
    assert moe_of(spec_of({**V3, "norm_topk_prob": False})).router.scale == 2.5


def test_v2_greedy_has_no_groups_whatever_the_config_says() -> None:
    router = moe_of(spec_of({**V2_LITE, "n_group": 8, "topk_group": 3})).router
    assert (router.groups, router.groups_chosen) == (1, 1)


# --- model names


def test_model_is_found_by_folder(tmp_path: Path) -> None:
    assert find_model(tmp_path) == find_model(str(tmp_path)) == tmp_path
    assert find_model("demo").name == "demo"


@pytest.mark.parametrize("model", ["no-such-model", "a/b/c", "./a/b", "../b", "~/model", "a b/c", "/no/such"])
def test_model_that_is_neither_folder_nor_id(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_model(model)


@pytest.mark.parametrize(
    ("file", "kind"),
    [("pytorch_model.bin", "pickle"), ("m.pth", "pickle"), ("m.onnx", "ONNX")],
)
def test_weights_of_other_tools_are_named(file: str, kind: str, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    (tmp_path / file).touch()
    for model in (tmp_path, tmp_path / file):
        for find in (find_model, find_config):
            with pytest.raises(UnsupportedModelError, match=rf"{file}: expected .* GGUF file, found an? {kind}"):
                find(str(model))
    (toy / file).touch()
    assert find_model(toy) == toy, "beside safetensors, others do no harm"


def test_model_that_is_a_file(toy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*found another file"):
        find_model(toy / "model.safetensors")
