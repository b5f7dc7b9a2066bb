"""One run of one engine in this process: load, one greedy request of ids, and its costs.

Every engine gets the same ids, ignores the end of text, and is timed at the same points by a ``Clock``.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from disk import bytes_read, own_bytes_read

# Of the cgroup, for weights held by accelerate, including the running layer. The rest is for the
# interpreter and its libraries, activations, and pages of files being read.
ACCELERATE_SHARE = 0.6
CONTEXT = 1024


@dataclass(frozen=True)
class Request:
    """What to run. ``ram``: bytes. ``pause``: seconds between the load and the request. ``started``: time.monotonic()
    when the process started. ``scratch``: an empty folder on the model's disk, for an engine that must write."""

    peer: str
    model: Path
    gguf: Path | None
    ram: int
    prompt: list[int]
    tokens: int
    threads: int
    pause: float
    scratch: Path
    started: float


@dataclass
class Clock:
    """Marks of a run: seconds since the process started, and bytes read by then from the disk under ``path``, by all
    processes and by this one. Created once everything is imported, before the engine loads anything."""

    path: Path
    started: float
    imported: float = field(init=False)
    load: float = 0.0
    ready: float = 0.0
    marks: list[tuple[float, int, int]] = field(default_factory=list)  # of the tokens
    ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.imported = self._now()

    def _now(self) -> float:
        return time.monotonic() - self.started

    def loaded(self, pause: float) -> None:
        """The engine is ready, and gets a request after a pause, as from a person who types."""
        self.load = self._now()
        time.sleep(pause)
        self.ready = self._now()

    def token(self, token: int) -> None:
        self.marks.append((self._now(), bytes_read(self.path), own_bytes_read()))
        self.ids.append(token)

    def result(self) -> dict[str, Any]:
        """Seconds, and tokens/s and bytes a token of decode, from the first new token to the last."""
        (first, *before), (last, *after) = self.marks[0], self.marks[-1]
        steps = len(self.marks) - 1
        return {
            "tokens_per_second": steps / (last - first),
            "bytes_per_token": (after[0] - before[0]) / steps,
            "own_bytes_per_token": (after[1] - before[1]) / steps,
            "import_seconds": self.imported,
            "load_seconds": self.load,
            "first_token_seconds": first - self.ready,
            "start_to_first_token_seconds": first - (self.ready - self.load),
            "ids": self.ids,
        }


def run_tierlm_cold(request: Request) -> dict[str, Any]:
    """A first start: the cache folder is empty, so the disk is probed, and warm-up knows no heat."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        return run_tierlm(request)


def run_tierlm(request: Request) -> dict[str, Any]:
    """Below the text layer, which would hold back tokens that end within a character."""
    from tierlm import LLM, Budget, SamplingParams
    from tierlm.client import Request as Tokens
    from tierlm.engine.sequence import Pace, Progress

    clock = Clock(request.model, request.started)
    params = SamplingParams(max_new_tokens=request.tokens, ignore_eos=True)
    with LLM.load(request.model, budget=Budget(request.ram), context=CONTEXT) as llm:
        clock.loaded(request.pause)
        tokens = Tokens(llm._client, SimpleQueue[Progress](), [(request.prompt, params)], Pace.ASKED)
        tokens.submit()
        finish = None
        while finish is None:
            progress = tokens.next()
            finish = progress.finish
            for token in progress.ids:
                clock.token(token)
        stats = llm.stats()
    return clock.result() | {"hit_rate": stats.hit_rate, "notes": list(stats.notes)}


def run_llamacpp_repacked(request: Request) -> dict[str, Any]:
    return run_llamacpp(request, repacked=True)


def run_llamacpp(request: Request, repacked: bool = False) -> dict[str, Any]:
    """Reads ids from the names that bench/gguf_twin.py gives to tokens; other files have none."""
    if request.gguf is None:
        raise SystemExit("needs --gguf FILE")
    from llamacpp import open_server, request_of

    clock = Clock(request.gguf, request.started)
    replies: list[dict[str, Any]] = []

    def receive(reply: dict[str, Any]) -> None:
        choice = (reply.get("choices") or [{}])[0]
        if choice.get("finish_reason") is None and "text" in choice:
            name = re.fullmatch(r"<(\d+)>", choice["text"])
            clock.token(int(name[1]) if name else -1)
        replies.append(reply)

    server = open_server(request.gguf, CONTEXT, request.threads, repacked=repacked)
    clock.loaded(request.pause)
    server.handle_completions(request_of(request.prompt, request.tokens), receive)
    if len(clock.ids) != request.tokens:
        raise SystemExit(f"asked for {request.tokens} tokens, got {len(clock.ids)}; last reply: {replies[-1]}")
    return clock.result() | {"timings": replies[-1].get("timings")}


def run_accelerate(request: Request) -> dict[str, Any]:
    """transformers on safetensors with disk offload. It keeps a layer's experts in one tensor, so while loading it
    writes those of every layer that does not fit to the scratch folder: almost the whole model again."""
    size = sum(file.stat().st_size for file in request.model.glob("*.safetensors"))
    free = shutil.disk_usage(request.scratch).free
    if free < 1.1 * size:
        raise SystemExit(f"offload may write the {size / 1e9:.1f} GB of the model, {free / 1e9:.1f} GB are free")
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(request.threads)
    clock = Clock(request.model, request.started)
    model = AutoModelForCausalLM.from_pretrained(
        request.model,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": int(ACCELERATE_SHARE * request.ram)},
        offload_folder=request.scratch,
    ).eval()
    model.generation_config.eos_token_id = None
    clock.loaded(request.pause)
    ids = torch.tensor([request.prompt])
    model.generate(ids, max_new_tokens=request.tokens, do_sample=False, pad_token_id=0, streamer=Streamer(clock))
    written = sum(file.stat().st_size for file in request.scratch.iterdir())
    on_disk = sum(place == "disk" for place in getattr(model, "hf_device_map", {}).values())
    return clock.result() | {"offload_bytes_written": written, "modules_on_disk": on_disk}


class Streamer:
    """Receives the prompt from `transformers`, then each new token."""

    def __init__(self, clock: Clock):
        self.clock, self.prompt = clock, True

    def put(self, value: Any) -> None:
        if not self.prompt:
            self.clock.token(int(value))
        self.prompt = False

    def end(self) -> None:
        """Nothing is held back."""


PEERS: dict[str, Callable[[Request], dict[str, Any]]] = {
    "tierlm": run_tierlm_cold,
    "tierlm-again": run_tierlm,
    "llama.cpp": run_llamacpp,
    "llama.cpp-repacked": run_llamacpp_repacked,
    "accelerate": run_accelerate,
}
