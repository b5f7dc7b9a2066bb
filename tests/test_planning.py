"""``tierlm plan``, ``profile`` and ``doctor`` as a user sees them, and the measurements behind ``profile``."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tierlm import UsageError, cli
from tierlm.checkpoints.hub import DEMO
from tierlm.kernels import widen
from tierlm.models.outline import Outline, work_of
from tierlm.planning.known import find_config
from tierlm.profiling import arithmetic, bandwidth, health, storage
from tierlm.profiling.picture import draw, hardware, tiers
from tierlm.profiling.profile import DiskRate, MemoryRate, Profile, Spread, default_file
from tierlm.profiling.storage import Cell, file_system, files_of, measure_disk

MIB = 2**20
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tierlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line as the console script does, in this process: exit code, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tierlm", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_plan_says_bytes_slots_and_speed(tierlm: Command) -> None:
    code, out, _ = tierlm("plan", "DeepSeek-V3", "--ram", "64GiB", "--json", "-")
    found = json.loads(out)
    assert code == 0
    assert found["format"] == "fp8" and found["bytes"]["file"] == pytest.approx(689e9, rel=0.005)
    assert found["bytes"]["kv"] * 71 < found["bytes"]["kv_expanded"] < found["bytes"]["kv"] * 72
    ram = found["tiers"]["ram"]
    assert sum(ram["parts"].values()) <= 64 * 2**30 and ram["expert_slots"] > 1000 and not ram["streamed"]
    low, high = found["decode_range"]
    assert low < found["predicted"]["typical"]["decode_tokens_per_second"] < high
    assert found["predicted"]["typical"]["step"]["bound"] == "disk"
    assert found["more"]["a disk twice as fast"] > found["predicted"]["typical"]["decode_tokens_per_second"]
    code, out, _ = tierlm("plan", "kimi-k2", "--ram", "128GiB", "--vram", "24GiB", "--format", "int4")
    assert code == 0
    for word in ("expert slots", "floor", "tokens/s", "bound by", "hit rate", "1 GiB more vram", "assumed"):
        assert word in out


def test_plan_with_recorded_routing(tierlm: Command, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"layers": [[0, 99], [5, 3]]}\n' * 40)
    arguments = ("plan", "DeepSeek-V3", "--ram", "64GiB", "--trace", str(trace))
    found = json.loads(tierlm(*arguments, "--json", "-")[1])
    assert found["predicted"]["typical"]["hit_rate"] == 1.0 > found["predicted"]["worst"]["hit_rate"]
    assert "as recorded" in found["routing"] and "another model" in found["routing"]
    assert "at the same share of slots" in " ".join(tierlm(*arguments)[1].split())
    trace.write_text("nonsense")
    code, _, err = tierlm(*arguments)
    assert code == 1 and "TraceError" in err


def test_plan_takes_a_given_disk_and_machine(tierlm: Command, tmp_path: Path) -> None:
    disk = DiskRate("/", "d", "direct", "random", MIB, 8, Spread(5e9, 4e9, 6e9), (1e-3, 2e-3, 3e-3), 1.0)
    file = tmp_path / "profile.json"
    Profile("today", "p", 2, 2**34, 2**34, disks=[disk], disk_capacity={"/": 2**40}).write(file)
    arguments = ("plan", "demo", "--ram", "1GiB", "--json", "-", "--machine", str(file))
    rates = json.loads(tierlm(*arguments)[1])["rates"]
    assert (rates["disk"], rates["origins"]["disk"]) == (5e9, "measured today")
    rates = json.loads(tierlm(*arguments, "--disk-bandwidth", "7GB")[1])["rates"]
    assert (rates["disk"], rates["origins"]["disk"]) == (7e9, "given")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("plan", "DeepSeek-V3", "--ram", "2GiB"), 1, "below the floor"),
        (("plan", "DeepSeek-V3", "--ram", "64GiB", "--vram", "1GiB"), 1, "vram budget"),
        (("plan", "nonsense", "--ram", "64GiB"), 2, "no known model"),
        (("plan", "demo", "--ram", "much"), 2, "expected a size"),
        (("plan", "demo", "--ram", "1GiB", "--format", "int3"), 2, "expected one of"),
        (("plan", "demo", "--ram", "1GiB", "--context", "99999"), 2, "context"),
        (("plan", "demo", "--ram", "1GiB", "--prompt", "0"), 2, "prompt"),
        (("plan", "demo", "--ram", "1GiB", "--machine", "absent.json"), 2, "cannot be read"),
        (("plan", "demo", "--ram", "1GiB", "--disk-bandwidth", "0"), 2, "more than 0"),
        (("profile", "--path", "/nowhere"), 2, "expected a folder"),
        (("profile", "--json", "/nowhere/p.json"), 2, "cannot be written"),
        (("doctor", "nonsense"), 2, "no known model"),
    ],
)
def test_what_is_refused(tierlm: Command, arguments: tuple[str, ...], code: int, words: str) -> None:
    got, out, err = tierlm(*arguments)
    assert got == code
    assert words in " ".join((out + err).split())


def test_a_folder_that_may_not_be_entered(tierlm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Path.is_dir

    def refuse(path: Path) -> bool:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(Path, "is_dir", refuse)  # root, who runs tests in some places, may enter any folder
    for command in (("plan", "locked", "--ram", "1GiB"), ("profile", "--path", "locked")):
        code, _, err = tierlm(*command)
        assert code == 1 and "locked: Permission denied" in err and "Traceback" not in err
    code, out, _ = tierlm("doctor", "locked")
    assert code == 1 and "locked: Permission denied" in out and "make it readable" in out


def test_a_profile_that_cannot_be_kept_is_not_measured(
    tierlm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("tierlm.cli.measuring._measure", lambda *_: pytest.fail("measured for nothing"))
    code, _, err = tierlm("profile", "--json", str(tmp_path / "p.json"))
    assert code == 1 and "p.json: cannot be written: Read-only file system" in " ".join(err.split())


def test_where_torch_has_no_room_the_rest_is_measured(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a small memory cgroup the command used to be killed."""
    from tierlm.cli import measuring

    monkeypatch.setattr("tierlm.host.available_ram", lambda: 300 * MIB)
    monkeypatch.setattr(storage, "cells", lambda: [Cell("direct", "random", MIB, 2)])
    found = measuring._measure([tmp_path], lambda what, total: lambda: None)
    assert found.memory and found.touch and not found.kernels and found.layer is None
    assert any("300.00 MiB of RAM are free" in missing for missing in found.missing)


def test_the_engine_is_timed_with_other_weights_between_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierlm.cli import overhead

    runs = 0

    class Stream:
        def run(self) -> None:
            nonlocal runs
            runs += 1

    monkeypatch.setattr(arithmetic, "Stream", Stream)
    monkeypatch.setattr(overhead, "DEMO_TOKENS", 3)
    layer, record = overhead.engine_seconds()
    assert 2 * overhead.DEMO_LAYERS <= runs <= 3 * overhead.DEMO_LAYERS, "before each step, as much as all layers have"
    assert layer > 0 and record >= 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_to_a_full_disk_is_one_line() -> None:
    """Whether it is found in the middle or, of a short output, at the end."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for words in (("plan", "demo", "--ram", "1GiB", "--json", "-"), ("--version",)):
        command = [sys.executable, "-m", "tierlm", *words]
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
        assert done.returncode == 1 and done.stderr == "error: [Errno 28] No space left on device\n"


def test_plan_and_doctor_start_without_torch() -> None:
    """Users plan before they install anything for a card, and expect an answer at once."""
    script = "import sys; sys.argv = ['tierlm', 'plan', 'DeepSeek-V3', '--ram', '64GiB', '--json', '-']\n"
    script += "from tierlm.cli import main\nmain()\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_doctor_on_a_model_that_is_whole_and_one_that_is_not(
    tierlm: Command, toy_v3: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = toy_v3
    code, out, _ = tierlm("doctor", str(folder), "--json", "-")
    found = json.loads(out)
    assert code == 0 and found["fit"]
    areas = {finding["area"] for finding in found["findings"]}
    assert {"checkpoint", "file system", "checksums", "budget", "packing", "open files", "kernels"} <= areas
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    code, out, _ = tierlm("doctor", str(tmp_path))
    assert code == 1
    assert "truncated" in out and "download the model again" in " ".join(out.split())


def test_doctor_says_what_a_model_lacks(tierlm: Command, toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    def found(level: str) -> dict[str, str]:
        findings = json.loads(tierlm("doctor", str(tmp_path), "--json", "-")[1])["findings"]
        return {f["area"]: f"{f['what']} -> {f['todo']}" for f in findings if f["level"] == level}

    for file in toy_v3[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "deepseek_v3" in found("ok")["architecture"]
    assert "no such file" in found("note")["tokenizer"] and "--ids" in found("note")["tokenizer"]
    for file in DEMO.glob("tokenizer*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "tokens" in found("ok")["tokenizer"] and "chat template" in found("ok")
    for file in (tmp_path / "tokenizer_config.json", tmp_path / "chat_template.jinja"):
        file.unlink(missing_ok=True)
    assert "no chat template" in found("note")["chat template"]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    broken = found("broken")["checkpoint"]
    assert all(word in broken for word in ("'mamba' is not supported", "deepseek_v3,", "that is supported"))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickle" in found("broken")["checkpoint"]


def test_doctor_of_limits_and_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(health.resource, "getrlimit", lambda which: (100, 100))
    levels = {finding.area: finding.level for finding in health.check_limits(200, pins=True)}
    assert levels["open files"] == "broken" and levels["memlock"] == "note" and levels["address space"] == "note"
    monkeypatch.undo()
    file = tmp_path / "weights"
    file.write_bytes(bytes(8192))
    monkeypatch.setattr(health, "file_system", lambda path: "nfs4")
    assert next(f for f in health.check_files([file]) if f.area == "file system").level == "note"
    monkeypatch.setattr(health.os, "access", lambda path, mode: False)
    (finding,) = health.check_files([file])
    assert finding.level == "broken" and "is not readable" in finding.what


def test_doctor_of_a_machine(tmp_path: Path) -> None:
    governor = tmp_path / "devices/system/cpu/cpu0/cpufreq"
    governor.mkdir(parents=True)
    (governor / "scaling_governor").write_text("powersave\n")
    pages = tmp_path / "kernel/mm/transparent_hugepage"
    pages.mkdir(parents=True)
    (pages / "enabled").write_text("always madvise [never]\n")
    found = {finding.area: finding for finding in health.check_machine(tmp_path)}
    assert found["governor"].level == found["huge pages"].level == "note"
    assert "performance" in found["governor"].todo and "madvise" in found["huge pages"].todo


# Measurements. Values depend on the machine; the tests check that they measure what they claim.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of almost no time."""
    monkeypatch.setattr(storage, "CELL_SECONDS", 0.005)
    monkeypatch.setattr(storage, "SCRATCH_BYTES", 64 * MIB)
    monkeypatch.setattr(bandwidth, "SECONDS", 0.001)
    monkeypatch.setattr(bandwidth, "BLOCK", 8 * MIB)
    monkeypatch.setattr(bandwidth, "TOUCHED", 8 * MIB)


def test_a_disk_is_measured_and_left_as_it_was(quick: None, tmp_path: Path) -> None:
    cells = [Cell("direct", "random", 256 * 1024, 2), Cell("mmap", "sequential", MIB, 1)]
    steps: list[None] = []
    found = measure_disk(tmp_path, cells, 5.0, lambda: steps.append(None))
    assert list(tmp_path.iterdir()) == [], "what was written is gone again"
    assert {rate.path for rate in found} == {str(tmp_path)}
    assert len(steps) == storage.ROUNDS * len(cells)
    if file_system(tmp_path) not in storage.MEMORY_FILE_SYSTEMS:
        assert {rate.reader for rate in found} == {"direct", "mmap"}
    for rate in found:
        assert 0 < rate.rate.low <= rate.rate.median <= rate.rate.high
        assert 0 < rate.percentiles[0] <= rate.percentiles[1] <= rate.percentiles[2]


def test_the_file_to_measure_with_has_no_name(quick: None, tmp_path: Path) -> None:
    """So that a killed profile leaves nothing."""
    with files_of(tmp_path) as (file,):
        assert list(tmp_path.iterdir()) == []
        assert file.stat().st_size == 64 * MIB and file.stat().st_dev == tmp_path.stat().st_dev


def test_what_came_from_ram_is_labelled(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "device_bytes", lambda path: 0)  # invented: the device has measured nothing
    (rate,) = measure_disk(tmp_path, [Cell("mmap", "random", MIB, 1)], 5.0)
    assert rate.from_ram == "the device delivered 0% of the bytes"
    monkeypatch.setattr(storage, "file_system", lambda path: "tmpfs")
    (rate,) = measure_disk(tmp_path, [Cell("mmap", "random", MIB, 1)], 5.0)
    assert rate.from_ram == "tmpfs is memory"


def test_large_files_are_read_where_they_are(tmp_path: Path) -> None:
    for number in range(8):
        with open(tmp_path / f"{number}.safetensors", "wb") as stream:
            stream.truncate(32 * MIB)
    tmp_path.chmod(0o500)
    with files_of(tmp_path) as files:
        assert len(files) == 8 and len(list(tmp_path.iterdir())) == 8
    tmp_path.chmod(0o700)


def test_a_disk_that_is_nearly_full_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100 * MIB, "total": 2**40})
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    with (
        pytest.raises(UsageError, match=r"a twentieth of what is free, is less than the 64\.00 MiB"),
        files_of(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_may_not_be_read(tierlm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tierlm.checkpoints.checkpoint.read_regular", refuse)
    code, _, err = tierlm("plan", str(tmp_path), "--ram", "4GiB")
    assert code == 1 and "config.json: cannot be read: Permission denied" in " ".join(err.split())


def test_a_folder_whose_files_may_not_be_listed(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UsageError, match="cannot be looked at: Permission denied"), files_of(tmp_path):
        pass


def test_an_interrupt_leaves_nothing_behind(quick: None, tmp_path: Path) -> None:
    def stop() -> None:
        with files_of(tmp_path) as files:
            assert files[0].exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert list(tmp_path.iterdir()) == []


def test_ram_and_caches(quick: None, tmp_path: Path) -> None:
    found = bandwidth.measure_memory()
    assert min(bandwidth.measure_touch()) > 0 and any(rate.name == "RAM" for rate in found)
    for rate in found:
        for speed in (rate.read, rate.write, rate.copy):
            assert 0 < speed.low <= speed.median <= speed.high


def profile_of(tmp_path: Path) -> Profile:
    fast, slow = Spread(2e10, 1e10, 3e10), Spread(3e9, 2e9, 4e9)
    cells = [DiskRate(str(tmp_path), "vda", "direct", "random", MIB, 8, slow, (1e-3, 1e-3, 1e-3), 1.0)]
    cells.append(DiskRate(str(tmp_path), "vda", "mmap", "random", MIB, 8, fast, (1e-3, 1e-3, 1e-3), 0.0, "from RAM"))
    memory = [MemoryRate("L2", 2**19, 0, 0, 1, fast, fast, fast), MemoryRate("RAM", 0, 0, 0, 2, slow, slow, slow)]
    return Profile("today", "a processor", 2, 2**34, 2**34, memory, cells, {str(tmp_path): 10**12})


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")  # matplotlib's list of fonts, which takes seconds to make
    pytest.importorskip("matplotlib")
    profile = profile_of(tmp_path)
    assert tiers(profile) == {"L2": (2**19, 2e10), "RAM": (2**34, 3e9), "disk": (10**12, 3e9)}
    assert all(row["source"] and row["bandwidth"] > 0 for row in hardware())
    named = find_config("DeepSeek-V3")
    outline = Outline(named.config, named.where, "int4")
    draw(tmp_path / "p.png", profile, "DeepSeek-V3 int4", work_of(outline), outline.used_bytes)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="cannot be written"):
        draw(tmp_path / "absent" / "p.png", profile, "m", work_of(outline), outline.used_bytes)


@pytest.mark.parametrize("format", arithmetic.MEASURED)
def test_kernels_are_measured_in_memory_like_slots(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "MEASURED", (format,))
    monkeypatch.setattr(arithmetic, "ROWS", (1, 3))
    for name, value in (("HIDDEN", 512), ("WIDTH", 256), ("RESIDENT", 2**16), ("SECONDS", 1e-4)):
        monkeypatch.setattr(arithmetic, name, value)
    found = arithmetic.measure_kernels()
    assert [(rate.format, rate.rows) for rate in found] == [(format, 1), (format, 3)]
    assert all(rate.rate.median > 0 for rate in found)
    first, *others = arithmetic._experts(format)
    values = [widen(weight) for weight in first]
    assert all(torch.equal(widen(weight), value) for e in others for weight, value in zip(e, values, strict=True))
    assert others and values[2].shape == (512, 256)


def test_ctrl_c_while_profiling_exits_as_everywhere(
    tierlm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tierlm.cli.measuring._measure", interrupt)
    code, out, err = tierlm("profile", "--path", str(tmp_path))
    assert (code, out, err.strip()) == (1, "", "interrupted")


def test_the_profile_command_is_what_plan_uses(
    tierlm: Command, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tierlm.cli.measuring._measure", lambda paths, step: profile_of(paths[0]))
    code, out, _ = tierlm("profile", "--path", str(tmp_path), "--json", str(tmp_path / "mine.json"))
    assert code == 0 and "random direct reads" in " ".join(out.split()) and "from RAM" in out
    assert default_file() == tmp_path / "cache/tierlm/profile.json"
    assert (tmp_path / "mine.json").read_text() == (tmp_path / "cache/tierlm/profile.json").read_text()
    shown = json.loads(tierlm("profile", "--path", str(tmp_path), "--json", "-")[1])
    assert shown == json.loads((tmp_path / "mine.json").read_text())
    rates = json.loads(tierlm("plan", "demo", "--ram", "1GiB", "--json", "-")[1])["rates"]
    assert rates["disk"] == 3e9 and rates["origins"]["disk"] == "measured today"
    diskless = Profile("later", "a processor", 2, 2**34, 2**33, missing=["a disk: full"])
    monkeypatch.setattr("tierlm.cli.measuring._measure", lambda paths, step: diskless)
    code, out, err = tierlm("profile", "--path", str(tmp_path))
    assert code == 1 and "a disk: full" in out and "not remembered" in err
    rates = json.loads(tierlm("plan", "demo", "--ram", "1GiB", "--json", "-")[1])["rates"]
    assert rates["origins"]["disk"] == "measured today", "the last profile that is good for a plan stays"
