"""Write a folder made by bench/synthetic.py as one GGUF file for llama.cpp.

    python bench/gguf_twin.py MODEL model.gguf --type q8_0

The architecture is llama.cpp's "deepseek2" in the form that caches the compressed latent: key and value halves of
kv_b_proj are separate, the key half transposed. bf16 holds exactly the folder's numbers, also those in fp8, whose
scales are powers of two. Norms, routers and correction biases are float32 in every type. Tensors are written one by
one, an expert at a time. The vocabulary has no tokenizer: prompts are ids.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from tierlm.checkpoints.checkpoint import Checkpoint, read_json
from tierlm.checkpoints.record import TensorInfo
from tierlm.checkpoints.views import DTYPES
from tierlm.kernels import Weight, widen
from tierlm.models import family_of, read_spec
from tierlm.spec import Dense, ExpertKey, Latent, ModelSpec, TrunkKey

TYPES = {
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
TRUNK = {
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "q_a_proj": "attn_q_a",
    "q_a_layernorm": "attn_q_a_norm",
    "q_b_proj": "attn_q_b",
    "kv_a_proj": "attn_kv_a_mqa",
    "kv_a_layernorm": "attn_kv_a_norm",
    "o_proj": "attn_output",
}
MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


@dataclass(frozen=True)
class Entry:
    """One tensor of the GGUF file. ``sources``: names in the folder; several are stacked along a new first dimension.
    ``half`` of kv_b_proj: "k", "v", or "" for any other tensor. ``exact``: float32 in any type."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    half: str = ""
    exact: bool = False


def latent_of(spec: ModelSpec) -> Latent:
    """The attention of all layers. Raises ValueError for another kind, which llama.cpp's "deepseek2" lacks."""
    kinds = {layer.attention for layer in spec.layers}
    kind = kinds.pop()
    if kinds or not isinstance(kind, Latent):
        raise ValueError(f"{spec.model_type} has no GGUF twin")
    return kind


def entries(spec: ModelSpec) -> Iterator[Entry]:
    """What llama.cpp needs of a model of ``spec``; row-major shapes, as in numpy."""
    family, latent = family_of(spec.model_type, "gguf"), latent_of(spec)
    resident = family.resident_tensors(spec)
    yield Entry("token_embd.weight", (spec.vocab, spec.hidden), (family.embedding_name(),))
    yield Entry("output_norm.weight", (spec.hidden,), (resident["norm"][0],), exact=True)
    yield Entry("output.weight", (spec.vocab, spec.hidden), (family.head_name(spec),))
    for layer in range(len(spec.layers)):
        block, moe = f"blk.{layer}.", layer in spec.moe_layers
        trunk = family.trunk_tensors(spec, TrunkKey(layer))
        kv_b = (trunk.pop("kv_b_proj")[0],)
        yield Entry(block + "attn_k_b.weight", (latent.heads, latent.kv_rank, latent.nope_dim), kv_b, half="k")
        yield Entry(block + "attn_v_b.weight", (latent.heads, latent.value_dim, latent.kv_rank), kv_b, half="v")
        for role, (name, shape) in trunk.items():
            own = TRUNK.get(role) or MLP[role] + ("_shexp" if moe else "")
            yield Entry(f"{block}{own}.weight", shape, (name,), exact=len(shape) == 1)
        name, shape = resident[f"{layer}.norm"]
        yield Entry(block + "ffn_norm.weight", shape, (name,), exact=True)
        if not moe:
            continue
        experts = [family.expert_tensors(spec, ExpertKey(layer, expert)) for expert in range(spec.experts)]
        for role, own in MLP.items():
            names = tuple(expert[role][0] for expert in experts)
            yield Entry(f"{block}{own}_exps.weight", (spec.experts, *experts[0][role][1]), names)
        name, shape = resident[f"{layer}.router"]
        yield Entry(block + "ffn_gate_inp.weight", shape, (name,), exact=True)
        if bias := resident.get(f"{layer}.correction"):
            yield Entry(block + "exp_probs_b.bias", bias[1], (bias[0],), exact=True)


def write_twin(folder: Path, file: Path, kind: str = "bf16") -> None:
    """Write ``folder`` to ``file``; ``kind`` is one of TYPES. Raises ValueError for rows that the type cannot hold."""
    config = read_json(folder / "config.json")
    spec = read_spec(config, str(folder))
    checkpoint = Checkpoint(folder)
    writer = gguf.GGUFWriter(file, "deepseek2")
    _describe(writer, spec)
    listed = list(entries(spec))
    types = [gguf.GGMLQuantizationType.F32 if entry.exact else TYPES[kind] for entry in listed]
    for entry, own in zip(listed, types, strict=True):
        block, size = gguf.GGML_QUANT_SIZES[own]
        if entry.shape[-1] % block:
            raise ValueError(f"{entry.name}: rows of {entry.shape[-1]} values are no multiple of {kind}'s {block}")
        nbytes = math.prod(entry.shape) // block * size
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), nbytes, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None  # the writer's own loop holds whole tensors; stacked experts take 7.5 GB
    stream = writer.fout[0]
    for entry, own in zip(listed, types, strict=True):
        writer.write_padding(stream, stream.tell())
        for source in entry.sources:
            part = _part(checkpoint, source, entry.half, spec)
            stream.write(_encode(part, own))
        writer.write_padding(stream, stream.tell())
    writer.close()


def _part(checkpoint: Checkpoint, name: str, half: str, spec: ModelSpec) -> Tensor:
    """One tensor of the folder, bfloat16 or float32, or the requested half of kv_b_proj, [heads, ...]."""
    tensor = _read(checkpoint.tensor(name))
    if tensor.dtype == torch.float8_e4m3fn:
        tensor = widen(Weight(tensor, "fp8", _read(checkpoint.tensor(name + "_scale_inv")))).bfloat16()
    if not half:
        return tensor
    latent = latent_of(spec)
    heads = tensor.view(latent.heads, latent.nope_dim + latent.value_dim, latent.kv_rank)
    return heads[:, : latent.nope_dim].transpose(1, 2) if half == "k" else heads[:, latent.nope_dim :]


def _read(info: TensorInfo) -> Tensor:
    data = torch.from_numpy(np.fromfile(info.file, np.uint8, info.nbytes, offset=info.offset))
    return data.view(DTYPES[info.dtype]).view(info.shape)


def _encode(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> memoryview:
    if kind == gguf.GGMLQuantizationType.BF16:
        return tensor.bfloat16().contiguous().view(torch.int16).numpy().data
    encoded: np.ndarray[Any, Any] = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
    return encoded.data


def _describe(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    """The model's dimensions and rules, and a vocabulary of names."""
    latent, moe = latent_of(spec), spec.moe
    assert moe is not None
    router, dense = moe.router, [layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, Dense)]
    writer.add_block_count(len(spec.layers))
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(dense[0].width if dense else moe.width)
    writer.add_vocab_size(spec.vocab)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_head_count(latent.heads)
    writer.add_head_count_kv(1)  # all heads share the latent as their one key and value
    writer.add_key_length(latent.cache_width)
    writer.add_value_length(latent.kv_rank)
    writer.add_key_length_mla(latent.nope_dim + latent.rope_dim)
    writer.add_value_length_mla(latent.value_dim)
    writer.add_kv_lora_rank(latent.kv_rank)
    # Zero: none. llama.cpp allows the key to be absent only at Lite's own number of layers.
    writer.add_q_lora_rank(latent.q_rank or 0)
    writer.add_leading_dense_block_count(len(dense))
    writer.add_expert_count(spec.experts)
    writer.add_expert_used_count(spec.experts_per_token)
    writer.add_expert_shared_count(moe.shared_width // moe.width)
    writer.add_expert_feed_forward_length(moe.width)
    writer.add_expert_weights_scale(router.scale)
    writer.add_expert_weights_norm(router.normalize)
    sigmoid = router.score == "sigmoid"
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    if router.groups > 1:
        writer.add_expert_group_count(router.groups)
        writer.add_expert_group_used_count(router.groups_chosen)
    writer.add_rope_dimension_count(latent.rope_dim)
    writer.add_rope_freq_base(latent.rope.theta)
    if yarn := latent.rope.yarn:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position)
        writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
        writer.add_rope_scaling_yarn_log_mul(0.1 * (yarn.mscale_all_dim or 0.0))  # llama.cpp divides by the 0.1
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{token}>" for token in range(spec.vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * spec.vocab)
    writer.add_token_merges(["< 0"])  # one, since a list must not be empty
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--type", choices=TYPES, default="bf16")
    args = parser.parse_args()
    try:
        write_twin(args.model, args.file, args.type)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
