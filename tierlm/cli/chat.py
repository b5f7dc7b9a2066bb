"""``tierlm chat``: a conversation at the terminal."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from tierlm.cli.generation import ShowStats, load, print_stats, show
from tierlm.cli.options import Loading, Memory, Messages, Model, Sampling, grouped
from tierlm.config import Budget, LoadOptions, SamplingParams
from tierlm.progress import prefill_bar


@grouped
def chat(
    model: Model,
    *,
    system: Annotated[str | None, Option(metavar="TEXT", help="An instruction before the conversation.")] = None,
    stats: ShowStats = False,
    budget: Annotated[Budget, Memory()],
    params: Annotated[SamplingParams, Sampling(max_new_tokens=512)],
    options: Annotated[LoadOptions, Loading()],
    quiet: Annotated[bool, Messages()],
) -> None:
    """Chat with a model through its chat template. Ctrl-C ends an answer; Ctrl-D or an empty line ends the chat."""
    messages = [{"role": "system", "content": system}] if system else []
    with load(model, budget, options, quiet) as llm:
        while line := _ask():
            messages.append({"role": "user", "content": line})
            with prefill_bar(llm, quiet) as bar:
                text, _, _ = show(llm.chat(messages, params, on_prefill=bar))
            messages.append({"role": "assistant", "content": text})
        if stats:
            print_stats(llm.stats())


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""
