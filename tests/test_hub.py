"""Models of the Hub: ids, choice of files, and weights that arrive while the model runs."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_gguf import write_gguf
from made_hub import COMMIT, REPO, MadeHub, serving
from rich.console import Console

import tierlm.progress
from tierlm import LLM
from tierlm.checkpoints import arriving, staging
from tierlm.checkpoints.hub import HubId, find_model
from tierlm.config import format_size
from tierlm.errors import CheckpointError, StorageError, UsageError
from tierlm.planning.known import find_config
from tierlm.progress import prefill_bar

Serve = Callable[[MadeHub], MadeHub]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def serve(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Serves one hub until the end of the test."""
    monkeypatch.setattr(staging, "CHUNK", 4096)
    monkeypatch.setattr(arriving, "PAUSE", 0.01)
    began = []

    def serve(hub: MadeHub) -> MadeHub:
        began.append(serving(hub, cache, monkeypatch))
        return began[-1].__enter__()

    yield serve
    for each in began:
        each.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name:Q4_K_M", HubId("org/name", None, "Q4_K_M")),
        ("hf.co/org/name@refs/pr/1:sub/a.gguf", HubId("org/name", "refs/pr/1", "sub/a.gguf")),
        ("https://huggingface.co/org/name", HubId("org/name")),
        ("name", None),
        ("a/b/c", None),
        ("../b", None),
        ("org/name@", None),
        ("org/name:", None),
    ],
)
def test_ids(text: str, found: HubId | None) -> None:
    assert HubId.parse(text) == found


def test_a_whole_download_is_the_librarys_and_is_found_offline(
    toy_v3: tuple[Path, object], serve: Serve, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub = serve(MadeHub.of(toy_v3[0]))
    hub.files["original/model.safetensors"] = b"not wanted"
    folder = find_model(f"{REPO}@v1")
    assert folder.name == COMMIT and not (folder / "original").exists()
    for file in toy_v3[0].iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model(f"{REPO}@v1") == folder
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"(?s)org/model@v1: .*in the cache .*run once online"):
        find_model(f"{REPO}@v1")
    with pytest.raises(CheckpointError, match=r"org/other: no such folder, and not available on the Hub"):
        find_model("org/other")


def test_what_the_hub_refuses(toy_v3: tuple[Path, object], serve: Serve) -> None:
    hub = serve(MadeHub.of(toy_v3[0]))
    for name in (f"{REPO}@v2", "org/other"):
        with pytest.raises(CheckpointError, match=f"{name}: no such folder, and not available on the Hub: .*404"):
            find_model(name)
    hub.token = "secret"
    with pytest.raises(CheckpointError, match=r"not available on the Hub: .*40[13]"):
        find_model(REPO)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q8_0", "Q8_0/m-Q8_0-00001-of-00002.gguf"),
        ("Q4_K_S", "m.Q4_K_S.gguf"),
        ("m.IQ4_XS.gguf", "m.IQ4_XS.gguf"),
    ],
)
def test_a_gguf_model_is_chosen_by_its_quantisation(wanted: str, found: str, serve: Serve) -> None:
    names = ["m-Q4_K_M.gguf", "m.Q4_K_S.gguf", "m.IQ4_XS.gguf", "mmproj-m-Q8_0.gguf"]
    split = [f"Q8_0/m-Q8_0-0000{part}-of-00002.gguf" for part in (1, 2)]
    serve(MadeHub({name: b"GGUF" + name.encode() for name in [*names, *split]}))
    file = find_model(f"{REPO}:{wanted}")
    assert file.read_bytes() == b"GGUF" + found.encode() and str(file).endswith(found)
    here = {each.name for each in file.parents[len(Path(found).parents) - 1].rglob("*.gguf")}
    assert here == ({Path(each).name for each in split} if found in split else {found})


@pytest.mark.parametrize("wanted", ["", ":Q4_K", ":Q4_XS", ":Q"])
def test_a_choice_that_is_not_clear_is_refused_with_the_choices(wanted: str, serve: Serve) -> None:
    serve(MadeHub({"m-Q4_K_M.gguf": b"1", "m-IQ4_XS.gguf": b"2"}))
    with pytest.raises(UsageError, match=r"expected .* found [02]; give one of 'm-IQ4_XS.gguf', 'm-Q4_K_M.gguf'"):
        find_model(REPO + wanted)


def test_text_begins_while_weights_arrive_and_a_later_run_finds_them(
    originals: Callable[[str], Path], serve: Serve, cache: Path, ids: list[int]
) -> None:
    folder = originals("v3")
    with LLM.load(folder, budget="2GiB", device="cpu") as llm:
        expected = llm.generate(ids)[0].ids
    hub = serve(MadeHub.of(folder))
    hub.token = ""
    calls = iter(range(10**6))
    hub.allow = lambda name, start, stop: (stop - start) // 2 if next(calls) % 3 == 1 else None  # cut off every third
    with LLM.load(REPO, budget="2GiB", device="cpu") as llm:
        assert llm.generate(ids)[0].ids == expected
        assert any("arrives from the Hub" in note for note in llm.stats().notes)
        for thread in llm._runtime.reader._arrivals._threads:  # type: ignore[union-attr]
            thread.join(60)
    sent = len(hub.sent)
    found = find_model(REPO)
    assert "snapshots" in found.parts and len(hub.sent) == sent, "nothing is fetched twice"
    for file in folder.glob("*.safetensors"):
        assert (found / file.name).read_bytes() == file.read_bytes()
    assert not list((cache / "models--org--model/arriving").rglob("*.safetensors")), "no second name is left"
    with LLM.load(REPO, budget="2GiB", device="cpu") as llm:
        assert llm.generate(ids)[0].ids == expected


def test_only_what_is_needed_is_waited_for_and_the_rest_is_resumed(
    originals: Callable[[str], Path], serve: Serve, cache: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = originals("v3")
    with LLM.load(folder, budget="2GiB", device="cpu") as llm:
        expected = llm.generate(ids[:2])[0].ids
    hub = serve(MadeHub.of(folder))
    start = arriving.Arrivals.start
    monkeypatch.setattr(arriving.Arrivals, "start", lambda arrivals: None)
    with LLM.load(REPO, budget="2GiB", device="cpu") as llm:
        assert llm.generate(ids[:2])[0].ids == expected
        here, total = llm.stats().arrived or (0, 0)
    assert 0 < here < total
    first, hub.sent = set(hub.sent), []
    monkeypatch.setattr(arriving.Arrivals, "start", start)
    staged = find_model(REPO, whole=False)
    arrivals = arriving.Arrivals(staged)
    assert arrivals.progress == (here, total), "what is here was not forgotten"
    arrivals.start()
    for thread in arrivals._threads:
        thread.join(60)
    arrivals.close()
    assert hub.sent and not first & set(hub.sent), "nothing is fetched twice"
    assert "snapshots" in find_model(REPO).parts


def test_a_bar_shows_what_has_arrived_until_the_first_token(
    originals: Callable[[str], Path], serve: Serve, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(tierlm.progress, "Console", lambda stderr: terminal)
    monkeypatch.setattr(arriving.Arrivals, "start", lambda arrivals: None)
    serve(MadeHub.of(originals("v3")))

    def shown() -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())

    with LLM.load(REPO, budget="2GiB", device="cpu") as llm:
        with prefill_bar(llm) as bar:
            bar(0, 7)
            here, total = map(format_size, llm.stats().arrived or (0, 0))
            bar(7, 7)
        assert re.search(rf"weights .* {here} of {total}, 0.00 GB/s", shown())
        before = shown()
        llm.generate(ids[:2], on_prefill=bar)
        assert shown() == before, "nothing is drawn over the answer"
        monkeypatch.setattr(type(llm._runtime.reader), "arrived", (5, 5))  # type: ignore[union-attr]
        with prefill_bar(llm) as bar:
            bar(7, 7)
        assert "prompt" in shown()[len(before) :] and "weights" not in shown()[len(before) :]


def test_a_connection_that_brings_nothing_is_an_error_that_names_file_and_tensor(
    originals: Callable[[str], Path], serve: Serve, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arriving, "STALL", 0.2)
    hub = serve(MadeHub.of(originals("v3")))
    staged = find_model(REPO, whole=False)
    hub.allow = lambda name, start, stop: 0
    with pytest.raises(StorageError, match=r"model\.safetensors: reading .* does not arrive from the Hub: .*ended"):
        LLM.load(staged, budget="2GiB", device="cpu")


def test_a_file_that_arrives_damaged_is_not_kept(
    originals: Callable[[str], Path], serve: Serve, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = serve(MadeHub.of(originals("v3")))
    etag = hub.etag("model.safetensors")
    monkeypatch.setattr(hub, "etag", lambda name: etag[::-1] if name == "model.safetensors" else "0" * 40)
    staged = find_model(REPO, whole=False)
    arrivals = arriving.Arrivals(staged)
    arrivals.start()
    for thread in arrivals._threads:
        thread.join(60)
    arrivals.close()
    with pytest.raises(OSError, match=f"arrived with the SHA-256 {etag}, expected {etag[::-1]}"):
        arrivals.wait(arrivals.files[0], 0, 1)
    assert not (cache / "models--org--model/blobs" / etag[::-1]).exists()
    again = arriving.Arrivals(staged)
    assert again.progress[0] == 0, "it is fetched again"
    again.close()


def test_a_gguf_model_arrives_too_and_its_plan_needs_the_header_alone(
    originals: Callable[[str], Path], serve: Serve, tmp_path: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "toy-F32.gguf"
    write_gguf(originals("olmoe"), file)
    with LLM.load(file, budget="2GiB", device="cpu") as llm:
        expected = llm.generate(ids)[0].ids
    monkeypatch.setattr(arriving, "GGUF_HEADER", 2**16)
    hub = serve(MadeHub({file.name: file.read_bytes(), "README.md": b""}))
    config = find_config(f"{REPO}:F32")
    assert config.config["model_type"] == "olmoe" and config.path is not None
    assert {start for _, start in hub.sent} == {0} and find_config(REPO).config == config.config
    with LLM.load(f"{REPO}:F32", budget="2GiB", device="cpu") as llm:
        assert llm.generate(ids)[0].ids == expected


def test_the_token_goes_to_the_hub_alone(
    originals: Callable[[str], Path], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub = serve(MadeHub.of(originals("v3")))
    hub.token, hub.elsewhere = "secret", True
    staged = find_model(REPO, whole=False)
    arrivals = arriving.Arrivals(staged)
    arrivals.wait(arrivals.files[0], 0, 2**16)
    arrivals.close()
    assert hub.tokens_elsewhere == {None}


def test_run_and_plan_by_id(originals: Callable[[str], Path], serve: Serve, cache: Path) -> None:
    """In a process of its own, which reads the settings of the library itself."""
    folder = originals("v3")
    hub = serve(MadeHub.of(folder))
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}

    def tierlm(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tierlm", *words]
        return subprocess.run(command, env={**os.environ, **settings, **more}, capture_output=True, text=True)

    words = ("--ids", "3,4,5", "-n", "4", "--ram", "2GiB", "--device", "cpu", "-q")
    planned = tierlm("plan", REPO, "--ram", "1GiB", "--prompt", "64")
    assert planned.returncode == 0 and not hub.sent, planned.stderr
    local, remote = tierlm("run", str(folder), *words), tierlm("run", f"{REPO}@v1", *words)
    assert (remote.returncode, remote.stdout) == (0, local.stdout) and local.stdout.strip(), remote.stderr
    assert find_model(f"{REPO}@v1").is_dir()
    assert tierlm("run", f"{REPO}@v1", *words, HF_HUB_OFFLINE="1").stdout == local.stdout
    refused = tierlm("run", "org/other", *words, HF_HUB_OFFLINE="1")
    assert refused.returncode == 1 and "org/other: no such folder, and not available on the Hub" in refused.stderr


def test_a_whole_download_continues_what_has_arrived(
    originals: Callable[[str], Path], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = serve(MadeHub.of(originals("v3")))
    staged = find_model(REPO, whole=False)
    arrivals = arriving.Arrivals(staged)
    file = arrivals.files[0]
    arrivals.wait(file, 0, 2**16)
    arrivals.close()
    hub.sent = []
    hub.allow = lambda name, start, stop: 0
    monkeypatch.setattr(arriving, "STALL", 0.2)
    with pytest.raises(CheckpointError, match="nothing arrived"):
        find_model(REPO)
    hub.sent, hub.allow = [], lambda name, start, stop: None
    found = find_model(REPO)
    assert (found / file.name).read_bytes() == hub.files[file.name]
    assert hub.sent and min(start for _, start in hub.sent) >= 2**16


def test_a_disk_without_room_is_an_error_before_the_download(
    originals: Callable[[str], Path], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(MadeHub.of(originals("v3")))
    staged = find_model(REPO, whole=False)
    monkeypatch.setattr(arriving.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match="still to arrive from the Hub, 1000 B of the disk are free"):
        LLM.load(staged, budget="2GiB", device="cpu")
