"""What a config alone tells about a model: published sizes and parameter counts, and the engine's own plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys import make_toy

from tierlm import LLM, Budget, CheckpointError, UnsupportedModelError, UsageError
from tierlm.checkpoints.hub import DEMO
from tierlm.config import RuntimeOptions
from tierlm.host import process_ram
from tierlm.models.catalog import Catalog
from tierlm.models.outline import Outline, kv_dtype_of, sizes_of, work_of
from tierlm.models.packing import pack_model
from tierlm.planning.known import find_config, known_models
from tierlm.planning.mixtures import MIXTURES, bits_of
from tierlm.planning.plan import SLACK, make_plan
from tierlm.spec import ResidentKey

# Billions of parameters, total and active, from the models' cards. (Publishers count active ones with or without
# embedding and head, and round them, hence the loose bounds. Those of GLM count the prediction layer and no embedding.
# Qwen3-Next's says 79 without embedding and head, Qwen3.5's 35.)
PUBLISHED = {
    "DeepSeek-V2-Lite": (15.7, 2.4),
    "DeepSeek-V2": (236, 21),
    "DeepSeek-V3": (671, 37),
    "DeepSeek-R1": (671, 37),
    "DeepSeek-V3.2": (671, 37),
    "Kimi-K2": (1026, 32),
    "Qwen3-30B-A3B": (30.5, 3.3),
    "Qwen3-235B-A22B": (235, 22),
    "Mixtral-8x7B": (46.7, 12.9),
    "Mixtral-8x22B": (140.6, 39.1),
    "gpt-oss-20b": (20.9, 3.6),
    "gpt-oss-120b": (116.8, 5.1),
    "GLM-4.7-Flash": (30, 3),
    "GLM-4.5-Air": (106, 12),
    "GLM-4.5": (355, 32),
    "GLM-4.6": (355, 32),
    "GLM-5": (744, 40),
    "MiniMax-M2": (229, 10),
    "OLMoE-1B-7B": (6.92, 1.3),
    "Qwen1.5-MoE-A2.7B": (14.3, 2.7),
    "Gemma-4-26B-A4B": (25.2, 3.8),
    "Qwen3-Next-80B-A3B": (79.6, 3.3),
    "Qwen3.5-35B-A3B": (35, 3),
}


def outline(name: str, format: str | None = None) -> Outline:
    found = find_config(name)
    return Outline(found.config, found.where, format)


@pytest.mark.parametrize("name", known_models())
def test_known_models_have_as_many_parameters_as_published(name: str) -> None:
    of = outline(name, "bf16")
    work, spec = work_of(of), of.spec
    experts = work.moe_layers * work.experts * work.expert_weights
    total = experts + work.shared_weights + work.trunk_weights
    total += (1 if spec.tied_head else 2) * spec.vocab * spec.hidden
    billions, active = PUBLISHED[name]
    assert total / 1e9 == pytest.approx(billions, rel=0.01 if name.startswith(("GLM", "Qwen3.5")) else 0.005)
    assert work.active_weights / 1e9 == pytest.approx(active, rel=0.1, abs=0.6)


# Bytes of all tensors, as the models' index files state them.
INDEXED = {
    "DeepSeek-V2-Lite": 31412968448,
    "Qwen3-30B-A3B": 61064245248,
    "Qwen3-235B-A22B": 470187269120,
    "Mixtral-8x7B": 93405585408,
    "Mixtral-8x22B": 281241268224,
    "gpt-oss-20b": 13761264768,
    "gpt-oss-120b": 65248815744,
    "OLMoE-1B-7B": 13838323712,
    "Qwen1.5-MoE-A2.7B": 28631568384,
}
# Bytes of the files. MiniMax-M2's in bfloat16 are converted from fp8.
FILES = {
    ("DeepSeek-V3", None): 688586727753,
    ("DeepSeek-R1", None): 688586727753,
    ("GLM-4.7-Flash", None): 62e9,
    ("GLM-4.5-Air", None): 220.5e9,
    ("MiniMax-M2", "bf16"): 458e9,
}
GGUF = {  # of files as Q4_K_M, without layers for multi-token prediction
    "DeepSeek-V2-Lite": 10364416736,
    "DeepSeek-V3": 404e9,
    "GLM-4.7-Flash": 18312339776,
    "OLMoE-1B-7B": 4213511776,
    "Qwen1.5-MoE-A2.7B": 9.5e9,
    "Qwen3-30B-A3B": 18556685824,
}


@pytest.mark.parametrize("name", INDEXED)
def test_bytes_are_those_of_published_indices(name: str) -> None:
    assert outline(name).file_bytes == INDEXED[name]


@pytest.mark.parametrize(("name", "format"), FILES)
def test_bytes_agree_with_published_files(name: str, format: str | None) -> None:
    assert outline(name, format).file_bytes == pytest.approx(FILES[name, format], rel=0.01)


@pytest.mark.parametrize("name", GGUF)
def test_bytes_agree_with_published_gguf_files(name: str) -> None:
    assert outline(name, "q4_k_m").used_bytes == pytest.approx(GGUF[name], rel=0.02)


def test_the_parts_sum_to_the_whole() -> None:
    for format in MIXTURES:
        of = outline("DeepSeek-V2-Lite", format)
        parts = sum(of.size(key) for key in [*of.trunks, *of.experts(), ResidentKey()])
        embedding = of.spec.vocab * of.spec.hidden * bits_of(MIXTURES[format].embedding, of.spec.hidden) / 8
        assert parts + embedding == pytest.approx(of.used_bytes, rel=0.003)


def test_formats_of_files_and_of_configs(tmp_path: Path) -> None:
    assert Catalog(DEMO).formats == ("bf16", "bf16", "bf16")
    pack_model(DEMO, tmp_path / "packed", experts="int4", trunk="int8")
    assert work_of(Catalog(tmp_path / "packed")).formats == ("int4", "int8", "int8")
    for format in MIXTURES:
        assert outline("DeepSeek-V3", format).formats.experts == format
    assert outline("DeepSeek-V3", "int4").formats == ("int4", "int8", "int8")
    assert work_of(outline("DeepSeek-V3")).formats == ("fp8", "fp8", "bf16")


def test_latents_against_keys_and_values() -> None:
    spec = outline("DeepSeek-V3").spec
    assert (spec.cache_width, spec.expanded_width) == (61 * 576, 61 * 128 * (128 + 64 + 128))
    spec = outline("Qwen3-30B-A3B").spec
    assert spec.cache_width == spec.expanded_width == 48 * 2 * 4 * 128


@pytest.mark.parametrize("folder", ["demo", "v2-q-lora", "v3"])
def test_the_outline_of_a_config_matches_the_files(folder: str, tmp_path: Path) -> None:
    """Sizes from the config differ from the files' only by the pages at the ends of each piece."""
    if folder == "demo":
        path = DEMO
    else:
        make_toy(folder, tmp_path)
        path = tmp_path
    of, catalog = Outline(json.loads((path / "config.json").read_text()), "", "bf16"), Catalog(path)
    wide = 2 if folder == "demo" else 4  # the toys are float32
    assert of.trunks == catalog.trunks and of.experts() == catalog.experts()
    for key in (*of.trunks, *of.experts(), ResidentKey()):
        places = catalog.record(key).places.values()
        exact = sum(place.nbytes for place in places) * 2 // wide
        assert exact <= of.size(key) <= exact + 3 * 4096


@pytest.mark.parametrize("model", ["demo", "toy"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_slots_predicted_are_slots_got(model: str, share: float, toy_v3: tuple[Path, Any]) -> None:
    """The engine and ``tierlm plan`` divide a budget alike, given the same files and library size; from the config
    alone, except for the pages that it cannot know."""
    folder = DEMO if model == "demo" else toy_v3[0]
    sizes = sizes_of(Catalog(folder), 128, 512, 4)
    room = sum(sizes.trunk.values()) + int(share * sizes.experts * sizes.expert)
    libraries = process_ram() + 64 * 2**20
    ram = libraries + SLACK + sizes.logits + sizes.kv + sizes.workspace + sizes.resident + room
    with LLM.load(folder, budget=Budget(ram), context=128, heat=False) as llm:
        got = llm.stats().plan
    same = {"ram": ram, "vram": None, "process": got.ram.parts["interpreter and libraries"], "min_slots": 4}
    assert make_plan(sizes, **same) == got
    config = json.loads((folder / "config.json").read_text())
    predicted = make_plan(sizes_of(Outline(config, "", "bf16"), 128, 512, 4), **same).ram
    if model == "demo":  # the toy is float32, unlike published models
        assert predicted.expert_slots == pytest.approx(got.ram.expert_slots, rel=0.06)
        assert predicted.trunk == got.ram.trunk


def test_what_cannot_be_planned_for(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="model_type 'mamba' is not supported"):
        Outline({"model_type": "mamba"}, "x")
    with pytest.raises(UsageError, match="format: expected one of bf16"):
        outline("DeepSeek-V3", "int3")
    with pytest.raises(CheckpointError, match="no such folder or file, and no known model"):
        find_config("DeepSeek-V17")
    with pytest.raises(CheckpointError, match="hidden_size: expected a whole number, found None"):
        Outline({"model_type": "mixtral", "num_attention_heads": 4}, "x")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="readable JSON"):
        find_config(str(tmp_path / "config.json"))


def test_names_of_models(tmp_path: Path) -> None:
    assert find_config("deepseek-ai/deepseek-r1").name == "DeepSeek-R1"
    assert find_config("demo").path == DEMO
    (tmp_path / "config.json").write_text(json.dumps(known_models()["Mixtral-8x7B"]["config"]))
    (tmp_path / "pytorch_model.bin").touch()  # a plan needs no weights
    assert find_config(str(tmp_path)).path is None
    for named in (find_config(str(tmp_path)), find_config(str(tmp_path / "config.json"))):
        assert Outline(named.config, named.where).spec.experts == 8


@pytest.mark.parametrize(("format", "rounds"), [("bf16", False), ("fp8", False), ("int4", True), ("q4_k_m", True)])
def test_a_cache_is_bfloat16_where_products_round_anyway(format: str, rounds: bool) -> None:
    outline = Outline(known_models()["DeepSeek-V2-Lite"]["config"], "here", format)
    assert kv_dtype_of(outline, RuntimeOptions()) == ("bfloat16" if rounds else "float32")
    assert kv_dtype_of(outline, RuntimeOptions(exact=True)) == "float32"
    for dtype in ("float32", "bfloat16"):
        assert kv_dtype_of(outline, RuntimeOptions(kv_dtype=dtype)) == dtype
