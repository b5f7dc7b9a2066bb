"""`tierlm chat` on a terminal of its own: Ctrl-C, commands, several lines, history; `run` through the template."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from test_cli import LIMIT, add_tokenizer, environment, leaves_nothing, model, original, tierlm  # noqa: F401

from tierlm import LLM, Budget, SamplingParams
from tierlm.files import user_cache

# A terminal sends Ctrl-C to the session that it controls.
CHAT = """
import fcntl, runpy, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("tierlm", run_name="__main__")
"""


class Terminal:
    """A chat on a pseudo-terminal. ``text``: what it has printed since the last ``wait``."""

    def __init__(self, *words: str):
        self.ours, theirs = pty.openpty()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # this process may ignore it
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CHAT, "chat", *words],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env={**environment(), "TERM": "dumb"},
                start_new_session=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)
            os.close(theirs)
        self._text = ""

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait(self, pattern: str) -> str:
        """Read until ``pattern``; returns all text up to its end."""
        until = time.monotonic() + LIMIT
        while (found := re.search(pattern, self._text, re.DOTALL)) is None:
            assert time.monotonic() < until and select.select([self.ours], [], [], LIMIT)[0], self._text
            self._text += os.read(self.ours, 65536).decode(errors="replace")
        seen, self._text = self._text[: found.end()], self._text[found.end() :]
        return seen

    def press(self, key: str, pattern: str) -> None:
        """Type ``key`` until ``pattern`` comes, as a user does: readline misses a signal just before it waits."""
        for _ in range(int(LIMIT)):
            self.type(key)
            if select.select([self.ours], [], [], 2)[0]:
                break
        self.wait(pattern)

    def end(self) -> int:
        """Type Ctrl-D and wait for the exit code."""
        self.type("\x04")
        return self.process.wait(timeout=LIMIT)


@contextmanager
def chatting(*words: str) -> Iterator[Terminal]:
    terminal = Terminal(*words)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.ours)


def test_ctrl_c_ends_answers_as_often_as_one_likes(model: str) -> None:  # noqa: F811
    words = [model, "-n", "19000", "--context", "20000", "--temperature", "1", "--seed", "1", "-q"]  # without the bar
    with leaves_nothing("talk.json"), chatting(*words) as terminal:
        terminal.wait("> ")
        for _ in range(3):
            terminal.type("the quick\r")
            terminal.wait("quick\r\n.+")
            terminal.type("\x03\x03\x03")  # the second and third change nothing
            terminal.wait("interrupted.*\n> ")
        terminal.type("half a line")
        terminal.wait("half a line")
        terminal.press("\x03", "Ctrl-D ends the chat.*\n> ")
        terminal.press("\x03", "Ctrl-D ends the chat.*\n> ")
        terminal.type("/save talk.json\r")
        terminal.wait("6 messages in talk.json.*\n> ")
        assert terminal.end() == 0
        messages = json.loads(Path("talk.json").read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert all(message["content"] == "the quick" for message in messages[::2])
    assert all(message["content"] for message in messages[1::2])


def test_commands_several_lines_and_history(model: str) -> None:  # noqa: F811
    with (
        leaves_nothing("talk.json"),
        chatting(model, "-n", "2", "--context", "400", "--system", "be brief") as terminal,
    ):
        terminal.wait("> ")
        terminal.type("one\\\r")
        terminal.wait(r"\. ")
        terminal.type("two\r")
        terminal.wait("\n> ")
        terminal.type('"""three\r')
        terminal.wait(r"\. ")
        terminal.type('four"""\r')
        terminal.wait("\n> ")
        terminal.type("/save talk.json\r")
        terminal.wait("4 messages in talk.json.*\n> ")
        saved = json.loads(Path("talk.json").read_text())
        assert [message["role"] for message in saved] == ["system", *["user", "assistant"] * 2]
        assert [saved[0]["content"], saved[1]["content"], saved[3]["content"]] == [
            "be brief",
            "one\ntwo",
            "three\nfour",
        ]
        terminal.type("/reset\r")
        terminal.wait("\n> ")
        terminal.type("/system be long\r")
        terminal.wait("\n> ")
        terminal.type("/save talk.json\r")
        terminal.wait("0 messages in talk.json.*\n> ")
        assert json.loads(Path("talk.json").read_text()) == [{"role": "system", "content": "be long"}]
        Path("talk.json").write_text(json.dumps(saved))
        terminal.type("/load talk.json\r")
        terminal.wait("4 messages from talk.json.*\n> ")
        terminal.type("/help\r")
        assert "/reset" in terminal.wait("\n> ")
        for wrong, error in {
            "/walk": "/walk: expected one of",
            "/load none": "cannot be read",
            "/save": "a file name",
        }.items():
            terminal.type(wrong + "\r")
            terminal.wait(f"error: .*{error}.*\n> ")
        terminal.type("zqx " * 500 + "\r")
        terminal.wait("error: .*the context 400.*\n> ")
        assert terminal.end() == 0
    cache = user_cache()
    assert cache is not None
    assert "/system be long\n" in (cache / "chat-history").read_text()
    assert (cache / "chat-history").stat().st_mode & 0o777 == 0o600


def test_the_oldest_turns_are_left_out_and_it_says_so(model: str) -> None:  # noqa: F811
    with chatting(model, "-n", "5", "--context", "100") as terminal:
        terminal.wait("> ")
        terminal.type("the quick brown fox jumps over the lazy dog\r")
        assert "left out" not in terminal.wait("\n> ")
        for _ in range(6):
            terminal.type("the quick brown fox jumps over the lazy dog\r")
            if "oldest" in terminal.wait("\n> "):
                break
        else:
            raise AssertionError("no turn was left out")
        assert terminal.end() == 0


# --- run, the template, and recommended sampling


def ids_of_run(tierlm: Any, *words: str) -> list[int]:  # noqa: F811
    outcome = tierlm("run", *words, "-n", "6", "--context", "64", "--json", "-")
    assert outcome.code == 0, outcome
    found: list[int] = json.loads(outcome.out)["ids"]
    return found


def test_run_uses_the_template(model: str, tierlm: Any) -> None:  # noqa: F811
    params = SamplingParams(max_new_tokens=6)
    with LLM.load(model, budget=Budget("8GiB"), context=64) as llm:
        system = {"role": "system", "content": "be brief"}
        question = {"role": "user", "content": "the fox"}
        chat = [token for piece in llm.chat([question], params) for token in piece.ids]
        led = [token for piece in llm.chat([system, question], params) for token in piece.ids]
        raw = llm.generate("the fox", params)[0].ids
    assert ids_of_run(tierlm, model, "-p", "the fox") == chat
    assert ids_of_run(tierlm, model, "-p", "the fox", "--system", "be brief") == led
    assert ids_of_run(tierlm, model, "-p", "the fox", "--raw") == raw
    outcome = tierlm("run", model, "-p", "the fox", "--raw", "--system", "be brief")
    assert outcome.code == 2 and "--system" in outcome.err
    config = json.loads((Path(model) / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (Path(model) / "tokenizer_config.json").write_text(json.dumps(config))
    assert ids_of_run(tierlm, model, "-p", "the fox") == raw


def test_recommended_sampling_is_used_unless_the_user_says_otherwise_and_is_shown(model: str, tierlm: Any) -> None:  # noqa: F811
    greedy = ids_of_run(tierlm, model, "-p", "the fox")
    file = Path(model) / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 3.0, "top_p": 0.9}))
    words = ("run", model, "-p", "the fox", "-n", "6", "--context", "64", "--seed", "1")
    outcome = tierlm(*words)
    assert "sampling, as the model recommends: temperature 3.0, top_p 0.9" in outcome.err
    with LLM.load(model, budget=Budget("8GiB"), context=64) as llm:
        assert llm.default_params == SamplingParams(temperature=3.0, top_p=0.9)
    assert "recommends: top_p 0.9\n" in tierlm(*words, "--temperature", "2").err
    assert "recommends" not in tierlm(*words, "--quiet").err
    assert ids_of_run(tierlm, model, "-p", "the fox", "--temp", "0", "--seed", "1") == greedy
    assert ids_of_run(tierlm, model, "-p", "the fox", "--seed", "1") != greedy
