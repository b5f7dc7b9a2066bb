"""Write a folder made by bench/synthetic.py as one GGUF file.

    python bench/gguf_twin.py MODEL model.gguf --type q8_0

DeepSeek's architecture is written as llama.cpp's "deepseek2" in the form that caches the compressed latent: key and
value halves of kv_b_proj are separate, the key half transposed. bf16 holds exactly the folder's numbers, also those in
fp8, whose scales are powers of two. Norms, routers and biases are float32 in every type. Tensors are written one by
one, an expert at a time. The vocabulary has no tokenizer: prompts are ids.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf_types import MIXES, Type, encode, nbytes_of, type_of
from torch import Tensor

from tierlm.attention_spec import Grouped, Latent
from tierlm.checkpoints.checkpoint import Checkpoint, read_json
from tierlm.checkpoints.record import TensorInfo
from tierlm.checkpoints.views import DTYPES
from tierlm.kernels import Weight, widen
from tierlm.models import family_of, read_spec
from tierlm.spec import Dense, ExpertKey, ModelSpec, TrunkKey

ARCHITECTURES = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the GGUF file. ``sources``: names of Hugging Face; several are stacked along a new first dimension.
    ``half`` of kv_b_proj: "k", "v", or "" for any other tensor. ``layer``: -1 outside of the layers."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    layer: int
    half: str = ""


def entries(spec: ModelSpec) -> Iterator[Entry]:
    """All tensors; row-major shapes, as in numpy."""
    family, layers = family_of(spec.model_type, "gguf"), len(spec.layers)
    architecture = ARCHITECTURES[spec.model_type]
    key = next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(key, layers)

    def entry(sources: tuple[str, ...], shape: tuple[int, ...], layer: int) -> Entry:
        name = (
            sources[0].replace(".experts.0.", ".experts.").replace("e_score_correction_bias", "e_score_correction.bias")
        )
        name += ".weight" * name.endswith(".sinks")
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return Entry(found, shape if len(sources) == 1 else (len(sources), *shape), sources, layer)

    yield entry((family.embedding_name(),), (spec.vocab, spec.hidden), -1)
    yield entry((family.head_name(spec),), (spec.vocab, spec.hidden), -1)
    resident = family.resident_tensors(spec)
    for role, (name, shape) in resident.items():
        yield entry((name,), shape, int(role.split(".")[0]) if "." in role else -1)
    for layer in range(layers):
        for role, (name, shape) in family.trunk_tensors(spec, TrunkKey(layer)).items():
            if role == "kv_b_proj":
                yield from _halves(spec, layer, name)
            else:
                yield entry((name,), shape, layer)
        if layer not in spec.moe_layers:
            continue
        experts = [family.expert_tensors(spec, ExpertKey(layer, expert)) for expert in range(spec.experts)]
        for role, (_, shape) in experts[0].items():
            yield entry(tuple(expert[role][0] for expert in experts), shape, layer)


def _halves(spec: ModelSpec, layer: int, name: str) -> Iterator[Entry]:
    latent = spec.layers[layer].attention
    assert isinstance(latent, Latent)
    shapes = {
        "k": (latent.heads, latent.kv_rank, latent.nope_dim),
        "v": (latent.heads, latent.value_dim, latent.kv_rank),
    }
    for half, shape in shapes.items():
        yield Entry(f"blk.{layer}.attn_{half}_b.weight", shape, (name,), layer, half)


def write_twin(folder: Path, file: Path, mix: str = "bf16") -> None:
    """Write ``folder`` to ``file``; ``mix`` is one of MIXES. Raises ValueError for rows that a type cannot hold."""
    spec, checkpoint = read_spec(read_json(folder / "config.json"), str(folder)), Checkpoint(folder)
    names = dict.fromkeys(source for entry in entries(spec) for source in entry.sources)
    write_gguf(spec, ((name, _tensor(checkpoint, name)) for name in names), file, mix)


def write_gguf(spec: ModelSpec, tensors: Iterable[tuple[str, Tensor]], file: Path, mix: str) -> None:
    """Write a model whose ``tensors`` come in any order, by Hugging Face's names. Raises ValueError."""
    writer = gguf.GGUFWriter(file, ARCHITECTURES[spec.model_type])
    _describe(writer, spec)
    places: dict[str, list[tuple[int, Entry, Type]]] = {}  # of a source: offsets from the first tensor
    end = 0
    for entry in entries(spec):
        kind = type_of(mix, entry.name, entry.shape, entry.layer, len(spec.layers))
        if entry.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"{entry.name}: rows of {entry.shape[-1]} values are no multiple of {kind.name}'s block")
        size = nbytes_of(kind, math.prod(entry.shape))
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=kind)
        for number, source in enumerate(entry.sources):
            places.setdefault(source, []).append((end + number * size // len(entry.sources), entry, kind))
        end += gguf.GGUFWriter.ggml_pad(size, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None  # the writer's own loop holds whole tensors; stacked experts take 7.5 GB
    stream = writer.fout[0]
    writer.write_padding(stream, stream.tell())
    start = stream.tell()
    stream.truncate(start + end)
    for name, tensor in tensors:
        for offset, entry, kind in places.pop(name):
            stream.seek(start + offset)
            stream.write(encode(_half(tensor, entry.half, spec, entry.layer), kind))
    writer.close()
    if places:
        raise ValueError(f"{file}: tensors without weights: {', '.join(sorted(places)[:3])}")


def _half(tensor: Tensor, half: str, spec: ModelSpec, layer: int) -> Tensor:
    """The tensor, or the requested half of kv_b_proj, [heads, ...]."""
    if not half:
        return tensor
    latent = spec.layers[layer].attention
    assert isinstance(latent, Latent)
    heads = tensor.view(latent.heads, latent.nope_dim + latent.value_dim, latent.kv_rank)
    return heads[:, : latent.nope_dim].transpose(1, 2) if half == "k" else heads[:, latent.nope_dim :]


def _tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor of the folder, bfloat16 or float32."""
    tensor = _read(checkpoint.tensor(name))
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    return widen(Weight(tensor, "fp8", _read(checkpoint.tensor(name + "_scale_inv")))).bfloat16()


def _read(info: TensorInfo) -> Tensor:
    data = torch.from_numpy(np.fromfile(info.file, np.uint8, info.nbytes, offset=info.offset))
    return data.view(DTYPES[info.dtype]).view(info.shape)


def _describe(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    """The model's dimensions and rules, and a vocabulary of names."""
    moe = spec.moe
    assert moe is not None
    router, dense = moe.router, [layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, Dense)]
    writer.add_block_count(len(spec.layers))
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(dense[0].width if dense else moe.width)
    writer.add_vocab_size(spec.vocab)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    attention = spec.layers[0].attention
    if isinstance(attention, Latent):
        _describe_latent(writer, attention)
        writer.add_leading_dense_block_count(len(dense))
        writer.add_expert_shared_count(moe.shared_width // moe.width)
    else:
        _describe_grouped(writer, attention, max(layer.attention.window or 0 for layer in spec.layers))  # type: ignore[union-attr]
    writer.add_expert_count(spec.experts)
    writer.add_expert_used_count(spec.experts_per_token)
    writer.add_expert_feed_forward_length(moe.width)
    writer.add_expert_weights_scale(router.scale)
    writer.add_expert_weights_norm(router.normalize)
    if not router.bias:  # gpt-oss has a rule of its own, which llama.cpp knows
        sigmoid = router.score == "sigmoid"
        writer.add_expert_gating_func(
            gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX
        )
    if router.groups > 1:
        writer.add_expert_group_count(router.groups)
        writer.add_expert_group_used_count(router.groups_chosen)
    writer.add_rope_freq_base(attention.rope.theta)
    if yarn := attention.rope.yarn:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position)
        writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
        if yarn.mscale_all_dim:
            writer.add_rope_scaling_yarn_log_mul(0.1 * yarn.mscale_all_dim)  # llama.cpp divides by the 0.1
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{token}>" for token in range(spec.vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * spec.vocab)
    writer.add_token_merges(["< 0"])  # one, since a list must not be empty
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _describe_latent(writer: gguf.GGUFWriter, latent: Latent) -> None:
    writer.add_head_count(latent.heads)
    writer.add_head_count_kv(1)  # all heads share the latent as their one key and value
    writer.add_key_length(latent.cache_width)
    writer.add_value_length(latent.kv_rank)
    writer.add_key_length_mla(latent.nope_dim + latent.rope_dim)
    writer.add_value_length_mla(latent.value_dim)
    writer.add_kv_lora_rank(latent.kv_rank)
    # Zero: none. llama.cpp allows the key to be absent only at Lite's own number of layers.
    writer.add_q_lora_rank(latent.q_rank or 0)
    writer.add_rope_dimension_count(latent.rope_dim)


def _describe_grouped(writer: gguf.GGUFWriter, grouped: Grouped, window: int) -> None:
    writer.add_head_count(grouped.heads)
    writer.add_head_count_kv(grouped.kv_heads)
    writer.add_key_length(grouped.head_dim)
    writer.add_value_length(grouped.head_dim)
    writer.add_rope_dimension_count(grouped.rotated)
    if window:
        writer.add_sliding_window(window)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--type", choices=MIXES, default="bf16")
    args = parser.parse_args()
    try:
        write_twin(args.model, args.file, args.type)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
