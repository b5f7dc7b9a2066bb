"""KV blocks on disk: what is read is what was written, or an error; whatever is lost, the tokens are the same."""

from __future__ import annotations

import errno
import importlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_conversation import ids_of, params

from tierlm import LLM, Budget, UsageError
from tierlm.engine import stored
from tierlm.engine.sequence import Keep, Progress
from tierlm.memory import kvdisk, kvfiles, kvmover
from tierlm.memory.kvblock import BlockLayout, extend, identity_of
from tierlm.memory.kvdisk import KvDisk, open_kv_disk
from tierlm.memory.kvfiles import HEADER, BlockFiles, Header
from tierlm.planning.reuse import loading_pays
from tierlm.policies.chains import BlockKey, Leaves
from tierlm.policies.eviction import TierInfo

RAM = Budget("8GiB")
LAYOUT = BlockLayout((3, 5), torch.float32, 2, "exact")  # a block of two tokens, one page on disk
IDENTITY = identity_of(LAYOUT, "a model")
SLOTS = 9


def opened(folder: Path, identity: bytes = IDENTITY, layout: BlockLayout = LAYOUT, slots: int = SLOTS) -> KvDisk:
    found = open_kv_disk(folder, slots * layout.stored, layout, identity, Leaves, lambda: 0, 1e9)
    assert isinstance(found, KvDisk), found
    return found


def keys_of(ids: list[int]) -> list[BlockKey]:
    chain = list[BlockKey]()
    extend(chain, IDENTITY, ids, LAYOUT.tokens)
    return chain


def values(key: BlockKey) -> list[torch.Tensor]:
    """The rows of a block, by its name."""
    seed = torch.Generator().manual_seed(zlib.crc32(key.name))
    return [torch.rand(LAYOUT.tokens, width, generator=seed) for width in LAYOUT.widths]


def put(disk: KvDisk, ids: list[int]) -> int:
    """Store the blocks of ``ids``. Returns how many are there or on their way."""
    chain = keys_of(ids)
    for at, key in enumerate(chain):
        if not disk.put(key, values(key), set(chain)):
            return at
    return len(chain)


def settle(disk: KvDisk) -> None:
    for move in list(disk._writes):
        disk.wait(move, 10)
    disk.collect()


def get(disk: KvDisk, ids: list[int]) -> int:
    """Read the blocks of ``ids`` up to the first error. Returns how many, all of them right."""
    keys = keys_of(ids)[: disk.find(keys_of(ids))]
    disk.pin(keys)
    right = 0
    for key in keys:
        move = disk.read(key)
        assert move is not None
        disk.wait(move, 10)
        if move.error is None:
            assert all(map(torch.equal, LAYOUT.rows(move.buffer.tensor), values(key)))
            right += 1
        disk.release(move)
        if move.error is not None:
            break
    disk.unpin(keys)
    return right


# --- the store


class Disk:
    """FAKE: a disk that ends after ``room`` more bytes, within a write, as a killed process leaves it."""

    def __init__(self) -> None:
        self.room = 2**40

    def write(self, fd: int, data: memoryview, offset: int) -> None:
        part = data[: max(0, self.room)]
        os.pwrite(fd, part, offset)
        self.room -= data.nbytes
        if self.room < 0:
            raise OSError(errno.EIO, "killed")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A disk for unaligned writes."""
    disk, real = Disk(), kvfiles._open
    monkeypatch.setattr(kvfiles, "_open", lambda file, flags=0: real(file))
    monkeypatch.setattr(kvfiles, "_write", disk.write)
    return disk


IDS = st.lists(st.integers(1, 2), min_size=2, max_size=14)


@given(data=st.data())
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_found_was_stored(data: st.DataObject, fake: Disk, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any order of writes, reads, evictions, restarts, and kills at any byte."""
    folder, fake.room = tmp_path_factory.mktemp("store"), 2**40
    disk, safe = opened(folder), set[BlockKey]()
    for _ in range(data.draw(st.integers(1, 20))):
        act = data.draw(st.sampled_from(["put", "put", "put", "get", "reopen", "kill"]))
        if act == "put":
            put(disk, data.draw(IDS))
            if data.draw(st.booleans()):
                settle(disk)
        elif act == "get":
            ids = data.draw(IDS)
            there = disk.find(keys_of(ids))
            assert get(disk, ids) == there
        else:
            if act == "kill":
                settle(disk)
                safe = set(disk._entries)
                fake.room = data.draw(st.integers(0, 4 * (LAYOUT.stored + 2 * HEADER)))
                put(disk, data.draw(IDS))
                settle(disk)
                safe &= set(disk._entries)  # what gave way is gone
            disk.close()
            before, fake.room = set(disk._entries), 2**40
            disk = opened(folder)
            assert before == set(disk._entries) if act == "reopen" else safe <= set(disk._entries)
            for key, entry in disk._entries.items():  # whole, whatever was cut
                move = disk.read(key)
                assert move is not None
                disk.wait(move, 10)
                assert move.error is None and entry.header.key == key
                disk.release(move)
        assert len(disk._entries) <= SLOTS and not disk.tier.damaged
        names = {key.name for key in disk._entries} | {IDENTITY}
        assert all(key.parent in names for key in disk._entries)  # leaves give way first
        settle(disk)
        assert disk.tier.tokens == disk.snapshot().tokens == len(disk._entries) * LAYOUT.tokens
        assert len(disk._buffers) == kvdisk.buffers_of(LAYOUT)
    disk.close()


@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_damage_is_an_error_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, ids = tmp_path_factory.mktemp("store"), [list(range(at, at + 6)) for at in (1, 11, 21)]
    disk = opened(folder)
    assert [put(disk, one) for one in ids] == [3, 3, 3]
    disk.close()
    file = folder / data.draw(st.sampled_from(["headers", "blocks"]))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    file.write_bytes(content)
    disk = opened(folder)
    for one in ids:
        for _ in range(4):  # a damaged block is found when those before it are right
            get(disk, one)  # compares the values
            put(disk, one)
            settle(disk)
        assert get(disk, one) == 3
    disk.close()


@pytest.mark.parametrize("room", [0, 1, HEADER, HEADER + 1, HEADER + 3000, HEADER + LAYOUT.stored, 2**20])
def test_a_write_over_another_block_that_is_cut(room: int, fake: Disk, tmp_path: Path) -> None:
    disk = opened(tmp_path)
    for at in range(SLOTS):
        put(disk, [at, at])
    settle(disk)
    fake.room = room
    put(disk, [100, 100])
    settle(disk)
    disk.close()
    fake.room = 2**40
    disk = opened(tmp_path)
    found = {at: get(disk, [at, at]) for at in [*range(SLOTS), 100]}
    assert disk.tier.damaged == 0
    assert found[100] == (room == 2**20) and found[0] == (room < 1)  # the first byte of a header already counts
    assert all(found[at] for at in range(1, SLOTS))
    disk.close()


def test_headers_are_whole_and_have_parents(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    put(disk, [1, 2, 3, 4, 5, 6])
    disk.close()
    file = tmp_path / "headers"
    content = file.read_bytes()
    one, two = content[:HEADER], content[HEADER : 2 * HEADER]
    assert Header.unpack(one, IDENTITY) is not None
    for at in range(1, HEADER):  # one that was half written over
        wholes = [Header.unpack(whole, IDENTITY) for whole in (one, two)]  # their first bytes are the same
        assert Header.unpack(one[:at] + two[at:], IDENTITY) in (None, *wholes)
    file.write_bytes(bytes(HEADER) + content[HEADER:])  # without the first block the others are of no use
    assert opened_and_left(tmp_path, IDENTITY) == 0


def test_another_identity_finds_nothing(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    put(disk, [1, 2, 3, 4])
    disk.close()
    assert opened_and_left(tmp_path, identity_of(LAYOUT, "another model")) == 0
    assert opened_and_left(tmp_path, IDENTITY) == 0  # the other one has taken the folder
    assert identity_of(LAYOUT, "a model") == IDENTITY != identity_of(BlockLayout((3, 5), torch.float32, 4, "exact"))


def opened_and_left(folder: Path, identity: bytes) -> int:
    disk = opened(folder, identity)
    disk.close()
    return disk.tier.tokens


def test_a_smaller_store_keeps_what_fits(tmp_path: Path) -> None:
    disk = opened(tmp_path, slots=12)
    put(disk, list(range(24)))
    disk.close()
    disk = opened(tmp_path, slots=8)
    assert get(disk, list(range(24))) == 8 and (tmp_path / "blocks").stat().st_size == 8 * LAYOUT.stored
    disk.close()


def test_a_store_belongs_to_one_process(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    found = open_kv_disk(tmp_path, 2**20, LAYOUT, IDENTITY, Leaves, lambda: 0, 1e9)
    assert isinstance(found, str) and "another process" in found
    disk.close()
    assert opened_and_left(tmp_path, IDENTITY) == 0


def test_a_chain_does_not_push_out_itself(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    long = list(range(100))
    while put(disk, long) < SLOTS:
        settle(disk)
    settle(disk)
    assert put(disk, long) == SLOTS and disk.tier.evicted == 0
    disk.close()


def test_writes_wait_for_demands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvmover, "PATIENCE", 1e9)
    demands = [5]
    disk = open_kv_disk(tmp_path, 2**20, LAYOUT, IDENTITY, Leaves, lambda: demands[0], 1e9)
    assert isinstance(disk, KvDisk)
    put(disk, [1, 2])
    disk.wait(disk._writes[0], 0.05)
    assert not disk._writes[0].done
    demands[0] = 0
    settle(disk)
    assert get(disk, [1, 2]) == 1
    disk.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_within_half_a_step(dtype: torch.dtype) -> None:
    layout = BlockLayout((7, 0, 64), dtype, 16, "int8")
    block = torch.zeros(layout.buffer, dtype=torch.uint8)
    rows = list(layout.rows(block))
    for part in rows:
        part.copy_(torch.randn(part.shape) * torch.logspace(-3, 3, max(1, part.shape[1]))[: part.shape[1]])
    rows[0][:, 2] = 0
    stored, again = torch.zeros(layout.stored, dtype=torch.uint8), torch.zeros_like(block)
    assert layout.encode(block.numpy(), stored.numpy())
    layout.decode(stored.numpy(), again.numpy())
    for part, found in zip(rows, layout.rows(again), strict=True):
        step = part.float().abs().amax(0) / 127 if part.numel() else torch.zeros(0)
        wide = (part.float() / step.where(step > 0, 1.0)).round() * step
        assert torch.equal(found, wide.to(dtype))
    rows[2][3, 3] = torch.inf
    assert not layout.encode(block.numpy(), stored.numpy())


# --- the choice


@pytest.mark.parametrize("disk", [1e6, 1e8, 3e9])
@pytest.mark.parametrize("prefill", [1.0, 90.0, 1e4])
@pytest.mark.parametrize("per_token", [2_000, 62_000])
def test_the_faster_way_is_taken(disk: float, prefill: float, per_token: int) -> None:
    read, compute = per_token / disk, 1 / prefill
    for tokens in (1, 64, 2048):
        assert loading_pays(tokens, tokens * per_token, disk, prefill) == (read < compute)
        assert loading_pays(tokens, tokens * per_token, disk, None)
    assert not loading_pays(0, 0, disk, prefill)


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_leaves_give_way_first(data: st.DataObject) -> None:
    policy, there = Leaves(TierInfo(1, 8)), list[BlockKey]()
    for _ in range(40):
        ids = data.draw(IDS)
        for key in reversed([key for key in keys_of(ids) if key in there]):
            policy.on_hit(key)
        for key in keys_of(ids):
            if key not in there:
                policy.on_insert(key)
                there.append(key)
        order = list(policy.victims())
        assert sorted(order) == sorted(there)
        victim = order[0]
        assert not any(key.parent == victim.name for key in there)
        if len(there) > 8:
            policy.on_evict(victim)
            there.remove(victim)


def test_policies_over_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bench/kv_policies.py counts: an endless store finds the most; one that holds all blocks, as much."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    kv_policies = importlib.import_module("kv_policies")
    trace = list(kv_policies.made(200, seed=1))
    assert trace == list(kv_policies.made(200, seed=1))
    blocks, bound = len({one for request in trace for one in request["hash_ids"]}), kv_policies.hits(trace, None, 0)
    assert kv_policies.hits(trace, Leaves(TierInfo(1, blocks)), blocks) == bound
    assert 0 < kv_policies.hits(trace, Leaves(TierInfo(1, 100)), 100) < bound
    twice = [{"timestamp": at, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]} for at in range(2)]
    assert kv_policies.hits(twice, Leaves(TierInfo(1, 2)), 2) == 1023 / 2048  # the last token runs
    assert kv_policies.hits(twice, Leaves(TierInfo(1, 1)), 1) == 512 / 2048


# --- a model with a store


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., LLM]:
    def load(folder: str | Path, **options: Any) -> LLM:
        shape = {"context": 250, "prefill_chunk": 64, "kv_disk": "64MiB", "kv_folder": tmp_path / "kv"}
        return LLM.load(folder, budget=RAM, **{**shape, **options})

    return load


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def told(llm: LLM, ids: list[int], new: int = 6) -> list[tuple[int, Any]]:
    """The new tokens with the logits' order and values."""
    pieces = llm.stream(ids, params(new, logprobs=100), keep=Keep())
    return [(token, found) for piece in pieces for token, found in zip(piece.ids, piece.logprobs or [], strict=True)]


def disk_of(llm: LLM) -> kvdisk.KvTier:
    return llm.stats().kv["disk"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("toy", ["v3", "glm5-sparse", "qwen3", "gpt-oss"])
def test_the_same_bits_after_a_restart(
    toy: str, dtype: str, originals: Callable[[str], Path], load: Callable[..., LLM]
) -> None:
    folder, ids = originals(toy), prompt(210)
    with load(folder, kv_disk=None, kv_folder=None, kv_dtype=dtype) as llm:
        expected, other = told(llm, ids), told(llm, [*ids[:140], *prompt(30, 1)])
        assert list(llm.stats().kv) == ["ram"]
    with load(folder, kv_dtype=dtype) as llm:
        assert told(llm, ids) == expected
        assert disk_of(llm).hit_bytes == 0
    with load(folder, kv_dtype=dtype) as llm:
        assert disk_of(llm).tokens == 192
        assert told(llm, ids) == expected
        found = disk_of(llm)
        assert found.hit_tokens == 192 and found.hit_bytes > 0 and llm.stats().prompt_tokens == 18
        assert told(llm, [*ids[:140], *prompt(30, 1)]) == other  # the first 128 of them
        assert disk_of(llm).hit_tokens == 320


def test_rounded_values_are_near(toy_v3: tuple[Path, Any], load: Callable[..., LLM]) -> None:
    with load(toy_v3[0], kv_format="int8") as llm:
        expected = told(llm, prompt(210), 1)
    with load(toy_v3[0]) as llm:  # another format: another store
        assert disk_of(llm).tokens == 0
        assert told(llm, prompt(210), 1) == expected
    with load(toy_v3[0], kv_format="int8") as llm:
        told(llm, prompt(210), 1)
    with load(toy_v3[0], kv_format="int8") as llm:
        found = told(llm, prompt(210), 1)
        assert disk_of(llm).hit_tokens == 192
    assert found != expected
    assert found[0][1].logprob == pytest.approx(expected[0][1].logprob, abs=0.1)


def test_generated_tokens_are_stored_too(toy_v3: tuple[Path, Any], load: Callable[..., LLM]) -> None:
    ids = prompt(30)
    with load(toy_v3[0]) as llm:
        answer = ids_of(llm.stream(ids, params(110), keep=Keep()))
    with load(toy_v3[0]) as llm:
        told(llm, [*ids, *answer, 5])
        assert disk_of(llm).hit_tokens == 128


def test_only_requests_with_a_keep_are_stored(toy_v3: tuple[Path, Any], load: Callable[..., LLM]) -> None:
    with load(toy_v3[0]) as llm:
        llm.generate(prompt(150), params(1))
        llm.logits(prompt(150))
        assert disk_of(llm).stored == 0


def test_what_is_in_ram_is_not_read(toy_v3: tuple[Path, Any], load: Callable[..., LLM]) -> None:
    keep, ids = Keep(), prompt(150)
    with load(toy_v3[0]) as llm:
        ids_of(llm.stream(ids, params(1), keep=keep))
        ids_of(llm.stream([*ids, 3], params(1), keep=keep))
        kv = llm.stats().kv
        assert kv["ram"].hit_tokens == 150 and kv["disk"].hit_tokens == 0
        assert kv["ram"].hit_bytes == 150 * llm._runtime.scheduler.cache.token_bytes
        assert "KV values in disk" in dict(llm.stats().rows())


def test_a_block_that_is_in_ram_in_part(toy_v3: tuple[Path, Any], load: Callable[..., LLM]) -> None:
    keep = Keep()
    with load(toy_v3[0]) as llm:
        expected = told(llm, prompt(150))
    with load(toy_v3[0]) as llm:
        ids_of(llm.stream(prompt(150)[:100], params(1), keep=keep))
        pieces = list(llm.stream(prompt(150), params(6, logprobs=0), keep=keep))
        assert [piece.ids for piece in pieces] == [[token] for token, _ in expected]
        found = [one.logprob for piece in pieces for one in piece.logprobs or []]
        assert found == pytest.approx([one.logprob for _, one in expected], abs=1e-5)
        assert llm.stats().kv["ram"].hit_tokens == 100 and disk_of(llm).hit_tokens == 64 + 28


def test_it_is_computed_again_if_that_is_faster(
    toy_v3: tuple[Path, Any], load: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(toy_v3[0]) as llm:
        expected = told(llm, prompt(150))
    monkeypatch.setattr(stored, "loading_pays", lambda *_: False)
    with load(toy_v3[0]) as llm:
        assert told(llm, prompt(150)) == expected
        assert (disk_of(llm).skipped, disk_of(llm).hit_tokens) == (128, 0)


def test_a_damaged_block_is_computed_again(toy_v3: tuple[Path, Any], load: Callable[..., LLM], tmp_path: Path) -> None:
    with load(toy_v3[0]) as llm:
        expected = told(llm, prompt(210))
    (file,) = (tmp_path / "kv").glob("*/blocks")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # of the second of three
    file.write_bytes(content)
    with load(toy_v3[0]) as llm:
        assert told(llm, prompt(210)) == expected
        found = disk_of(llm)
        assert (found.hit_tokens, found.damaged) == (64, 64)
        assert any("damaged" in note for note in llm.stats().notes)
    with load(toy_v3[0]) as llm:  # it was stored again
        assert told(llm, prompt(210)) == expected and disk_of(llm).hit_tokens == 192


def test_a_full_disk_ends_the_writing_only(
    toy_v3: tuple[Path, Any], load: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(fd: int, data: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with load(toy_v3[0]) as llm:
        expected = [told(llm, prompt(150)), told(llm, prompt(150, 1))]
    monkeypatch.setattr(kvfiles, "_write", full)
    with load(toy_v3[0]) as llm:
        assert [told(llm, prompt(150)), told(llm, prompt(150, 1))] == expected
        assert disk_of(llm).hit_tokens == 256
        for seed in range(2, 5):
            told(llm, prompt(150, seed))
        notes = [note for note in llm.stats().notes if "No space left" in note]
        assert len(notes) == 1 and disk_of(llm).stored == 0
        assert sum("No space left" in record.getMessage() for record in caplog.records) == 1


def test_a_folder_that_cannot_be_used(toy_v3: tuple[Path, Any], load: Callable[..., LLM], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        load(toy_v3[0], kv_folder=tmp_path / "file" / "kv") as llm,
        load(toy_v3[0]) as first,
        load(toy_v3[0]) as second,
    ):
        assert any(note.startswith("kv_disk: ") for note in llm.stats().notes)
        assert told(llm, prompt(150)) == told(first, prompt(150)) == told(second, prompt(150))
        assert list(second.stats().kv) == list(llm.stats().kv) == ["ram"]
        assert any("another process" in note for note in second.stats().notes)


class Gate:
    """FAKE: reads of blocks that wait for ``open``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.open = threading.Event()
        real = BlockFiles.read

        def read(files: BlockFiles, slot: int, block: memoryview) -> None:
            self.open.wait(30)
            real(files, slot, block)

        monkeypatch.setattr(BlockFiles, "read", read)


@pytest.fixture
def gate(toy_v3: tuple[Path, Any], load: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A store with a prompt, whose reads wait."""
    with load(toy_v3[0]) as llm:
        told(llm, prompt(150))
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def test_others_run_while_a_sequence_loads(toy_v3: tuple[Path, Any], load: Callable[..., LLM], gate: Gate) -> None:
    with load(toy_v3[0]) as llm:
        expected = llm.generate(prompt(9), params(5))[0].ids
        waiting: list[Any] = []
        thread = threading.Thread(target=lambda: waiting.extend(told(llm, prompt(150))))
        thread.start()
        while not llm._runtime.scheduler._stored._loads:
            pass
        assert llm.generate(prompt(9), params(5))[0].ids == expected and not waiting
        gate.open.set()
        thread.join()
        assert len(waiting) == 6 and disk_of(llm).hit_tokens == 128


def test_a_load_that_is_cancelled(toy_v3: tuple[Path, Any], load: Callable[..., LLM], gate: Gate) -> None:
    with load(toy_v3[0]) as llm:
        scheduler = llm._runtime.scheduler
        request = llm._stream(SimpleQueue[Progress](), prompt(150), params(5), Keep())[1]
        request.submit()
        while not scheduler._stored._loads:
            pass
        request.cancel()
        assert llm.generate(prompt(9), params(1))[0].ids  # after the message
        assert not scheduler._stored._loads and not scheduler._running
        assert all(not entry.pins for entry in llm._runtime.kv_disk._entries.values())
        gate.open.set()
        assert len(told(llm, prompt(150))) == 6 and disk_of(llm).hit_tokens == 128


def test_a_disk_that_stalls(
    toy_v3: tuple[Path, Any], load: Callable[..., LLM], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "STALLED", 0.05)
    with load(toy_v3[0]) as llm:
        assert len(told(llm, prompt(150))) == 6
        assert disk_of(llm).hit_tokens == 0 and llm.stats().prompt_tokens == 150
        gate.open.set()
        assert len(told(llm, prompt(150))) == 6


def test_what_cannot_be_stored_is_refused(originals: Callable[[str], Path], load: Callable[..., LLM]) -> None:
    with pytest.raises(UsageError, match="states"):
        load(originals("qwen3-next"))
    with pytest.raises(UsageError, match="expected at least"):
        load(originals("v3"), kv_disk=100)
    with pytest.raises(UsageError, match="without kv_disk"):
        load(originals("v3"), kv_disk=None)
    with pytest.raises(UsageError, match="without kv_disk"):
        LLM.load(originals("v3"), kv_format="int8")
    with pytest.raises(UsageError, match="exact or int8"):
        load(originals("v3"), kv_format="fp4")
