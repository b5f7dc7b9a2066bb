"""Invalid input fails before anything is opened; later failures leave nothing open."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tierlm import LLM, Budget, StorageError, TierlmError, loading
from tierlm.memory import opening

RAM = Budget("8GiB")

# Each option, with an error that only loading can find.
WRONG: dict[str, Any] = {
    "device": "quantum",
    "policy": "best",
    "predictor": "oracle",
    "context": 10**6,
    "timeline": "none/such/t.json",
    "trace": "none/such/t",
    "mirrors": ("none/such",),
    "reader": "direct",
}


def open_files() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return {name for name in found if name.startswith("/") and not name.startswith(("/dev", "/proc"))}


def own_threads() -> set[threading.Thread]:
    """Those of tierlm: libraries start threads of their own at first use."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("tierlm")}


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    threads, files = own_threads(), open_files()
    yield
    assert own_threads() <= threads
    assert open_files() <= files


@pytest.mark.parametrize("option", WRONG)
def test_every_option_wrong_in_turn(option: str, toy_v3: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reported before a disk is opened or probed; errors that only the disk reveals leave nothing open."""
    if option == "reader":
        monkeypatch.setattr("tierlm.checkpoints.reader._direct_refusal", lambda file: "no O_DIRECT here")
    elif option != "mirrors":
        monkeypatch.setattr(loading, "open_disk", lambda *arguments: pytest.fail("opened before all was checked"))
    with nothing_left_behind(), pytest.raises(TierlmError):
        LLM.load(toy_v3[0], budget=RAM, **{option: WRONG[option]})


def test_a_budget_below_the_floor_opens_nothing(toy_v3: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "open_disk", lambda *arguments: pytest.fail("opened before all was checked"))
    with nothing_left_behind(), pytest.raises(TierlmError):
        LLM.load(toy_v3[0], budget=Budget("1MiB"))


STEPS = ["Disk", "open_store", "KvCache", "Embedding", "Decoder", "Scheduler", "Runtime"]


@pytest.mark.parametrize("step", STEPS)
def test_an_error_at_any_step_leaves_nothing_open(
    step: str, toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise StorageError("made up")

    monkeypatch.setattr(loading, step, fail)
    with nothing_left_behind(), pytest.raises(StorageError, match="made up"):
        LLM.load(toy_v3[0], budget=RAM, trace=tmp_path / "trace", timeline=tmp_path / "timeline")
    assert list(tmp_path.iterdir()) == []


def test_a_trunk_that_cannot_be_read_leaves_nothing_open(
    toy_v3: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Callable[..., Any] = opening.open_disk

    def opened(*arguments: Any) -> Any:
        reader, *others = read(*arguments)
        monkeypatch.setattr(reader, "descriptor", lambda file: None)
        monkeypatch.setattr(reader, "read", lambda request, buffer: (_ for _ in ()).throw(StorageError("made up")))
        return reader, *others

    monkeypatch.setattr(loading, "open_disk", opened)
    with nothing_left_behind(), pytest.raises(StorageError, match="made up"):
        LLM.load(toy_v3[0], budget=RAM)
