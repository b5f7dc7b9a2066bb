"""What cannot be written: each output on a full or a read-only disk."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from full_disk import FullDisk

from tierlm import LLM, Budget, SamplingParams, StorageError, files
from tierlm.tracing import tracefile

RAM = Budget("8GiB")
FEW = SamplingParams(max_new_tokens=4, ignore_eos=True)


def test_a_full_disk_at_the_end_is_told_of_every_file(
    toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "timeline").write_text("old")
    with monkeypatch.context() as full:
        full.setattr(files, "open", FullDisk(0).open, raising=False)
        llm = LLM.load(toy_v3[0], budget=RAM, timeline=tmp_path / "timeline", trace=tmp_path / "trace")
        assert len(llm.generate([[5, 6, 7]], FEW)[0].ids) == 4
        with pytest.raises(StorageError, match="No space left on device") as caught:
            llm.close()
    for what in (r"heat (", f"trace: {tmp_path}/trace: cannot", f"timeline: {tmp_path}/timeline: cannot"):
        assert what in str(caught.value)
    assert (tmp_path / "timeline").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "timeline"]


def test_a_disk_that_fills_during_a_trace_fails_the_requests(
    toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracefile, "BLOCK_BYTES", 100)
    monkeypatch.setattr(files, "open", FullDisk(3000).open, raising=False)
    with LLM.load(toy_v3[0], budget=RAM, trace=tmp_path / "trace", heat=False) as llm:
        for _ in range(2):
            with pytest.raises(StorageError, match=r"trace: .*trace: cannot be written: No space left on device"):
                llm.generate([[5, 6, 7]], SamplingParams(max_new_tokens=40, ignore_eos=True))
    del llm
    gc.collect()  # zipfile may try to complete what it has
    assert not list(tmp_path.iterdir())


def test_an_error_is_not_hidden_by_what_cannot_be_written(
    toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "open", FullDisk(0).open, raising=False)
    with (
        pytest.warns(UserWarning, match="timeline: .* cannot be written"),
        pytest.raises(ZeroDivisionError),
        LLM.load(toy_v3[0], budget=RAM, timeline=tmp_path / "timeline", heat=False),
    ):
        raise ZeroDivisionError


@pytest.mark.parametrize("option", ["timeline", "trace"])
def test_a_read_only_disk_is_told_before_the_run(
    option: str, toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write to any folder
    with pytest.raises(StorageError, match=f"{option}: .*file: cannot be written: its folder is read-only"):
        LLM.load(toy_v3[0], budget=RAM, **{option: tmp_path / "file"})  # type: ignore[arg-type]


def test_the_command_on_a_full_disk(tmp_path: Path) -> None:
    """A real limit, of 100 bytes a file: the text is shown, each file is named, and nothing is left."""
    command = ["run", "demo", "-p", "The", "-n", "2", "--context", "64", "--timeline", "t", "--json", "j"]
    done = subprocess.run(
        [sys.executable, "-m", "tierlm", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert done.returncode == 1 and done.stdout.strip()
    assert "error: StorageError: j: cannot be written: File too large" in done.stderr
    assert "heat" in done.stderr and "timeline: t: cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr and ".py" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_trace_record_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("The\n")
    command = ["trace", "record", "demo", "--prompts", "prompts", "-o", "trace", "-n", "2", "--no-heat"]
    done = subprocess.run(
        [sys.executable, "-m", "tierlm", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert done.returncode == 1
    assert done.stderr == "error: StorageError: trace: trace: cannot be written: File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]
