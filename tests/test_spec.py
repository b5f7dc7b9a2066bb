"""Keys that each name one thing, and specs that say what a layer is."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from tests.toys import settings_of
from tierlm import UnsupportedModelError
from tierlm.attention_spec import Grouped, Latent, Rope
from tierlm.errors import CheckpointError
from tierlm.models import FAMILIES, read_spec
from tierlm.models.outline import Outline, sizes_of
from tierlm.planning.known import find_config
from tierlm.planning.plan import make_plan
from tierlm.spec import (
    Dense,
    ExpertKey,
    HeadKey,
    Key,
    LayerSpec,
    ModelSpec,
    Moe,
    ResidentKey,
    RouterSpec,
    TrunkKey,
    same_layer,
)

ROPE = Rope(10000.0, False)
MOE = Moe(8, 2, 16, 0, RouterSpec("softmax"))
GROUPED = Grouped(4, 2, 8, ROPE)


def model_of(*layers: LayerSpec) -> ModelSpec:
    return ModelSpec("qwen3_moe", 100, 32, layers, 1e-6, 64, None, (), False)


def test_keys_of_equal_numbers_are_different_keys_with_names() -> None:
    keys: list[Key] = [ExpertKey(0, 0), TrunkKey(0), HeadKey(0), ResidentKey()]
    assert all(one != other for one, other in combinations(keys, 2)) and len(set(keys)) == 4
    assert list(map(str, keys)) == [
        "expert 0 of layer 0",
        "trunk of layer 0",
        "block 0 of the lm_head",
        "resident tensors",
    ]


def test_only_experts_share_a_layer() -> None:
    assert same_layer(ExpertKey(1, 2), ExpertKey(1, 3)) and not same_layer(ExpertKey(1, 2), ExpertKey(2, 2))
    assert not same_layer(TrunkKey(1), ExpertKey(1, 0)) and not same_layer(HeadKey(0), HeadKey(0))


def test_moe_layers_stand_anywhere_and_are_alike() -> None:
    moe, dense = LayerSpec(GROUPED, MOE), LayerSpec(GROUPED, Dense(24))
    spec = model_of(moe, dense, dense, moe)
    assert (spec.moe_layers, spec.experts, spec.experts_per_token, spec.moe) == ((0, 3), 8, 2, MOE)
    assert model_of(dense).moe is None and model_of(dense).moe_layers == ()
    with pytest.raises(ValueError, match="MoE layers must be alike, found 2 kinds"):
        model_of(moe, LayerSpec(GROUPED, Moe(8, 3, 16, 0, RouterSpec("softmax"))))


def test_layers_of_different_attention_each_have_their_own_width() -> None:
    latent = Latent(4, None, 16, 8, 4, 8, ROPE)
    spec = model_of(LayerSpec(latent, MOE), LayerSpec(GROUPED, MOE))
    assert spec.cache_width == (16 + 4) + 2 * 2 * 8 and spec.expanded_width == 4 * (8 + 4 + 8) + 2 * 2 * 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 4}, "6 heads cannot share 4"),
        ({"head_dim": 15}, "a head's rotated dimensions must be even"),
        ({"num_experts_per_tok": 17}, "17 experts a token"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected a whole number from 0 to 4096"),
        ({"num_experts": 10**9}, "num_experts: expected a whole number from 0 to 4096"),
        ({"num_hidden_layers": 4096, "num_experts": 4096}, "expected at most 262144 experts in all"),
        ({"num_hidden_layers": 10**4000}, "num_hidden_layers: expected .*found 1000"),
        ({"intermediate_size": 0, "mlp_only_layers": [0]}, "width must be at least 1"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: expected a list of int, found 3"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers: expected a list of int, found '0'"),
    ],
)
def test_sizes_that_no_model_has(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"here: {words}"):
        read_spec(settings_of("qwen3", **changes), "here")


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"use_sliding_window": True}, {"hidden_act": "gelu"}])
def test_what_qwen3_would_compute_wrong(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=next(iter(changes))):
        read_spec(settings_of("qwen3", **changes), "here")


def test_stacked_experts_of_gpt_oss() -> None:
    """As published; without quantisation, matrices are transposed."""
    found = find_config("gpt-oss-20b")
    spec, family = read_spec(found.config, found.where), FAMILIES["gpt_oss"]
    roles = family.resident_tensors(spec), FAMILIES["deepseek_v3"].resident_tensors(spec)
    assert all("0.router_bias" in each and "0.correction" not in each for each in roles)
    name = "model.layers.3.mlp.experts.7."
    expected = {"gate_up_proj": (5760, 2880), "gate_up_proj_bias": (5760,), "down_proj": (2880, 2880)}
    expected["down_proj_bias"] = (2880,)
    tensors = dict(family.expert_tensors(spec, ExpertKey(3, 7)).values())
    assert tensors == {name + role: shape for role, shape in expected.items()}
    plain = read_spec({**found.config, "quantization_config": None}, found.where)
    assert family.expert_tensors(plain, ExpertKey(3, 7))["gate_up_proj"] == (name + "gate_up_proj", (2880, 5760))
    sizes = sizes_of(Outline(found.config, found.where), 4096, 512, 4)
    assert make_plan(sizes, ram=32 * 2**30, vram=None, process=0, min_slots=4).ram.expert_slots > 0
