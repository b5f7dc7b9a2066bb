"""The command line: exit codes, one-line messages, JSON, Ctrl-C, and no leftovers after a failure."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from toys import edit_config, make_toy
from typer.testing import CliRunner

from tierlm import LLM, Budget, RuntimeOptions, SamplingParams, __version__, cli
from tierlm.cli.chat import chat
from tierlm.cli.options import Loading, Memory, Messages, Sampling, Stored, grouped
from tierlm.cli.run import run
from tierlm.cli.tracing import record
from tierlm.config import LoadOptions
from tierlm.text import TextCodec

VOCAB = 300
BOS, EOS = "<|begin|>", "<|end|>"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LIMIT = 120.0  # seconds before a test fails its child process


def add_tokenizer(folder: Path) -> None:
    """A byte-level BPE with as many ids as the toy has, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog and then some more of the same"], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy with a tokenizer, a long context, and no end-of-text id."""
    folder = tmp_path_factory.mktemp("model")
    make_toy("v3", folder, vocab_size=VOCAB, max_position_embeddings=20_000)
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=None)
    add_tokenizer(folder)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the toy, alone in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(original, tmp_path / "model")
    return "model"


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def tierlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line as the console script does, in this process."""

    def run(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["tierlm", *words])
        code: Any = 0
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return Outcome(code, *capsys.readouterr())

    return run


def listing(folder: Path) -> Mapping[str, int]:
    """Every file under a folder, with its size, and every folder."""
    return {str(path.relative_to(folder)): path.stat().st_size * path.is_file() for path in folder.rglob("*")}


@contextmanager
def leaves_nothing(*added: str) -> Iterator[None]:
    """Check that the current folder, with the model's folder, ends as it began, except for ``added``."""
    before = listing(Path.cwd())
    yield
    after = listing(Path.cwd())
    assert {name: size for name, size in after.items() if name not in added} == before


def check_failure(outcome: Outcome, code: int, *words: str) -> None:
    """One line that says what is wrong, and nothing on standard output. (Empty lines have their own test.)"""
    assert outcome.code == code, outcome
    assert outcome.err.strip().count("\n") == 0, outcome.err
    assert outcome.err.strip().startswith("error: ")
    assert "Traceback" not in outcome.err and outcome.out.strip() == ""
    for word in words:
        assert word in outcome.err


# --- success


def test_run_prints_the_text(model: str, tierlm: Any) -> None:
    with leaves_nothing():
        outcome = tierlm("run", model, "-p", "the quick", "-n", "5", "--context", "64")
    assert outcome.code == 0 and outcome.out.endswith("\n") and outcome.out.strip()
    assert "error" not in outcome.err


def test_ids_are_a_prompt_for_a_model_without_tokenizer(model: str, tierlm: Any) -> None:
    words = ("-n", "5", "--context", "64")
    prompt = TextCodec(Path(model)).encode("the quick")
    text = json.loads(tierlm("run", model, "--raw", "-p", "the quick", *words, "--json", "-").out)
    (Path(model) / "tokenizer.json").unlink()
    given = ",".join(map(str, prompt))
    outcome = tierlm("run", model, "--ids", given, *words, "--json", "ids.json")
    assert outcome.code == 0 and outcome.out == ",".join(map(str, text["ids"])) + "\n"
    found = json.loads(Path("ids.json").read_text())
    assert (found["prompt"], found["text"], found["ids"]) == (prompt, None, text["ids"])
    piped = CliRunner().invoke(cli.app, ["run", model, "--ids", "-", *words], input=given.replace(",", " \n") + "\n")
    assert piped.stdout == outcome.out


def test_verbose_logs_the_plan_and_the_disk_and_changes_no_text(model: str, tierlm: Any) -> None:
    words = ("run", model, "-p", "the quick", "-n", "3", "--context", "64")
    logger = logging.getLogger("tierlm")
    try:
        loud = tierlm(*words, "--verbose", "--quiet")
    finally:
        logger.handlers, logger.level = [], logging.NOTSET
    assert all(word in loud.err for word in ("plan of ram: ", "expert slots", "reader ", "loaded in "))
    assert loud.out == tierlm(*words).out


def test_options_of_the_disk_reach_the_model(model: str, tierlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[dict[str, Any]] = []
    real = LLM.load

    def load(*given: Any, **options: Any) -> LLM:
        loaded.append(options)
        return real(*given, **options)

    monkeypatch.setattr(LLM, "load", load)
    shutil.copytree(model, "one")
    shutil.copytree(model, "two")
    for words in ([], ["--probe", "--mirror", "one", "--mirror", "two"]):
        assert tierlm("run", model, "-p", "the", "-n", "1", "--context", "64", *words).code == 0
    assert [(options["probe"], options["mirrors"]) for options in loaded] == [("auto", ()), ("refresh", ("one", "two"))]


def test_same_tokens_from_run_to_run_and_from_both_readers(model: str, tierlm: Any) -> None:
    words = ("run", model, "-p", "the fox", "-n", "6", "--context", "64", "--json", "-")
    found = [json.loads(tierlm(*words, "--reader", reader).out)["ids"] for reader in ("auto", "mmap")]
    assert found[0] == found[1] and len(found[0]) == 6


def test_json_to_standard_output_is_all_there_is(model: str, tierlm: Any) -> None:
    with leaves_nothing():
        outcome = tierlm("run", model, "-p", "the quick", "-n", "4", "--context", "64", "--json", "-")
    result = json.loads(outcome.out)
    assert outcome.code == 0 and outcome.err == ""
    assert (result["model"], result["prompt"], result["finish_reason"]) == (model, "the quick", "length")
    assert len(result["ids"]) == 4 == result["stats"]["new_tokens"]
    assert result["stats"]["prompt_tokens"] > 1 and result["stats"]["plan"]["ram"]["floor"] > 0


def test_json_to_a_file(model: str, tierlm: Any) -> None:
    with leaves_nothing("out.json"):
        outcome = tierlm("run", model, "-p", "the quick", "-n", "4", "--context", "64", "--json", "out.json")
    result = json.loads(Path("out.json").read_text())
    assert outcome.code == 0 and outcome.out == result["text"] + "\n"
    assert len(result["ids"]) == 4 and result["finish_reason"] == "length"


def test_json_replaces_an_older_file(model: str, tierlm: Any) -> None:
    Path("out.json").write_text("old")
    assert tierlm("run", model, "-p", "a", "-n", "1", "--context", "64", "--json", "out.json").code == 0
    assert json.loads(Path("out.json").read_text())["prompt"] == "a"


def test_stop_text_ends_the_answer(model: str, tierlm: Any) -> None:
    words = ("run", model, "-p", "the fox", "-n", "12", "--context", "64", "--temperature", "1", "--seed", "3")
    text = json.loads(tierlm(*words, "--json", "-").out)["text"]
    stop = text[2:4]
    result = json.loads(tierlm(*words, "--json", "-", "--stop", stop).out)
    assert (result["text"], result["finish_reason"]) == (text.partition(stop)[0], "stop")


def test_prompt_from_standard_input(original: Path) -> None:
    words = ["run", str(original), "-p", "-", "-n", "1", "--context", "64", "--json", "-"]
    outcome = CliRunner().invoke(cli.app, words, input="the lazy dog")
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout)["prompt"] == "the lazy dog"


def test_stats_are_printed_beside_the_text(model: str, tierlm: Any) -> None:
    outcome = tierlm("run", model, "-p", "the fox", "-n", "3", "--context", "64", "--stats")
    assert outcome.code == 0 and "expert hit rate" in outcome.err and "hit rate" not in outcome.out
    assert all(word in " ".join(outcome.err.split()) for word in ("late hits", "misses", "prefetched", "by warm-up"))


def test_chat_answers_and_ends_with_its_input(original: Path) -> None:
    words = ["chat", str(original), "-n", "3", "--context", "64", "--system", "be brief"]
    outcome = CliRunner().invoke(cli.app, words, input="hello\nagain\n")
    assert outcome.exit_code == 0 and outcome.stdout.count("> ") == 3


def test_options_not_given_are_the_defaults_of_the_api() -> None:
    assert Memory().make() == Budget()
    assert SamplingParams(**Sampling().make()) == SamplingParams()
    assert RuntimeOptions(**Loading().make()) == RuntimeOptions()


def test_grouped_options_become_objects() -> None:
    got: list[Any] = []

    @grouped
    def command(
        model: str,
        *,
        first: Annotated[str, typer.Option()] = "a",
        budget: Annotated[Budget, Memory()],
        params: Annotated[SamplingParams, Sampling(max_new_tokens=512, seed=7)],
        options: Annotated[LoadOptions, Loading()],
    ) -> None:
        got.extend((model, first, budget, params, options))

    app = typer.Typer()
    app.command()(command)
    words = (
        "m --ram 1GiB --top-k 3 --stop x --stop y --mirror one --probe --no-heat --timeline t.json --exact -c 9 "
        "--kv-dtype bfloat16 --threads 3 --temp 0.5 --n-predict 7 --ctx-size 8"
    )
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    *names, budget, params, options = got
    assert names == ["m", "a"] and budget == Budget("1GiB")
    assert SamplingParams(**params) == SamplingParams(7, temperature=0.5, top_k=3, seed=7, stop=("x", "y"))
    assert RuntimeOptions(**options) == RuntimeOptions(
        mirrors=("one",),
        probe="refresh",
        heat=False,
        timeline=Path("t.json"),
        exact=True,
        context=8,
        threads=3,
        kv_dtype="bfloat16",
    )


def test_run_chat_and_record_have_the_same_options() -> None:
    def names(command: Any) -> set[str]:
        return set(inspect.signature(command).parameters)

    shared = {field.name for group in (Memory, Sampling, Loading, Messages) for field in dataclasses.fields(group)}
    assert names(run) - shared == {"model", "prompt", "ids", "system", "raw", "stats", "json"} and shared < names(run)
    stored = {field.name for field in dataclasses.fields(Stored)}  # run and record have no earlier prompts
    assert names(chat) - shared == {"model", "system", "stats", *stored} and shared < names(chat)
    assert names(record) - shared == {"model", "prompts", "output", "scores", "json"} and shared < names(record)


# --- failure

BAD_OPTIONS: dict[str, tuple[list[str], int, list[str]]] = {  # arguments after the model; exit code; words of the line
    "NaN budget": (["--ram", "nan"], 2, ["UsageError", "budget ram", "'nan'"]),
    "infinite budget": (["--ram", "inf"], 2, ["UsageError", "budget ram"]),
    "negative budget": (["--ram", "-1GiB"], 2, ["UsageError", "budget ram"]),
    "nonsense vram": (["--vram", "8 GiBs"], 2, ["UsageError", "budget vram", "8 GiBs"]),
    "unknown policy": (["--policy", "best"], 2, ["UsageError", "'best'", "lru", "lfu", "cycle"]),
    "policy module": (["--policy", "no.such:Policy"], 2, ["UsageError", "no.such:Policy"]),
    "policy no policy": (["--policy", "json:JSONDecoder"], 2, ["UsageError", "json:JSONDecoder"]),
    "unknown predictor": (["--predictor", "oracle"], 2, ["UsageError", "'oracle'", "gate", "none"]),
    "unknown reader": (["--reader", "uring"], 2, ["UsageError", "reader", "'uring'", "mmap"]),
    "mirror that is not there": (["--mirror", "gone"], 2, ["UsageError", "gone", "nothing"]),
    "mirror of the same files": (["--mirror", "model"], 2, ["UsageError", "mirror model", "model.safetensors"]),
    "unknown device": (["--device", "tpu9"], 2, ["UsageError", "'tpu9'"]),
    "device without data": (["--device", "meta"], 2, ["UsageError", "meta"]),
    "no context": (["--context", "0"], 2, ["UsageError", "context"]),
    "context above the model's": (["--context", "20001"], 2, ["UsageError", "context", "20000", "20001"]),
    "no tokens": (["-n", "0"], 2, ["UsageError", "max_new_tokens"]),
    "NaN temperature": (["--temperature", "nan"], 2, ["UsageError", "temperature"]),
    "top-p": (["--top-p", "0"], 2, ["UsageError", "top_p"]),
    "empty stop": (["--stop", ""], 2, ["UsageError", "stop"]),
    "seed beyond 64 bits": (["--seed", str(2**64)], 2, ["UsageError", "seed"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_one_line_and_code_two(model: str, tierlm: Any, case: str) -> None:
    words, code, says = BAD_OPTIONS[case]
    with leaves_nothing():
        outcome = tierlm("run", model, "-p", "the", "-n", "1", "--context", "64", *words)
    check_failure(outcome, code, *says)


@pytest.mark.parametrize("tier", ["ram", "vram"])
def test_budget_below_the_floor(model: str, tierlm: Any, tier: str) -> None:
    with leaves_nothing():
        outcome = tierlm("run", model, "-p", "the", f"--{tier}", "1MiB")
    check_failure(outcome, 1, "BudgetError", f"{tier} budget of 1.00 MiB", "floor of ", "dominates is ")
    floor = outcome.err.partition("floor of ")[2].partition(";")[0]
    assert floor.endswith("iB") and float(floor.split()[0]) > 0
    dominant = outcome.err.partition("dominates is ")[2].partition(" with")[0]
    assert dominant in ("interpreter and libraries", "activations", "KV cache")


@pytest.mark.parametrize("folder", ["missing", "./missing/model", "/no/such/model", "no such model"])
def test_folder_that_does_not_exist(model: str, tierlm: Any, folder: str) -> None:
    with leaves_nothing():
        outcome = tierlm("run", folder, "-p", "the")
    check_failure(outcome, 2, "ModelNotFoundError", str(Path(folder)), "no such folder")


@pytest.mark.parametrize("folder", ["my[bold]model", "my[/such]model", "my[link=x]model", ":fox_face:"])
def test_messages_are_printed_as_they_are(model: str, tierlm: Any, folder: str) -> None:
    """Brackets and colons in a name are not markup."""
    check_failure(tierlm("run", folder, "-p", "the"), 2, "ModelNotFoundError", f" {folder}: no such folder")


def test_standard_error_has_no_empty_line(model: str, tierlm: Any) -> None:
    """Without a terminal there is no progress bar, so no line break is needed to end it."""
    assert tierlm("run", model, "-p", "the", "-n", "1", "--context", "64").err == ""
    outcome = tierlm("run", "missing", "-p", "the")
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1


def test_unsupported_architecture(model: str, tierlm: Any) -> None:
    edit_config(Path(model), model_type="mamba")
    with leaves_nothing():
        outcome = tierlm("run", model, "-p", "the")
    check_failure(outcome, 1, "UnsupportedModelError", "'mamba'", "deepseek_v3", "config.json")


@pytest.mark.parametrize("left", [0.5, 0.0])
def test_truncated_shard(model: str, tierlm: Any, left: float) -> None:
    file = Path(model) / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * left))
    with leaves_nothing():
        outcome = tierlm("run", model, "-p", "the")
    check_failure(outcome, 1, "CheckpointError", str(file), "truncated")


def test_missing_tokenizer(model: str, tierlm: Any) -> None:
    (Path(model) / "tokenizer.json").unlink()
    with leaves_nothing():
        outcome = tierlm("run", model, "-p", "the", "--context", "64")
    check_failure(outcome, 1, "CheckpointError", "tokenizer.json")


def test_prompt_longer_than_the_context(model: str, tierlm: Any) -> None:
    with leaves_nothing():
        outcome = tierlm("run", model, "-p", "zq " * 50, "--context", "16", "--json", "out.json")
    check_failure(outcome, 2, "PromptError", "context", "16")


def test_chat_without_a_template(model: str, monkeypatch: pytest.MonkeyPatch, tierlm: Any) -> None:
    (Path(model) / "tokenizer_config.json").unlink()
    monkeypatch.setattr("builtins.input", lambda prompt: "hello")
    with leaves_nothing():
        outcome = tierlm("chat", model, "--context", "64")
    check_failure(outcome, 2, "UsageError", "chat template")


@pytest.mark.parametrize(
    "words", [["run", "MODEL"], ["run", "MODEL", "-p"], ["run", "-p", "x"], ["walk"], ["run", "--no"]]
)
def test_command_line_that_cannot_be_parsed(model: str, tierlm: Any, words: list[str]) -> None:
    with leaves_nothing():
        outcome = tierlm(*[model if word == "MODEL" else word for word in words])
    assert outcome.code == 2 and outcome.out == ""
    assert "Error" in outcome.err and "Traceback" not in outcome.err


def test_missing_prompt_says_which_option(model: str, tierlm: Any) -> None:
    assert "--prompt" in tierlm("run", model).err


@pytest.mark.parametrize("target", ["no/such/folder/out.json", "taken", ".", "model/config.json/out.json"])
def test_json_that_cannot_be_written(model: str, tierlm: Any, target: str) -> None:
    """The text has been shown by then; no partial file remains."""
    Path("taken").mkdir()
    with leaves_nothing():
        outcome = tierlm("run", model, "-p", "the", "-n", "1", "--context", "64", "--json", target)
    assert outcome.code == 2 and outcome.err.strip().count("\n") == 0
    assert outcome.err.strip().startswith(f"error: UsageError: {target}: cannot be written")


# --- as a process of its own


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def test_module_is_the_console_script(model: str) -> None:
    with leaves_nothing():
        ended = subprocess.run(
            [sys.executable, "-m", "tierlm", "run", "missing", "-p", "x"],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            env=environment(),
            check=False,
        )
    check_failure(Outcome(ended.returncode, ended.stdout, ended.stderr), 2, "ModelNotFoundError", "missing")


@contextmanager
def interruptible(words: list[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process that handles SIGINT, even if this process has inherited that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "tierlm", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment() | variables,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stderr.close()


def first_byte(process: subprocess.Popen[bytes]) -> bytes:
    """Wait for the first text; returns nothing if the process ends instead."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], LIMIT)[0], "no text has come"
    return os.read(process.stdout.fileno(), 1)


def test_interrupt_ends_a_generation_with_what_there_is(model: str) -> None:
    words = ["run", model, "-p", "the quick", "-n", "19000", "--context", "20000", "--temperature", "1", "--seed", "1"]
    with leaves_nothing("out.json"), interruptible([*words, "--json", "out.json"]) as process:
        shown = first_byte(process)
        assert shown, process.communicate(timeout=LIMIT)[1].decode()
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors.decode()
    assert "Traceback" not in errors.decode() and "interrupted" in errors.decode()
    result = json.loads(Path("out.json").read_text())
    assert result["finish_reason"] == "interrupted"
    assert 0 < len(result["ids"]) < 19000
    assert (shown + rest).decode() == result["text"] + "\n"


@pytest.mark.parametrize("module", ["typer", "torch"])
def test_interrupt_during_an_import_that_swallows_it(module: str, model: str, tmp_path: Path) -> None:
    """As destructors and callbacks do, at times."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / f"{module}.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.01)\n"
        "except KeyboardInterrupt:\n    pass\n"
        f"raise SystemExit('{module} was imported')\n"
    )
    path = os.pathsep.join([str(fake), *sys.path])
    with interruptible(["run", model, "-p", "x"], PYTHONPATH=path) as process:
        _, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (-signal.SIGINT, b"")


def test_reader_of_the_output_that_goes_away_is_no_traceback(model: str) -> None:
    words = ["run", model, "-p", "the quick", "-n", "19000", "--context", "20000", "--temperature", "1", "--seed", "1"]
    with leaves_nothing(), interruptible(words) as process:
        assert process.stdout is not None and process.stderr is not None
        assert first_byte(process)
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(timeout=LIMIT) == 1
    assert "Traceback" not in errors and "BrokenPipeError" not in errors


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"tierlm {__version__}\n"


# --- packed stores


def test_pack_verify_and_run(model: str, tierlm: Any) -> None:
    outcome = tierlm("pack", model, "packed", "--experts", "keep", "--trunk", "keep", "--json", "-")
    assert outcome.code == 0 and "packed: " in outcome.err
    assert json.loads(outcome.out)["bytes"] == sum(file.stat().st_size for file in Path("packed").iterdir())
    outcome = tierlm("verify", "packed")
    assert outcome.code == 0 and "all checksums match" in outcome.err
    assert "no checksums" in tierlm("verify", model).err
    command = ("-p", "the quick", "-n", "5", "--context", "64")
    assert tierlm("run", "packed", *command).out == tierlm("run", model, *command).out
    file = Path("packed/layer-00002.safetensors")
    data = bytearray(file.read_bytes())
    data[-5000] ^= 4
    file.write_bytes(data)
    check_failure(tierlm("verify", "packed"), 1, str(file), "expert 15 of layer 2", "expected xxh3_64", "found")
    outcome = tierlm("verify", "packed", "--json", "-")
    found = json.loads(outcome.out)
    assert outcome.code == 1 and found["checksums"] and "expert 15 of layer 2" in "".join(found["damage"])


def test_pack_keeps_to_a_budget_or_says_what_it_needs(model: str, tierlm: Any) -> None:
    with leaves_nothing():
        check_failure(tierlm("pack", model, "out", "--ram", "1MiB"), 1, "BudgetError", "that packing needs", "1.00 MiB")


def test_pack_refuses_what_cannot_be(model: str, tierlm: Any) -> None:
    with leaves_nothing():
        check_failure(tierlm("pack", model, model), 2, "exists already")
        check_failure(tierlm("pack", model, f"{model}/packed"), 2, "is inside the model's folder")
        check_failure(tierlm("pack", model, "packed", "--experts", "int3"), 2, "int3", "int4")
        check_failure(tierlm("pack", "nothing-here", "packed"), 2, "nothing-here")


def test_an_interrupted_pack_says_that_it_goes_on(model: str, tierlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tierlm.checkpoints.pack.write_file", interrupt)
        outcome = tierlm("pack", model, "packed")
    assert outcome.code == 1 and "the same command continues" in outcome.err and not Path("packed").exists()
    assert tierlm("pack", model, "packed").code == 0
