"""The probe of a disk: its choice, its reads, and what is saved where."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm import LLM, Budget, SamplingParams
from tierlm.checkpoints import probe as probe_module
from tierlm.checkpoints.disk_profile import VERSION, DiskProfile, ProfileCache, disk_name, together
from tierlm.checkpoints.probe import (
    DEPTHS,
    ENOUGH,
    LASTS,
    MIB,
    SIZES,
    WORTHWHILE,
    Measurement,
    choose,
    find_profile,
    probe,
)
from tierlm.checkpoints.reader import DirectReader, MmapReader, Reader, Request, failure
from tierlm.checkpoints.record import ALIGNMENT
from tierlm.errors import StorageError
from tierlm.files import user_cache

PROFILE = settings(deadline=None, derandomize=True, max_examples=200)
FOUND = DiskProfile(4 * MIB, 4, 1.5e9, 0.003)


class Counting(Reader):
    """FAKE: a disk that takes no time and records its requests."""

    name = "direct"

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken
        self.requests: list[Request] = []
        self._lock = threading.Lock()

    def read(self, request: Request, buffer: memoryview) -> None:
        assert len(buffer) == request.hi - request.lo
        with self._lock:
            self.requests.append(request)
        if self.broken:
            raise failure(request, request.lo, "made to fail")

    def close(self) -> None:
        """Nothing to close."""


def sparse(file: Path, size: int) -> Path:
    """A file that takes no space."""
    file.touch()
    os.truncate(file, size)
    return file


@pytest.fixture
def big(tmp_path: Path) -> list[Path]:
    """The files of a model large enough to probe; one of them is not."""
    sizes = [WORTHWHILE // 2 + 5, WORTHWHILE // 2 + 4097, MIB]
    return [sparse(tmp_path / f"{i}.safetensors", size) for i, size in enumerate(sizes)]


@pytest.fixture
def cache(tmp_path: Path) -> ProfileCache:
    return ProfileCache(tmp_path / "cache" / "tierlm")


# --- the choice

measurements = st.lists(
    st.builds(Measurement, st.sampled_from(SIZES), st.sampled_from(DEPTHS), st.floats(1e6, 2e10)), min_size=1
)


@PROFILE
@given(measurements)
def test_the_choice_is_fast_enough_and_nothing_smaller_is(found: list[Measurement]) -> None:
    best = max(m.bytes_per_second for m in found)
    chosen = choose(found)
    assert chosen in found and chosen.bytes_per_second >= ENOUGH * best
    for other in found:
        if other.request_bytes * other.depth < chosen.request_bytes * chosen.depth:
            short = other.request_bytes < LASTS * best and other.request_bytes < chosen.request_bytes
            assert short or other.bytes_per_second < ENOUGH * best


def test_a_disk_that_needs_depth_gets_it_and_one_that_does_not_gets_the_least() -> None:
    rising = [Measurement(2 * MIB, depth, 1e8 * depth) for depth in DEPTHS]
    assert choose(rising).depth == max(DEPTHS)
    flat = [Measurement(size, depth, 1e9 + depth) for depth in DEPTHS for size in SIZES]
    assert choose(flat) == Measurement(min(SIZES), min(DEPTHS), 1e9 + min(DEPTHS))


def test_a_fast_disk_is_asked_for_more_at_a_time() -> None:
    rates = [1e9, 2 * MIB / LASTS, 4 * MIB / LASTS, 8 * MIB / LASTS, 1e12]
    found = [choose([Measurement(size, 4, rate) for size in SIZES]).request_bytes for rate in rates]
    assert found == [2 * MIB, 2 * MIB, 4 * MIB, 8 * MIB, 8 * MIB]


def test_of_equally_many_bytes_under_way_the_smaller_requests() -> None:
    """Smaller reads end sooner, so a demand gets its turn sooner."""
    one, other = Measurement(4 * MIB, 2, 1e9), Measurement(MIB, 8, 1e9)
    assert choose([one, other]) == choose([other, one]) == other


# --- the probe


def test_a_probe_reads_whole_aligned_requests_inside_the_files(big: list[Path]) -> None:
    reader = Counting()
    profile = probe(reader, big[:2])
    assert profile.request_bytes in SIZES and profile.depth in DEPTHS
    assert profile.bytes_per_second is not None and profile.latency is not None
    for request in reader.requests:
        assert request.lo % ALIGNMENT == 0 and request.hi - request.lo in SIZES
        assert request.lo >= 0 and request.hi <= os.path.getsize(request.extent.file)
    assert {request.extent.file for request in reader.requests} == set(big[:2])


def test_a_probe_reads_little(big: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """If time does not end it, bytes do: at most those of the model, give or take a sample."""
    monkeypatch.setattr(probe_module, "STAGE_SECONDS", 1e9)
    reader = Counting()
    probe(reader, big[:2])
    most_of_a_sample = max(64 * MIB, probe_module.SAMPLE_BYTES)
    read = sum(request.hi - request.lo for request in reader.requests)
    assert read <= WORTHWHILE + 2 * most_of_a_sample + 8 * MIB * probe_module.LATENCY_READS


@pytest.mark.parametrize("depth", [8, 16])
def test_a_probe_of_a_large_model_looks_at_every_size(
    tmp_path: Path, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "STAGE_SECONDS", 1e9)
    monkeypatch.setattr(probe_module, "DEPTHS", (depth,))
    reader = Counting()
    probe(reader, [sparse(tmp_path / "f", 4 * 2**30)])
    sizes = {size for size in SIZES if size * depth <= 64 * MIB}
    assert {request.hi - request.lo for request in reader.requests} == sizes
    assert sum(request.hi - request.lo for request in reader.requests) <= 1.5 * 2**30


def test_as_many_reads_are_under_way_as_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "STAGE_SECONDS", 1e9)
    monkeypatch.setattr(probe_module, "DEPTHS", (8,))
    together = threading.Barrier(8)
    held: list[int] = []

    class Gathering(Counting):
        """Holds the first reads of 8 MiB until there are eight."""

        def read(self, request: Request, buffer: memoryview) -> None:
            super().read(request, buffer)
            if request.hi - request.lo == 8 * MIB and len(held) < 8:
                held.append(threading.get_ident())
                together.wait(20)

    probe(Gathering(), [sparse(tmp_path / "f", 4 * 2**30)])
    assert len(set(held)) == 8


def test_a_probe_with_o_direct(big: list[Path]) -> None:
    try:
        os.close(os.open(big[0], os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the temporary folder's file system has no O_DIRECT")
    reader = DirectReader()
    assert probe(reader, big[:2]).bytes_per_second is not None
    reader.close()


# --- what is saved


def test_a_disk_is_probed_once(big: list[Path], cache: ProfileCache) -> None:
    first = Counting()
    profile, note = find_profile(first, big, "auto", cache)
    assert first.requests and profile.bytes_per_second is not None
    assert disk_name(big[0]) in note and str(profile) in note and "when probed" in note and "remembered" not in note
    second = Counting()
    assert find_profile(second, big, "auto", cache) == (profile, note)
    assert not second.requests


def test_refresh_probes_again_and_remembers_that(big: list[Path], cache: ProfileCache) -> None:
    assert cache.put(big[0], replace(FOUND, depth=200)) is None
    reader = Counting()
    profile, _ = find_profile(reader, big, "refresh", cache)
    assert reader.requests and profile.depth != 200
    assert cache.get(big[0]) == profile


def test_off_neither_probes_nor_takes_what_is_remembered(big: list[Path], cache: ProfileCache) -> None:
    cache.put(big[0], FOUND)
    reader = Counting()
    profile, note = find_profile(reader, big, "off", cache)
    assert profile == DiskProfile() and "not probed: as requested" in note and not reader.requests


@pytest.mark.parametrize("mode", ["auto", "refresh"])
def test_memory_mapped_files_are_not_probed(big: list[Path], cache: ProfileCache, mode: str) -> None:
    profile, note = find_profile(MmapReader(), big, mode, cache)
    assert profile == DiskProfile() and "not probed: reads through the page cache" in note


@pytest.mark.parametrize("sizes", [[WORTHWHILE - 1], [MIB] * 600], ids=["small", "in small files"])
@pytest.mark.parametrize("mode", ["auto", "refresh"])
def test_a_small_model_is_not_probed(tmp_path: Path, cache: ProfileCache, sizes: list[int], mode: str) -> None:
    files = [sparse(tmp_path / f"{i}.safetensors", size) for i, size in enumerate(sizes)]
    reader = Counting()
    profile, note = find_profile(reader, files, mode, cache)
    assert profile == DiskProfile() and "not probed: less than 512.00 MiB" in note and not reader.requests


def test_a_probe_that_fails_leaves_the_defaults(big: list[Path], cache: ProfileCache) -> None:
    profile, note = find_profile(Counting(broken=True), big, "auto", cache)
    assert profile == DiskProfile() and "not probed" in note and "made to fail" in note
    assert cache.get(big[0]) is None
    with pytest.raises(StorageError, match="made to fail"):
        probe(Counting(broken=True), big[:2])


def test_the_cache_gives_back_what_was_put(big: list[Path], cache: ProfileCache, tmp_path: Path) -> None:
    assert cache.get(big[0]) is None
    assert cache.put(big[0], FOUND) is None
    assert cache.get(big[1]) == FOUND  # another file of the same disk
    assert ProfileCache(tmp_path / "cache" / "tierlm").get(big[0]) == FOUND
    assert os.listdir(tmp_path / "cache" / "tierlm") == ["disk.json"]


def test_other_disks_stay_in_the_file(big: list[Path], cache: ProfileCache, tmp_path: Path) -> None:
    cache.put(big[0], FOUND)
    file = tmp_path / "cache" / "tierlm" / "disk.json"
    content = json.loads(file.read_text())
    content["disks"]["another 1:2"] = entry(depth=3)
    file.write_text(json.dumps({**content, "disks": {**content["disks"], "damaged": entry(depth="3")}}))
    cache.put(big[0], replace(FOUND, depth=2))
    content["disks"] = {key: entry | {"depth": 2} if key[:8] != "another " else entry
                        for key, entry in content["disks"].items()}  # fmt: skip
    assert json.loads(file.read_text()) == content


def entry(**changes: Any) -> dict[str, Any]:
    return {"request_bytes": 4 * MIB, "depth": 4, "bytes_per_second": 1.5e9, "latency": 0.003} | changes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"version": 1}',
        '{"version": 1, "disks": []}',
        "\x00\x01",
        json.dumps({"version": VERSION + 1, "disks": {"KEY": entry()}}),
        json.dumps({"version": VERSION, "disks": {"KEY": None}}),
        *(json.dumps({"version": VERSION, "disks": {"KEY": wrong}}) for wrong in [
            entry(request_bytes=4 * MIB + 1), entry(request_bytes=0), entry(request_bytes=-ALIGNMENT),
            entry(request_bytes=2**50), entry(request_bytes=1e6), entry(request_bytes=True), entry(depth=0),
            entry(depth=257), entry(depth="8"), entry(depth=True), entry(bytes_per_second=float("inf")),
            entry(bytes_per_second=float("nan")), entry(bytes_per_second=0.0), entry(bytes_per_second=None),
            entry(latency=-1.0), entry(latency="1"), {},
        ]),
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_a_cache_that_makes_no_sense_is_written_anew(big: list[Path], tmp_path: Path, text: str) -> None:
    cache = ProfileCache(tmp_path)
    cache.put(big[0], FOUND)
    (key,) = json.loads((tmp_path / "disk.json").read_text())["disks"]
    (tmp_path / "disk.json").write_text(text.replace("KEY", key))
    reader = Counting()
    profile, _ = find_profile(reader, big, "auto", cache)
    assert reader.requests
    assert cache.get(big[0]) == profile


def test_the_check_of_entries_lets_good_ones_through(big: list[Path], tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    cache.put(big[0], DiskProfile())
    assert cache.get(big[0]) is None  # nothing measured, nothing saved
    (key,) = json.loads((tmp_path / "disk.json").read_text())["disks"]
    (tmp_path / "disk.json").write_text(json.dumps({"version": VERSION, "disks": {key: entry()}}))
    assert cache.get(big[0]) == FOUND


@pytest.mark.parametrize("how", ["a file in its place", "a full disk", "no folder"])
def test_a_cache_that_cannot_be_written_is_told_and_harmless(
    big: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    folder = tmp_path / "cache"
    if how == "a file in its place":
        folder.write_text("not a folder")
    elif how == "a full disk":  # FAKE: os.fsync

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    cache = ProfileCache(None if how == "no folder" else folder)
    profile, note = find_profile(Counting(), big, "auto", cache)
    assert profile.bytes_per_second is not None and "not remembered: " in note
    assert cache.get(big[0]) is None
    if how == "a full disk":
        assert os.listdir(folder) == []  # the partial file is removed


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "tierlm"
    monkeypatch.setenv("HOME", "/home/somebody")
    for ignored in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert user_cache() == Path("/home/somebody/.cache/tierlm")


# --- profiles


def test_profile_in_words() -> None:
    assert str(FOUND) == "4 reads of 4.00 MiB at a time, 1.50 GB/s when probed"
    assert str(DiskProfile()) == "8 reads of 8.00 MiB at a time"


def test_several_disks_together() -> None:
    other = DiskProfile(MIB, 16, 3e9, 0.001)
    assert together([FOUND]) == FOUND
    assert together([FOUND, other]) == DiskProfile(4 * MIB, 20, 4.5e9, 0.003)
    assert together([FOUND, DiskProfile()]) == DiskProfile(8 * MIB, 12)
    assert together([other] * 40).depth == 256


@pytest.mark.parametrize(("nbytes", "depth"), [(4 * MIB, 4), (8 * MIB, 4), (2 * MIB, 8), (64 * 1024, 16), (0, 16)])
def test_smaller_reads_need_more_at_a_time(nbytes: int, depth: int) -> None:
    assert FOUND.depth_of(nbytes) == depth
    assert replace(FOUND, depth=40).depth_of(nbytes) == 40
    assert DiskProfile().depth_of(nbytes) == 8  # nothing is known of that disk


# --- a loaded model


@pytest.fixture
def padded(toy_v3: tuple[Path, Any], tmp_path: Path) -> Path:
    """The toy beside a large unused sparse shard."""
    folder = tmp_path / "padded"
    folder.mkdir()
    for file in toy_v3[0].iterdir():
        (folder / file.name).symlink_to(file)
    header = {"unused": {"dtype": "U8", "shape": [WORTHWHILE], "data_offsets": [0, WORTHWHILE]}}
    text = json.dumps(header).encode()
    shard = folder / "padding.safetensors"
    shard.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(shard, 8 + len(text) + WORTHWHILE)
    (folder / "model.safetensors").unlink()
    weights = toy_v3[0] / "model.safetensors"
    (folder / "weights.safetensors").symlink_to(weights)
    length = int.from_bytes(weights.read_bytes()[:8], "little")
    names = [name for name in json.loads(weights.read_bytes()[8 : 8 + length]) if name != "__metadata__"]
    index = {"weight_map": dict.fromkeys(names, "weights.safetensors") | {"unused": "padding.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_loaded_model_uses_and_reports_the_profile(
    padded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = ProfileCache(tmp_path / "cache" / "tierlm")
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    tokens, notes = [], []
    for mode in ("auto", "auto", "refresh", "off"):
        with LLM.load(padded, budget=Budget("8GiB"), probe=mode) as llm:
            if llm.stats().reader == "mmap":
                pytest.skip("the temporary folder's file system has no O_DIRECT")
            runtime = llm._runtime
            disk: Any = runtime.experts[-1].source
            assert disk.request_bytes == runtime.disk_profile.request_bytes
            small = runtime.catalog.record(runtime.catalog.experts()[0]).nbytes
            assert len(runtime.transfer.threads._threads) == runtime.disk_profile.depth_of(small)
            assert (runtime.disk_profile == DiskProfile()) == (mode == "off")
            assert mode == "off" or cache.get(padded / "padding.safetensors") == runtime.disk_profile
            notes.append(next(note for note in llm.stats().notes if note.startswith("disk ")))
            tokens.append(llm.generate([[5, 6, 7]], params)[0].ids)
    assert notes[0] == notes[1] and "not probed: as requested" in notes[3]
    assert len({tuple(ids) for ids in tokens}) == 1


def test_the_number_of_threads_can_be_set(toy_v3: tuple[Path, Any]) -> None:
    for asked, threads in ((3, 3), (None, 8)):
        with LLM.load(toy_v3[0], budget=Budget("8GiB"), transfer_threads=asked) as llm:
            assert len(llm._runtime.transfer.threads._threads) == threads
    with LLM.load(toy_v3[0], budget=Budget("8GiB", vram="1GiB")) as llm:
        assert len(llm._runtime.transfer.threads._threads) == 10  # two that copy


def test_an_interrupted_probe_leaves_no_file_open(
    padded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def interrupted(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(probe_module, "choose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LLM.load(padded, budget=Budget("8GiB"))
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    assert str(padded / "padding.safetensors") not in map(os.path.realpath, links)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tierlm-probe")]
