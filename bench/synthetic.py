"""Write a full-shape synthetic checkpoint: the dimensions of a published model, random weights, any number of layers.

    python bench/synthetic.py deepseek-v2-lite /tmp/v2-lite --layers 12

The routers are random too, so that routing is nearly uniform: the worst case for any cache. It is written shard by
shard in about a gigabyte of memory. The demo model's tokenizer goes with it, so that text can be typed in; what comes
out is noise.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import tierlm.demo
from tierlm.models import family_of
from tierlm.models.deepseek import embedding_name, head_name
from tierlm.spec import ExpertKey, TrunkKey

SHARD_BYTES = 2**30
V2_LITE = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "bos_token_id": 0,
    "eos_token_id": None,
    "torch_dtype": "bfloat16",
}
SHAPES = {"deepseek-v2-lite": V2_LITE}


class Shards:
    """Collects tensors and writes a shard whenever there is enough, then the index."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pending: dict[str, torch.Tensor] = {}
        self.size = 0
        self.files: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.pending[name] = tensor
        self.size += tensor.nbytes
        if self.size >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            self.files.append(sorted(self.pending))
            save_file(self.pending, self.folder / f"part-{len(self.files):05}.safetensors")
            print(f"shard {len(self.files)}: {self.size / 1e9:.2f} GB", file=sys.stderr, flush=True)
        self.pending, self.size = {}, 0

    def finish(self) -> None:
        self.flush()
        weight_map = {}
        for number, names in enumerate(self.files, 1):
            final = f"model-{number:05}-of-{len(self.files):05}.safetensors"
            (self.folder / f"part-{number:05}.safetensors").rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="fewer than the published number makes a smaller file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    config = dict(SHAPES[args.shape])
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    family = family_of(config, args.shape)
    spec = family.read_spec(config, args.shape)
    args.out.mkdir(parents=True)
    torch.manual_seed(args.seed)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5)

    shards = Shards(args.out)
    shards.add(embedding_name(), random((spec.vocab, spec.hidden)))
    for layer in range(spec.layers):
        groups = [family.trunk_tensors(spec, TrunkKey(layer))]
        if spec.is_moe(layer):
            groups += [family.expert_tensors(spec, ExpertKey(layer, expert)) for expert in range(spec.experts)]
        for group in groups:
            for name, shape in group.values():
                shards.add(name, random(shape))
    for name, shape in family.gate_tensors(spec).values():
        shards.add(name, random(shape))
    shards.add(head_name(spec), random((spec.vocab, spec.hidden)))
    shards.finish()
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        source = Path(tierlm.demo.__file__).parent / file
        if source.exists():
            shutil.copy(source, args.out / file)


if __name__ == "__main__":
    main()
