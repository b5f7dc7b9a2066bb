"""GGUF twins of toy models, written with the `gguf` library as convert_hf_to_gguf.py writes them: experts stacked, the
rows of q and k of Llama and Mixtral reordered, kv_b_proj of DeepSeek in one piece or in two, value heads of Qwen3.5
reordered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel

Array = NDArray[Any]
ARCHITECTURES = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm_moe_dsa": "glm-dsa",
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "llama": "llama",
    "qwen3": "qwen3",
    "glm4_moe_lite": "deepseek2",
    "glm4_moe": "glm4moe",
    "minimax_m2": "minimax-m2",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "gpt_oss": "gpt-oss",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_5_text": "qwen35",
}
SHORT = {  # config.json -> key of the metadata
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_experts_per_tok": "expert_used_count",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "sliding_window": "attention.sliding_window",
    "index_n_heads": "attention.indexer.head_count",
    "index_head_dim": "attention.indexer.key_length",
    "index_topk": "attention.indexer.top_k",
    "top_k_experts": "expert_used_count",
    "final_logit_softcapping": "final_logit_softcapping",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
DELTA = ("qwen3next", "qwen35", "qwen35moe")


def write_gguf(
    folder: Path,
    file: Path,
    kind: Type = Type.F32,
    split_kv_b: bool = True,
    extra: Any = None,
    architecture: str = "",
    merges: list[str] | None = None,
    **metadata: Any,
) -> None:
    """Write the model in ``folder`` to ``file``. Matrices are of type ``kind`` where their rows allow it.

    ``extra``: more vectors, by their names. ``architecture``: another than its model_type's. ``merges``: of the
    tokenizer, which llama.cpp cannot do without. ``metadata``: more, for the architecture; keys with ``__`` for ``.``.
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    architecture = architecture or ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(file, architecture)
    _describe(writer, architecture, config, split_kv_b, metadata)
    if merges is not None:
        writer.add_token_merges(merges)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config["num_hidden_layers"]
    )
    for name, tensor in _converted(tensors, config, architecture, split_kv_b):
        found = names.get_name(name, try_suffixes=(".weight", ".bias", ".scale"))
        assert found is not None, name
        own = Type.F32 if tensor.ndim == 1 or "ffn_gate_inp" in found or "ssm_conv1d" in found else kind
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[own][0]:
            own = Type.F16
        writer.add_tensor(found, gguf.quants.quantize(tensor, own), raw_dtype=own)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _converted(
    tensors: dict[str, Array], config: dict[str, Any], architecture: str, split_kv_b: bool
) -> list[tuple[str, Array]]:
    found: dict[str, Array] = {}
    stacks: dict[str, dict[int, Array]] = {}
    heads = config["num_attention_heads"]
    for name, tensor in tensors.items():
        if architecture == "gemma4":
            name = name.replace(".router.scale", ".router.proj.scale")
            name = name.replace(".router.per_expert_scale", ".experts.down_proj.scale")
            if name.endswith(("layer_scalar", "experts.gate_up_proj", "experts.down_proj")):
                name += ".weight"
        elif ".experts." in name and architecture != "gpt-oss":
            before, after = name.split(".experts.")
            number, _, rest = after.partition(".")
            stacks.setdefault(f"{before}.experts.{rest}", {})[int(number)] = tensor
            continue
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            own = heads if name.endswith("q_proj.weight") else config["num_key_value_heads"]
            rows, columns = tensor.shape
            tensor = tensor.reshape(own, 2, rows // own // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        if architecture in DELTA:
            found |= _delta(name, tensor, config, tiled=architecture != "qwen3next")
            continue
        if name.endswith(".sinks"):
            name += ".weight"
        if name.endswith("shared_expert_gate.weight"):
            tensor = tensor[0]
        if architecture == "gpt-oss" and ".experts.gate_up_proj" in name:  # transposed, gate and up interleaved
            rows = tensor if name.endswith("bias") else tensor.swapaxes(1, 2)
            stem, ending = name.split("gate_up_proj")
            for at, part in enumerate(("gate_proj", "up_proj")):
                kind = ".bias" if ending else ".weight"
                found[f"{stem}{part}{kind}"] = np.ascontiguousarray(rows[:, at::2])
            continue
        if architecture == "gpt-oss" and ".experts.down_proj" in name:
            stem, ending = name.split("down_proj")
            found[f"{stem}down_proj{'.bias' if ending else '.weight'}"] = (
                tensor if ending else np.ascontiguousarray(tensor.swapaxes(1, 2))
            )
            continue
        if name.endswith("kv_b_proj.weight") and split_kv_b:
            halves = tensor.reshape(heads, -1, tensor.shape[-1])
            nope = config["qk_nope_head_dim"]
            found[name.replace("kv_b", "k_b")] = np.ascontiguousarray(halves[:, :nope].swapaxes(1, 2))
            found[name.replace("kv_b", "v_b")] = np.ascontiguousarray(halves[:, nope:])
            continue
        found[name.replace("e_score_correction_bias", "e_score_correction.bias")] = tensor
    found |= {name: np.stack([parts[at] for at in range(len(parts))]) for name, parts in stacks.items()}
    return list(found.items())


def _delta(name: str, tensor: Array, config: dict[str, Any], tiled: bool) -> list[tuple[str, Array]]:
    """A tensor of Qwen3-Next or Qwen3.5. ``tiled``: value heads go from "by key head" to "by turns"."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_rows, share = keys * config["linear_key_head_dim"], values // keys
    if name.endswith("shared_expert_gate.weight"):
        tensor = tensor[0]
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        tensor = tensor + 1
    if "linear_attn" not in name or name.endswith("norm.weight"):
        return [(name, tensor)]
    if name.endswith("A_log"):
        tensor = -np.exp(tensor)
    if name.endswith("conv1d.weight"):
        tensor = tensor[:, 0]
    if "in_proj_qkvz" in name:
        by_head = tensor.reshape(keys, -1, tensor.shape[1])
        sizes = np.cumsum([config["linear_key_head_dim"]] * 2 + [share * config["linear_value_head_dim"]])
        *mixed, gate = (part.reshape(-1, tensor.shape[1]) for part in np.split(by_head, sizes, axis=1))
        return [(name.replace("qkvz", "qkv"), np.concatenate(mixed)), (name.replace("qkvz", "z"), gate)]
    if tiled:
        first = 2 * key_rows if "qkv" in name or "conv1d" in name else 0
        rows = tensor.T if "out_proj" in name else tensor
        heads = rows[first:].reshape(keys, share, -1, *rows.shape[1:])
        rows = np.concatenate((rows[:first], heads.swapaxes(0, 1).reshape(rows[first:].shape)))
        tensor = np.ascontiguousarray(rows.T if "out_proj" in name else rows)
    return [(name.replace("dt_bias", "dt_proj.bias"), tensor)]


def _describe(
    writer: gguf.GGUFWriter, architecture: str, config: dict[str, Any], split_kv_b: bool, more: dict[str, Any]
) -> None:
    def add(key: str, value: Any) -> None:
        full = f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_string(full, value)

    for field, key in SHORT.items():
        if config.get(field) is not None and (architecture, field) != ("gemma4", "num_key_value_heads"):
            add(key, config[field])
    add("attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    add("rope.freq_base", float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "yarn":
        add("rope.scaling.type", "yarn")
        add("rope.scaling.factor", float(rope["factor"]))
        add("rope.scaling.original_context_length", rope["original_max_position_embeddings"])
        add("rope.scaling.yarn_beta_fast", float(rope.get("beta_fast", 32)))
        add("rope.scaling.yarn_beta_slow", float(rope.get("beta_slow", 1)))
        if "mscale_all_dim" in rope:
            add("rope.scaling.yarn_log_multiplier", 0.1 * rope["mscale_all_dim"])
    elif rope.get("rope_type") == "linear":
        add("rope.scaling.type", "linear")
        add("rope.scaling.factor", float(rope["factor"]))
    experts = config.get("n_routed_experts") or config.get("num_experts") or config.get("num_local_experts")
    if experts:
        add("expert_count", experts)
    if architecture in ("deepseek2", "glm-dsa"):
        nope, rotated, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        if split_kv_b:
            add("attention.key_length", config["kv_lora_rank"] + rotated)
            add("attention.value_length", config["kv_lora_rank"])
            add("attention.key_length_mla", nope + rotated)
            add("attention.value_length_mla", value)
        else:
            add("attention.key_length", nope + rotated)
            add("attention.value_length", value)
        add("rope.dimension_count", rotated)
        add("expert_weights_scale", float(config.get("routed_scaling_factor", 1.0)))
        add("expert_weights_norm", bool(config.get("norm_topk_prob", False)))
        add("expert_gating_func", 1 if config["model_type"] == "deepseek_v2" else 2)
    elif architecture in ("glm4moe", "minimax-m2"):
        share = rope.get("partial_rotary_factor", 1.0)
        add("rope.dimension_count", config.get("rotary_dim") or int(config["head_dim"] * share))
        add("expert_weights_scale", float(config.get("routed_scaling_factor", 1.0)))
        add("expert_weights_norm", True)
        add("expert_gating_func", 2)
    elif architecture in DELTA:
        add("rope.dimension_count", int(config["head_dim"] * rope["partial_rotary_factor"]))
        add("ssm.inner_size", config["linear_num_value_heads"] * config["linear_value_head_dim"])
        add("full_attention_interval", config["layer_types"].index("full_attention") + 1)
        writer.add_rope_dimension_sections([2, 1, 1, 0])  # of text, images, videos
    if architecture in ("minimax-m2", "gpt-oss"):
        add("expert_feed_forward_length", config["intermediate_size"])
    if architecture == "gemma4":
        sizes = config["per_layer_config"]
        kinds = [kind == "sliding_attention" for kind in config["layer_types"]]
        whole = next(iter(sizes.values()))["head_dim"]
        add("attention.key_length", whole)
        add("attention.key_length_swa", config["head_dim"])
        writer.add_sliding_window_pattern(kinds)
        heads = [sizes.get(str(at), config).get("num_key_value_heads", 2) for at in range(len(kinds))]
        writer.add_head_count_kv(heads)
        add("rope.freq_base_swa", config["rope_parameters"]["sliding_attention"]["rope_theta"])
        turning = whole // 8
        writer.add_tensor("rope_freqs.weight", np.array([1.0] * turning + [1e30] * (whole // 2 - turning), np.float32))
    elif architecture not in ("deepseek2", "glm-dsa") and "head_dim" in config:
        add("attention.key_length", config["head_dim"])
        add("attention.value_length", config["head_dim"])
    for key, value in more.items():
        add(key.replace("__", "."), value)
    tokens = [f"<{number}>" for number in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def sentencepiece_metadata() -> dict[str, Any]:
    """A vocabulary of seven words and all bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "a", "b", "ab", "▁ab", "▁a", "c"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.scores": [0.0] * len(pieces) + [-5.0, -6.0, -7.0, -1.0, -2.0, -3.0, -9.0],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "tokenizer.ggml.bos_token_id": 1,
    }


def byte_level_metadata() -> dict[str, Any]:
    """A vocabulary of two words and all bytes."""
    tokens = ["<|end|>", *sorted(ByteLevel.alphabet()), "th", "the"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.token_type": [3, *[1] * (len(tokens) - 1)],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
