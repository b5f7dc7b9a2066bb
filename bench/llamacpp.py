"""llama.cpp through its binding xllamacpp: a server in this process, configured for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_server(file: Path, context: int, threads: int, *, repacked: bool = False) -> Any:
    """An xllamacpp.Server with ``params_of`` a GGUF file, without parallel sequences."""
    import xllamacpp

    return xllamacpp.Server(params_of(file, context, threads, repacked=repacked))


def params_of(file: Path, context: int, threads: int, *, repacked: bool) -> Any:
    """Its parameters for a GGUF file: mapped, without warm-up or prompt cache. ``repacked``: quantised weights are
    copied into the layout of its fastest kernels, which takes memory for all of them."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = context
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.no_extra_bufts = not repacked
    params.fit_params = False
    params.warmup = False
    params.cache_ram_mib = 0
    return params


def request_of(prompt: list[int], tokens: int, **options: Any) -> dict[str, Any]:
    """A greedy completion of ids that streams one reply a token, then one with the timings."""
    fixed = {"temperature": 0, "ignore_eos": True, "stream": True, "cache_prompt": False}
    return {"prompt": prompt, "n_predict": tokens, **fixed, **options}
