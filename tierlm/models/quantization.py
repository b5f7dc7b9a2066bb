"""Which quantised checkpoints can be read, by the ``quantization_config`` of a ``config.json``. No torch.

The tensors tell the format of each weight (``formats.recognise``). What is refused here has other tensors, or the same
tensors with another meaning. Quantisation of activations and of the KV cache is ignored: activations stay in float32.
"""

from __future__ import annotations

from typing import Any

from tierlm.errors import UnsupportedModelError, shown
from tierlm.formats import FORMATS
from tierlm.models.config_reader import Fields
from tierlm.planning.mixtures import MIXTURES, Mixture

READ = (
    "fp8 (blocks of [128, 128], or one scale), fbgemm_fp8, mxfp4, modelopt (NVFP4, FP8), awq (gemm) and gptq of 4 bits "
    "in groups of 32, 64 or 128, and compressed-tensors (pack-quantized: symmetric int4 in the same groups; "
    "nvfp4-pack-quantized; mxfp4-pack-quantized; float-quantized: fp8 by tensor, channel or block)"
)
MODELOPT = {"NVFP4": "nvfp4", "FP8": "fp8_whole"}
FP8_STRATEGIES = {"tensor": "fp8_whole", "channel": "fp8_rows", "block": "fp8_blocks"}
BLOCK = [128, 128]


def published(config: Fields) -> Mixture:
    """The formats stated by a config. Raises UnsupportedModelError, CheckpointError."""
    stated = config.part("quantization_config")
    if not stated.fields:
        return MIXTURES["bf16"]
    method, found = stated.get("quant_method"), None
    if method == "fp8" and stated.get("weight_block_size", BLOCK) == BLOCK:
        found = "fp8" if stated.get("weight_block_size") else "fp8_whole"
    elif method == "mxfp4":
        return MIXTURES["mxfp4"]
    elif method == "fbgemm_fp8":
        found = "fp8_rows"
    elif method == "modelopt":
        algorithm = stated.get("quant_algo")
        found = MODELOPT.get(algorithm) if isinstance(algorithm, str) else None
    elif method == "awq":
        found = _awq(stated)
    elif method == "gptq":
        found = _gptq(stated)
    elif method == "compressed-tensors":
        found = _compressed_tensors(stated)
    if found is None:
        details = {name: value for name, value in stated.fields.items() if name in _TELLING}
        raise UnsupportedModelError(
            f"{config.where}: quantization {shown(method)} with {shown(details)} is not supported; supported are {READ}"
        )
    kept = any("attn" in name or "attention" in name for name in _ignored(stated))
    return Mixture(found, "bf16" if kept else found, "bf16", "bf16")


_TELLING = (
    "weight_block_size",
    "quant_algo",
    "format",
    "config_groups",
    "transform_config",
    "bits",
    "group_size",
    "version",
    "zero_point",
    "checkpoint_format",
)


def _ignored(stated: Fields) -> list[str]:
    """Names or patterns of the modules that are not quantised."""
    fields = "ignore", "exclude_modules", "modules_to_not_convert"
    excluded = [name for name in stated.part("dynamic").fields if name.startswith("-:")]  # gptq
    return excluded + [name for field in fields for name in stated.listed(field, str)]


def _awq(stated: Fields) -> str | None:
    layout, zeros = stated.get("version", stated.get("format", "gemm")), stated.get("zero_point", True)
    return _in_groups("awq", stated) if str(layout).lower() == "gemm" and zeros is True else None


def _gptq(stated: Fields) -> str | None:
    some = stated.part("dynamic")  # patterns of modules -> what differs in them
    if any(part.flag("desc_act", default=False) for part in (stated, *map(some.part, some.fields))):
        raise UnsupportedModelError(
            f"{stated.where}: gptq with desc_act is not supported: the columns of a group are not neighbours (g_idx), "
            "so each column looks up its scale; choose a checkpoint with desc_act false, or another quantization"
        )
    layouts: dict[Any, str] = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
    written = str(stated.get("checkpoint_format", "gptq"))
    return _in_groups(layouts[written], stated) if written in layouts else None


def _in_groups(name: str, stated: Fields) -> str | None:
    """The format of 4 bits in the groups of awq and gptq."""
    found = f"{name}_g{stated.get('group_size')}"
    return found if stated.get("bits", stated.get("w_bit")) == 4 and found in FORMATS else None


def _compressed_tensors(stated: Fields) -> str | None:
    """The format of all groups of a compressed-tensors checkpoint; None if it cannot be read."""
    groups = stated.part("config_groups")
    found = {_group(stated, groups.part(name)) for name in groups.fields}
    rotated = stated.part("transform_config").fields  # weights and activations are rotated
    return found.pop() if len(found) == 1 and not rotated else None


def _group(stated: Fields, group: Fields) -> str | None:
    weights = group.part("weights")
    kind = weights.get("type"), weights.get("num_bits"), weights.get("symmetric"), weights.get("strategy")
    written: Any = group.get("format", stated.get("format"))
    if written == "pack-quantized" and kind == ("int", 4, True, "group"):
        name = f"int4_g{weights.get('group_size')}"
        ordered = weights.get("actorder") not in (None, False, "static", "weight")  # columns are permuted
        return name if name in ("int4_g32", "int4_g64", "int4_g128") and not ordered else None
    if written == "mxfp4-pack-quantized" and kind == ("float", 4, True, "group"):
        return "mxfp4_ct" if weights.get("group_size") == 32 else None
    if written == "nvfp4-pack-quantized" and kind == ("float", 4, True, "tensor_group"):
        return "nvfp4_ct" if weights.get("group_size") == 16 else None
    if written in ("float-quantized", "naive-quantized") and kind[:3] == ("float", 8, True):
        found = FP8_STRATEGIES.get(str(kind[3]))
        return None if found == "fp8_blocks" and weights.get("block_structure") != BLOCK else found
    return None
