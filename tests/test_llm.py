"""The Python API: what a request returns, what it refuses, and what a failing disk does to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tierlm
from tierlm import LLM, Budget, CheckpointError, PromptError, SamplingParams, StorageError, UsageError
from tierlm.checkpoints.reader import Reader, Request, failure
from tierlm.models.decoder import Decoder

RAM = Budget("8GiB")
TEN = SamplingParams(max_new_tokens=10, ignore_eos=True)


class FaultyReader(Reader):
    """FAKE: forwards to a real reader unless ``fault`` intervenes: for faults that a good disk does not show."""

    name = "faulty"

    def __init__(self, inner: Reader):
        self.inner = inner
        self.fault: Callable[[Request, memoryview], bool] = lambda request, buffer: False

    def read(self, request: Request, buffer: memoryview) -> None:
        if not self.fault(request, buffer):
            self.inner.read(request, buffer)

    def close(self) -> None:
        self.inner.close()


@contextmanager
def faulty(folder: Path, **options: Any) -> Iterator[tuple[LLM, FaultyReader]]:
    """A toy that reads nearly every expert again in every step, on a reader that fails on request."""
    with LLM.load(folder, budget=RAM, ram_slots=5, **options) as llm:
        runtime = llm._runtime
        disk: Any = runtime.experts[-1].source
        disk.reader = FaultyReader(runtime.reader)
        yield llm, disk.reader


def is_expert(request: Request, name: str = ".experts.") -> bool:
    return any(name in tensor.name for tensor in request.extent.tensors)


def test_public_names() -> None:
    assert sorted(tierlm.__all__) == sorted(set(tierlm.__all__))
    for name in tierlm.__all__:
        assert getattr(tierlm, name).__name__ == name
        assert getattr(tierlm, name).__doc__
    with pytest.raises(AttributeError):
        _ = tierlm.Nothing


@pytest.mark.parametrize("layer", [1, 3])
def test_a_failing_read_names_file_tensor_and_offset_and_the_next_request_works(
    layer: int, toy_v3: tuple[Path, Any]
) -> None:
    with faulty(toy_v3[0]) as (llm, reader):
        expected = llm.generate([[5, 6, 7]], TEN)[0].ids

        def fail(request: Request, buffer: memoryview) -> bool:
            if is_expert(request, f"layers.{layer}.mlp.experts."):
                raise failure(request, request.start, "input/output error")
            return False

        reader.fault = fail
        for _ in range(3):
            with pytest.raises(StorageError, match=rf"layers\.{layer}\.mlp\.experts\.\d+\..*input/output") as caught:
                llm.generate([[5, 6, 7]], TEN)
            assert caught.value.file.endswith("model.safetensors")
            assert caught.value.offset > 0
        reader.fault = lambda request, buffer: False
        assert llm.generate([[5, 6, 7]], TEN)[0].ids == expected
        assert all(entry.pins == 0 for entry in llm._runtime.experts[0].entries.values())


def test_a_file_that_shrinks_while_running_is_a_short_read(toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    for file in toy_v3[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "model.safetensors"
    whole = shard.read_bytes()
    for reader in ("direct", "mmap"):
        with LLM.load(tmp_path, budget=RAM, ram_slots=5, reader=reader) as llm:
            expected = llm.generate([[5, 6, 7]], TEN)[0].ids
            with open(shard, "r+b") as stream:
                stream.truncate(len(whole) // 3)
            with pytest.raises(StorageError, match=r"model\.safetensors: reading model\..* at offset \d+: expected"):
                llm.generate([[5, 6, 7]], TEN)
            with open(shard, "r+b") as stream:
                stream.write(whole)
            assert llm.generate([[5, 6, 7]], TEN)[0].ids == expected


@pytest.mark.parametrize("how", ["replaced", "deleted"])
@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_a_shard_that_loses_its_name_is_still_read(
    how: str, reader: str, toy_v3: tuple[Path, Any], tmp_path: Path
) -> None:
    """A file of the same name and size has other bytes."""
    for file in toy_v3[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "model.safetensors"
    with LLM.load(tmp_path, budget=RAM, ram_slots=5, reader=reader) as llm:
        expected = llm.generate([[5, 6, 7]], TEN)[0].ids
        if how == "replaced":
            (tmp_path / "new").write_bytes(bytes(shard.stat().st_size))
            (tmp_path / "new").replace(shard)
        else:
            shard.unlink()
        assert llm.generate([[5, 6, 7]], TEN)[0].ids == expected


def test_a_stalled_read_is_an_error_and_is_found_again_when_it_comes(toy_v3: tuple[Path, Any]) -> None:
    gate = threading.Event()
    with faulty(toy_v3[0], io_timeout=0.3) as (llm, reader):
        expected = llm.generate([[5, 6, 7]], TEN)[0].ids

        def stall(request: Request, buffer: memoryview) -> bool:
            if is_expert(request):
                assert gate.wait(60)
            return False

        reader.fault = stall
        with pytest.raises(
            StorageError, match=r"reading model\.layers\.1\.mlp\.experts\..*stalled: nothing came for 0\.3 s"
        ):
            llm.generate([[5, 6, 7]], TEN)
        gate.set()
        assert llm.generate([[5, 6, 7]], TEN)[0].ids == expected


def test_one_sequence_fails_and_the_others_go_on(toy_v3: tuple[Path, Any]) -> None:
    prompts = [[5, 6, 7], [90, 2], [44, 45, 46, 47]]
    with faulty(toy_v3[0]) as (llm, reader):
        expected = [result.ids for result in llm.generate(prompts, TEN)]
        seen = 0

        def fail_one(request: Request, buffer: memoryview) -> bool:
            """From some time on, an expert of layer 2 cannot be read."""
            nonlocal seen
            seen += is_expert(request, "layers.2.mlp.experts.3.")
            if seen > 1 and is_expert(request, "layers.2.mlp.experts.3."):
                raise failure(request, request.start, "input/output error")
            return False

        reader.fault = fail_one
        results = llm.generate(prompts, TEN)
        failed = [result for result in results if result.finish_reason == "error"]
        assert 0 < len(failed) < len(results)
        for result, ids in zip(results, expected, strict=True):
            if result.finish_reason == "error":
                assert "experts.3." in str(result.error)
                assert result.ids == ids[: len(result.ids)]
            else:
                assert result.error is None and result.ids == ids


def test_leaving_a_stream_early_leaves_everything_in_order(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=5) as llm:
        expected = llm.generate([[5, 6, 7]], TEN)[0].ids
        stream = llm.stream([5, 6, 7], TEN)
        assert next(stream).ids == expected[:1]
        stream.close()
        assert [token for piece in llm.stream([5, 6, 7], TEN) for token in piece.ids] == expected


def test_stop_ids_and_eos(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=RAM) as llm:
        free = llm.generate([[5, 6, 7]], TEN)[0]
        assert free.finish_reason == "length" and free.text is None and len(free.ids) == 10
        stop = free.ids[4]
        found = llm.generate([[5, 6, 7]], SamplingParams(max_new_tokens=10, ignore_eos=True, stop_ids=[stop]))[0]
        assert found.finish_reason == "stop"
        assert found.ids == free.ids[: free.ids.index(stop) + 1]


def test_the_context_ends_a_generation(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=RAM, context=12) as llm:
        result = llm.generate([[5] * 8], SamplingParams(max_new_tokens=50, ignore_eos=True))[0]
        assert result.finish_reason == "length"
        assert len(result.ids) == 12 - 8 + 1  # the last one is not fed back
        assert len(llm.generate([[5] * 12], TEN)[0].ids) == 1
        with pytest.raises(PromptError, match="the prompt has 13 tokens, the context 12"):
            llm.generate([[5] * 13], TEN)
    with pytest.raises(UsageError, match="context: expected at most the model's own 256"):
        LLM.load(toy_v3[0], budget=RAM, context=257)


def test_prompts_that_mean_nothing(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=RAM) as llm:
        with pytest.raises(PromptError, match="at least one token"):
            llm.generate([[]])
        with pytest.raises(PromptError, match="131 is not in the vocabulary of 131"):
            llm.generate([[3, 131]])
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file; give prompts as token ids"):
            llm.generate("text")
        assert llm.generate([]) == []
        assert llm.generate([5, 6], TEN)[0].prompt_ids == [5, 6]  # a single prompt of ids


def test_a_policy_that_was_asked_for_is_used_even_where_everything_fits(toy_v3: tuple[Path, Any]) -> None:
    for name, slots, expected in (("default", None, "Lru"), ("default", 4, "Echo"), ("sieve", None, "Sieve")):
        with LLM.load(toy_v3[0], budget=RAM, policy=name, ram_slots=slots) as llm:
            assert type(llm._runtime.experts[0].policy).__name__ == expected


def test_options_act_or_raise(toy_v3: tuple[Path, Any]) -> None:
    folder = toy_v3[0]
    for options, message in [
        ({"polcy": "lru"}, "unknown options: polcy; known are device, policy"),
        ({"policy": "best"}, "unknown policy 'best'; known are echo, hazard, cycle, lru, "),
        ({"predictor": "oracle"}, "unknown predictor 'oracle'; known are none, gate, "),
        ({"reader": "tape"}, "reader: expected auto, direct or mmap"),
        ({"device": "quantum"}, "device 'quantum' cannot be used here"),
    ]:
        with pytest.raises(UsageError, match=message):
            LLM.load(folder, budget=RAM, **options)
    with pytest.raises(CheckpointError, match="no such folder"):
        LLM.load(folder / "nothing", budget=RAM)


def test_each_model_computes_with_its_own_threads(toy_v3: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before, counts = torch.get_num_threads(), list[int]()
    real = Decoder.forward

    def forward(*given: Any, **options: Any) -> Any:
        counts.append(torch.get_num_threads())
        return real(*given, **options)

    monkeypatch.setattr(Decoder, "forward", forward)
    try:
        with LLM.load(toy_v3[0], budget=RAM, threads=3) as first, LLM.load(toy_v3[0], budget=RAM, threads=2) as second:
            for llm in (first, second, first):
                llm.generate([1, 2], SamplingParams(max_new_tokens=1))
    finally:
        torch.set_num_threads(before)
    assert counts == [3, 2, 3]


def test_no_thread_is_left_behind(toy_v3: tuple[Path, Any]) -> None:
    before = threading.active_count()
    with LLM.load(toy_v3[0], budget=RAM) as llm:
        assert threading.active_count() > before
    llm.close()  # twice is harmless
    assert threading.active_count() <= before
    with pytest.raises(UsageError, match="closed"):
        llm.generate([[5]])


def test_half_precision_kv_cache(toy_v3: tuple[Path, Any], ids: list[int]) -> None:
    """This option changes numbers slightly, and halves the memory."""
    with LLM.load(toy_v3[0], budget=RAM) as llm:
        exact, size = llm.logits(ids), llm.stats().plan.ram.parts["KV cache"]
    with LLM.load(toy_v3[0], budget=RAM, kv_dtype="bfloat16", prefill_chunk=9) as llm:
        rounded = llm.logits(ids)
        assert llm.stats().plan.ram.parts["KV cache"] == size // 2
    assert 0 < (rounded - exact).abs().median() < 0.02 * exact.abs().max()


def test_stats_add_up(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=9, predictor="none", heat=False) as llm:
        llm.generate([[5, 6, 7]], TEN)
        stats = llm.stats()
        tier = stats.experts["ram"]
        assert (stats.prompt_tokens, stats.new_tokens) == (3, 10)
        assert tier.hits + tier.late_hits + tier.misses >= 3 * 4 * 10  # layers x chosen x steps
        assert tier.misses - tier.evictions == 9  # the slots are full
        assert stats.hit_rate == (tier.hits + tier.late_hits) / (tier.hits + tier.late_hits + tier.misses)
        size = llm._runtime.catalog.size(llm._runtime.catalog.experts()[0])
        read = stats.prefill.disk_bytes + stats.decode.disk_bytes
        assert read == pytest.approx(tier.misses * size, rel=0.3)
        assert stats.peak_ram > 0 and stats.reader in ("direct", "mmap")


def test_a_prefill_reads_each_record_at_most_once_a_chunk(toy_v3: tuple[Path, Any]) -> None:
    prompt = torch.randint(2, 131, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=4, prefill_chunk=30) as llm:
        llm.logits(prompt)
        assert llm.stats().experts["ram"].misses <= 2 * 3 * 16


def test_a_prefill_leaves_most_of_the_decode_cache(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=32, predictor="none") as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_new_tokens=30, ignore_eos=True))
        tier = llm._runtime.experts[0]
        warm = set(tier.entries)
        assert len(warm) == 32
        llm.logits([(11 * i) % 129 + 2 for i in range(60)])  # demands all 48
        assert len(warm & set(tier.entries)) >= 32 - 2 * max(2, 32 // 8)
