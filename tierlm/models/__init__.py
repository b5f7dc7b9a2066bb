"""The model families, and their arithmetic. No torch in this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tierlm.errors import CheckpointError, UnsupportedModelError, UsageError, shown
from tierlm.models.config_reader import Config
from tierlm.models.deepseek import DeepSeek
from tierlm.models.family import Family
from tierlm.models.gemma3 import Gemma3
from tierlm.models.gemma4 import Gemma4
from tierlm.models.glm4_moe import Glm4Moe
from tierlm.models.gpt_oss import GptOss
from tierlm.models.llama import Llama
from tierlm.models.minimax_m2 import MiniMaxM2
from tierlm.models.mixtral import Mixtral
from tierlm.models.olmoe import Olmoe
from tierlm.models.quantization import published
from tierlm.models.qwen2_moe import Qwen2Moe
from tierlm.models.qwen3_moe import Qwen3Moe
from tierlm.models.qwen3_next import Qwen3Next
from tierlm.spec import ModelSpec

FAMILIES: dict[str, Family] = {  # by model_type
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe_lite", "glm_moe_dsa"), DeepSeek()
    ),
    **dict.fromkeys(("qwen3_moe", "qwen3_vl_moe_text"), Qwen3Moe()),
    "qwen2_moe": Qwen2Moe(),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text", "qwen3_5_text"), Qwen3Next()),
    "mixtral": Mixtral(),
    "olmoe": Olmoe(),
    **dict.fromkeys(("glm4_moe", "glm4v_moe_text"), Glm4Moe()),
    "minimax_m2": MiniMaxM2(),
    **dict.fromkeys(("llama", "mistral", "qwen3", "qwen3_vl_text"), Llama()),
    "gpt_oss": GptOss(),
    "gemma3_text": Gemma3(),
    "gemma4_text": Gemma4(),
}


def family_of(model_type: object, where: str) -> Family:
    """The family of a ``config.json``'s model_type. Raises UnsupportedModelError, listing the supported ones."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"{where}: model_type {shown(model_type)} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return family


def read_spec(config: Mapping[str, Any], where: str, mtp: bool = False) -> ModelSpec:
    """The ModelSpec of a ``config.json``. ``mtp``: with its first layer of multi-token prediction. Raises
    UnsupportedModelError and CheckpointError, naming ``where``; UsageError if there is no such layer."""
    family = family_of(config.get("model_type"), where)
    try:
        published(fields := Config(config, where))  # refuses other quantisation, which would give wrong text
        spec = family.read_spec(fields)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if mtp and not fields.number("num_nextn_predict_layers", default=0):
        raise UsageError(
            "speculation: mtp needs a layer of multi-token prediction: expected num_nextn_predict_layers of at least 1 "
            f"in {where}, found none; use lookup"
        )
    return replace(spec, layers=(*spec.layers, spec.layers[-1]), mtp=True) if mtp else spec
