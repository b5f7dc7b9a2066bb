"""Settings of the command line: config file, variables, help, completion, and what is said of a wrong one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tierlm import cli

PLAN = ("plan", "DeepSeek-V2-Lite", "--json", "-")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config file, with a folder but not yet written."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "tierlm").mkdir()
    return tmp_path / "tierlm/config.toml"


@pytest.fixture
def tierlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line as the console script does, in this process: exit code, output, errors."""

    def run(*words: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["tierlm", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that runs something, by the words that name it."""
    for name, command in (group or typer.main.get_command(cli.app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = {" ".join(path): command for path, command in commands()}


def ram_of(outcome: tuple[Any, str, str]) -> float:
    """The ram budget in GiB of a plan that succeeded."""
    code, out, err = outcome
    assert code == 0, err
    return json.loads(out)["question"]["ram"] / 2**30


def test_the_line_wins_over_a_variable_over_the_file_over_the_default(
    tierlm: Any, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierlm.host.available_ram", lambda: 20 * 2**30)
    assert ram_of(tierlm(*PLAN)) == 16
    config.write_text('[plan]\nram = "32GiB"\n')
    assert ram_of(tierlm(*PLAN)) == 32
    monkeypatch.setenv("TIERLM_PLAN_RAM", "48GiB")
    assert ram_of(tierlm(*PLAN)) == 48
    assert ram_of(tierlm(*PLAN, "--ram", "64GiB")) == 64


def test_the_file_takes_names_of_options_of_any_command_and_kind(tierlm: Any, config: Path) -> None:
    config.write_text('[plan]\nctx-size = 64\ndisk_bandwidth = "7GB"\nprompt = 9\n[trace.record]\nscores = true\n')
    found = json.loads(tierlm(*PLAN)[1])
    assert (found["question"]["context"], found["question"]["prompt"], found["rates"]["disk"]) == (64, 9, 7e9)
    assert "64" in tierlm("plan", "--help")[1], "the help shows the default that holds"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[plan]\nrma = "8GiB"', ["[plan]", "'rma'", "tierlm plan --help"]),
        ('[paln]\nram = "8GiB"', ["'paln'", "[plan]", "[trace]"]),
        ('ram = "8GiB"', ["'ram'", "[plan]"]),
        ("[trace.convert]\nform = 1", ["[trace]", "[convert]", "'form'"]),
        ("[plan\n", ["expected TOML", "line 1"]),
        ('[plan]\nprompt = "long"', ["'--prompt'", "integer"]),
        ("[plan]\nprompt = []", ["[plan]: prompt", "expected one value"]),
        ("[plan.ram]\nsize = 8", ["[plan]: ram", "expected one value"]),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tierlm: Any, config: Path, text: str, words: list[str]) -> None:
    config.write_text(text)
    code, out, err = tierlm(*PLAN)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert all(word in err for word in ["error: UsageError", str(config), *words]), err
    assert tierlm("--help")[0] == 0


@pytest.mark.parametrize("text", ['path = "/nowhere"', 'path = [".", "/nowhere"]'])
def test_an_option_that_repeats_takes_a_value_or_a_list(tierlm: Any, config: Path, text: str) -> None:
    config.write_text(f"[profile]\n{text}\n")
    code, _, err = tierlm("profile")
    assert code == 2 and "/nowhere: expected a folder" in err


def test_a_wrong_variable_is_named(tierlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERLM_PLAN_PROMPT", "long")
    code, _, err = tierlm(*PLAN)
    assert code == 2 and "'--prompt'" in err and "in TIERLM_PLAN_PROMPT" in err


def test_doctor_shows_what_is_set(tierlm: Any, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('[run]\nram = "8GiB"\n')
    for name in ("TIERLM_RUN_RAM", "TIERLM_TRACE_RECORD_TOP_K", "TIERLM_RUN_RMA"):
        monkeypatch.setenv(name, "1")
    found = json.loads(tierlm("doctor", "--json", "-")[1])["findings"]
    shown = [(finding["level"], finding["what"]) for finding in found]
    assert ("ok", str(config)) in shown
    assert ("ok", "TIERLM_RUN_RAM is set") in shown and ("ok", "TIERLM_TRACE_RECORD_TOP_K is set") in shown
    assert ("note", "TIERLM_RUN_RMA is no option of a command") in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_a_variable_is_named_like_its_option(name: str) -> None:
    for param in COMMANDS[name].params:
        assert param.param_type_name == "argument" or f"--{param.name.replace('_', '-')}" in param.opts


@pytest.mark.parametrize("name", [*COMMANDS, "trace", ""])
def test_help_fits_80_columns_without_noise(name: str) -> None:
    shown = CliRunner().invoke(cli.app, [*name.split(), "--help"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "<bool>" not in shown.stdout and "env var" not in shown.stdout and "…" not in shown.stdout


@pytest.mark.parametrize(("words", "command"), [((), "doctor"), (("trace",), "convert")])
def test_a_command_of_commands_alone_is_its_help(tierlm: Any, words: tuple[str, ...], command: str) -> None:
    code, out, err = tierlm(*words)
    assert (code, err) == (0, "") and "Usage:" in out and command in out


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("chat", "serve", "trace convert")])
def test_json_is_a_file_or_standard_output_everywhere(name: str) -> None:
    (option,) = (param for param in COMMANDS[name].params if param.name == "json")
    assert option.opts == ["--json"] and not option.is_flag and option.metavar == "FILE"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run",), "Missing argument 'MODEL'"),
        (("run", "demo"), "expected one prompt, as --prompt TEXT or as --ids"),
        (("run", "demo", "-p", "x", "--ids", "1"), "expected one prompt"),
        (("run", "demo", "--ids", "1,x"), "found 'x'"),
        (("run", "demo", "--ids", ""), "found ''"),
        (("run", "demo", "--top-k", "x"), "'--top-k'"),
        (("run", "--pormpt"), "--prompt"),
        (("run", "demo", "-p", "x", "--threads", "0"), "threads: expected 1 to 256"),
        (("paln",), "No such command 'paln'"),
        (("run", "gone", "-p", "x"), "gone: no such folder"),
        (("plan", "gone"), "gone: no such folder"),
        (("doctor", "gone"), "gone: no such folder"),
        (("verify", "gone"), "gone: no such folder"),
        (("simulate", "gone"), "gone"),
        (("plan", "demo", "--trace", "gone"), "gone"),
        (("plan", "demo", "--machine", "gone"), "gone"),
        (("trace", "info", "gone"), "gone"),
        (("trace", "record", "demo", "--prompts", "gone", "-o", "t"), "gone"),
        (("trace", "record", "demo"), "'--prompts'"),
    ],
)
def test_misuse_is_one_line_and_code_two(tierlm: Any, words: tuple[str, ...], says: str) -> None:
    code, out, err = tierlm(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and says in err


def completed(*words: str) -> list[str]:
    """What bash offers after ``words``."""
    line = {"_TIERLM_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("tierlm", *words))}
    shown = CliRunner().invoke(cli.app, env=line | {"COMP_CWORD": str(len(words))}, prog_name="tierlm")
    return shown.stdout.split()


def test_completion_knows_models_policies_predictors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/Deep").mkdir(parents=True)
    (tmp_path / "models/Deep.txt").touch()
    assert completed("run", "m") == ["models/"] and completed("run", "models/D") == ["models/Deep/"]
    assert completed("run", "d") == ["demo"] and completed("plan", "Kimi") == ["Kimi-K2"]
    assert completed("run", "demo", "--policy", "lr") == ["lru", "lru-k"]
    assert completed("run", "demo", "--predictor", "g") == ["gate"]
    assert completed("run", "gone/x") == []


def test_help_and_plan_do_not_import_torch() -> None:
    script = "import sys; from tierlm import cli; sys.argv = ['tierlm', *sys.argv[1:]]\n"
    script += "try: cli.main()\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    for words in (["--help"], ["run", "--help"], ["plan", "DeepSeek-V3", "--json", "-"]):
        command = [sys.executable, "-c", script, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
        assert done.returncode == 0, done.stderr
