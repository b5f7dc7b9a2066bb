"""The HTTP server, asked by the official clients of OpenAI and Anthropic, and by wrong and vanishing ones."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tierlm import LLM, Budget, SamplingParams, TierlmError
from tierlm.config import LoadOptions

pytest.importorskip("fastapi", reason="needs the server: pip install tierlm[serve]")
import uvicorn

from tierlm.server.app import application
from tierlm.server.guard import Guard
from tierlm.server.service import Limits, Service

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

PROMPT = "The Congress of the United States"
MESSAGES = [{"role": "user", "content": "Who are you?"}]
OPTIONS: LoadOptions = {"context": 400}
GREEDY = SamplingParams(max_new_tokens=12)


class Running:
    """A server in a thread of this process."""

    def __init__(self, limits: Limits, key: str | None = None, options: LoadOptions = OPTIONS, model: str = "demo"):
        self.service = Service("demo", limits)

        async def load() -> None:
            try:
                await self.service.load(model, Budget("2GiB"), options)
            except TierlmError:
                self.server.should_exit = True

        guard = Guard(application(self.service, load), key, True, limits.body)
        self.server = uvicorn.Server(uvicorn.Config(guard, port=0, lifespan="on", log_level="warning"))
        self.thread = threading.Thread(target=asyncio.run, args=(self.server.serve(),))
        self.thread.start()
        wait_for(lambda: self.server.started and (self.service.ready or self.server.should_exit))
        assert self.service.ready, self.service.failure
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"content-type": "application/json", **headers})
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, json.loads(content)

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers=headers)
        reply = connection.getresponse()
        content = reply.read().decode()
        connection.close()
        return reply.status, content


def wait_for(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


@contextmanager
def running(limits: Limits, **options: Any) -> Iterator[Running]:
    server = Running(limits, **options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(Limits(requests=8, body=2**16)) as server:
        yield server


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What the Python API answers."""
    with LLM.load("demo", budget="2GiB", **OPTIONS) as llm:
        text = llm.generate([PROMPT], SamplingParams(max_new_tokens=12, logprobs=2))[0]
        ids = llm.codec.chat(MESSAGES)
        chat = llm.generate([ids], GREEDY)[0]
        sampled = [
            result.text
            for result in llm.generate([PROMPT], SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, n=2))
        ]
    return {"text": text, "chat": chat, "sampled": sampled, "chat_prompt": len(ids)}


@pytest.fixture
def client(served: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_completions(client: Any, expected: dict[str, Any]) -> None:
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    reply = client.completions.create(**asked, logprobs=2)
    (choice,), text = reply.choices, expected["text"]
    assert (choice.text, choice.finish_reason) == (text.text, "length")
    assert reply.usage.prompt_tokens == len(text.prompt_ids) and reply.usage.completion_tokens == 12
    assert "".join(choice.logprobs.tokens) == text.text
    assert choice.logprobs.token_logprobs == pytest.approx([one.logprob for one in text.logprobs])
    assert choice.logprobs.text_offset[1] == len(choice.logprobs.tokens[0])
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 11 + ["length"]
    usage = chunks[-1].usage
    assert chunks[-1].choices == [] and (usage.prompt_tokens, usage.completion_tokens) == (len(text.prompt_ids), 12)
    assert usage.prompt_tokens_details.cached_tokens == len(text.prompt_ids) - 1  # of the request before
    by_ids = client.completions.create(**{**asked, "prompt": [text.prompt_ids, text.prompt_ids[:3]]})
    assert by_ids.choices[0].text == text.text and by_ids.choices[1].index == 1
    assert client.completions.create(model="demo", prompt=PROMPT).usage.completion_tokens == 16


def test_chat(client: Any, expected: dict[str, Any]) -> None:
    asked = {"model": "demo", "max_completion_tokens": 12, "temperature": 0}
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]}]
    reply = client.chat.completions.create(**asked, messages=parts, logprobs=True, top_logprobs=1)
    assert reply.choices[0].message.content == expected["chat"].text
    assert reply.usage.prompt_tokens == expected["chat_prompt"]
    assert "".join(one.token for one in reply.choices[0].logprobs.content) == expected["chat"].text
    chunks = list(client.chat.completions.create(**asked, messages=MESSAGES, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected["chat"].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_samples_and_stop(client: Any, expected: dict[str, Any]) -> None:
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 1, "seed": 3, "n": 2}
    reply = client.completions.create(**asked)
    assert [choice.text for choice in reply.choices] == expected["sampled"]
    parts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == expected["sampled"]
    whole = expected["text"].text
    stopped = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=12, temperature=0, stop=[whole[10:16], "zzz"]
    )
    assert stopped.choices[0].text == whole[:10] and stopped.choices[0].finish_reason == "stop"


def test_the_next_turn_of_a_chat_computes_what_it_adds(served: Running, client: Any) -> None:
    """With the text of a server that has kept nothing. Another chat that begins alike is not in its way."""
    asked = {"model": "demo", "max_completion_tokens": 12, "temperature": 0}
    messages, before = list(MESSAGES), prompt_tokens(served)
    for text in ("And what is a tier?", "Say it again."):
        reply = client.chat.completions.create(**asked, messages=messages)
        messages += [
            {"role": "assistant", "content": reply.choices[0].message.content},
            {"role": "user", "content": text},
        ]
        client.chat.completions.create(**asked, messages=[{"role": "user", "content": f"Who are they, {text}"}])
    codec = served.service.llm.codec
    known = len(codec.chat(messages[:-2]))
    turn = client.chat.completions.create(**asked, messages=messages)
    usage = turn.usage
    assert known <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    computed, cached = (b - a for a, b in zip(before, prompt_tokens(served), strict=True))
    assert cached > computed
    with running(Limits()) as fresh:
        body = {**asked, "messages": messages}
        content = fresh.post("/v1/chat/completions", body)[2]
    assert content["choices"][0]["message"]["content"] == turn.choices[0].message.content
    assert content["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def prompt_tokens(served: Running) -> tuple[float, float]:
    """Prompt tokens that the model computed, and those that it had."""
    cached = re.search(r"^tierlm_prompt_tokens_cached_total (.*)", served.get("/metrics")[1], re.MULTILINE)
    assert cached is not None
    return json.loads(served.get("/stats")[1])["prompt_tokens"], float(cached[1])


def test_the_messages_api(served: Running, expected: dict[str, Any]) -> None:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        asked = {"model": "demo", "max_tokens": 12, "messages": MESSAGES}
        reply = client.messages.create(**asked)
        assert reply.content[0].text == expected["chat"].text and reply.stop_reason == "max_tokens"
        usage = reply.usage
        assert usage.input_tokens + usage.cache_read_input_tokens == expected["chat_prompt"]
        assert usage.output_tokens == 12
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == expected["chat"].text
            usage = stream.get_final_message().usage
            assert (usage.input_tokens, usage.output_tokens) == (1, 12)
            assert usage.cache_read_input_tokens == expected["chat_prompt"] - 1
        counted = client.messages.count_tokens(model="demo", messages=MESSAGES)
        assert counted.input_tokens == expected["chat_prompt"]
        with pytest.raises(anthropic.BadRequestError, match="text-only"):
            client.messages.create(**{**asked, "messages": [{"role": "user", "content": [{"type": "image"}]}]})


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", {"model": "other", "prompt": "a"}, 404, "'other' is not served here: expected 'demo'"),
        ("/v1/completions", {"model": "demo", "prompt": "a", "best": 1}, 400, "best: "),
        ("/v1/completions", {"model": "demo", "prompt": "a", "max_tokens": 0}, 400, "max_tokens: expected at least 1"),
        ("/v1/completions", {"model": "demo", "prompt": "a", "n": 1000}, 400, "n: expected at most 128"),
        ("/v1/completions", {"model": "demo", "prompt": "a", "temperature": "0"}, 400, "temperature"),
        ("/v1/completions", {"model": "demo", "prompt": "a", "logprobs": 1000}, 400, "0 to 100"),
        ("/v1/completions", {"model": "demo", "prompt": "a", "logit_bias": {"x": 1}}, 400, "token ids"),
        ("/v1/completions", {"model": "demo", "prompt": []}, 400, "at least one token"),
        ("/v1/completions", {"model": "demo", "prompt": [10**9]}, 400, "not in the vocabulary"),
        ("/v1/completions", {"model": "demo", "prompt": [5] * 500}, 400, "500 tokens"),
        ("/v1/completions", {"model": "demo"}, 400, "prompt"),
        ("/v1/completions", b"{", 400, "JSON"),
        ("/v1/completions", b"x" * 2**17, 413, "65536 bytes"),
        ("/v1/chat/completions", {"model": "demo", "messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"model": "demo", "messages": [{}], "tools": [{}]}, 400, "tools"),
        (
            "/v1/chat/completions",
            {"model": "demo", "messages": MESSAGES, "response_format": {"type": "xml"}},
            400,
            "expected text, json_object or json_schema, found 'xml'",
        ),
        (
            "/v1/chat/completions",
            {"model": "demo", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages[0].content: expected text",
        ),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/v1/models", {}, 405, "Not Allowed"),
    ],
)
def test_wrong_requests(served: Running, path: str, body: Any, status: int, said: str) -> None:
    found, _, content = served.post(path, body)
    assert found == status and said in content["error"]["message"]


def test_a_page_of_another_site_is_refused(served: Running) -> None:
    body = {"model": "demo", "prompt": "a"}
    assert served.post("/v1/completions", body, host="evil.example")[0] == 403
    assert served.post("/v1/completions", body, origin="http://evil.example")[0] == 403
    assert served.post("/v1/completions", body, origin=served.url)[0] == 200


def test_requests_run_together(served: Running, expected: dict[str, Any]) -> None:
    """Eight at once get the text that each gets alone; then no place is taken."""
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        replies = [pool.submit(client.completions.create, **asked) for _ in range(8)]
        assert {reply.result().choices[0].text for reply in replies} == {expected["text"].text}
    wait_for(lambda: "tierlm_requests_live 0.0" in served.get("/metrics")[1])


def test_clients_that_vanish(served: Running) -> None:
    """Streaming or not, before and after the first token: the cache is free within steps, and the server lives."""
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 390, "ignore_eos": True}
    for count in range(12):
        data = json.dumps({**body, "stream": count % 2 == 0}).encode()
        request = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(request + f"content-length: {len(data)}\r\n\r\n".encode() + data)
            if count % 4 == 0:
                assert b"200 OK" in connection.recv(1000)
    wait_for(lambda: "tierlm_requests_live 0.0" in served.get("/metrics")[1])
    assert served.post("/v1/completions", {**body, "max_tokens": 2})[0] == 200
    scheduler = served.service.llm._llm._runtime.scheduler  # type: ignore[union-attr]
    wait_for(lambda: not scheduler._running and not scheduler._waiting)


def test_full_and_too_slow() -> None:
    long = {"model": "demo", "prompt": PROMPT, "max_tokens": 390, "ignore_eos": True}
    with running(Limits(requests=1, seconds=0.5), options={"context": 1000}) as server, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(server.post, "/v1/completions", {**long, "max_tokens": 990})  # takes longer anywhere
        wait_for(lambda: "tierlm_requests_live 1.0" in server.get("/metrics")[1])
        status, headers, content = server.post("/v1/completions", long)
        assert status == 429 and int(headers["retry-after"]) >= 1 and "try again" in content["error"]["message"]
        status, _, content = slow.result()
        assert status == 504 and "not done after 0.5 s" in content["error"]["message"]
        assert 'requests_total{outcome="timeout"} 1.0' in server.get("/metrics")[1]


def test_the_key() -> None:
    with running(Limits(), key="s3cret") as server:
        assert server.get("/health")[0] == 200
        assert server.get("/v1/models")[0] == 401
        assert server.get("/v1/models", authorization="Bearer wrong")[0] == 401
        assert server.get("/v1/models", authorization="Bearer s3cret")[0] == 200
        assert server.get("/metrics", **{"x-api-key": "s3cret"})[0] == 200


def test_metrics_and_stats(served: Running) -> None:
    served.post("/v1/completions", {"model": "demo", "prompt": PROMPT, "max_tokens": 3})
    text = served.get("/metrics")[1]
    assert 'tierlm_expert_requests_total{result="hit",tier="ram"}' in text
    assert 'tierlm_link_bytes_total{link="disk->ram"}' in text
    assert 'tierlm_kv_tokens{tier="ram"}' in text and 'tierlm_kv_hit_bytes_total{tier="ram"}' in text
    count = next(line for line in text.splitlines() if line.startswith("tierlm_time_to_first_token_seconds_count"))
    assert float(count.split()[1]) >= 1
    assert json.loads(served.get("/stats")[1])["new_tokens"] >= 3


def test_prompts_are_found_after_a_restart(tmp_path: Path) -> None:
    options: LoadOptions = {**OPTIONS, "kv_disk": "64MiB", "kv_folder": tmp_path}
    asked, answers = {"model": "demo", "prompt": PROMPT * 12, "max_tokens": 3}, list[Any]()
    for _ in range(2):
        with running(Limits(), options=options) as server:
            answers.append(server.post("/v1/completions", asked)[2])
            text, figures = server.get("/metrics")[1], json.loads(server.get("/live")[1])
        assert 'tierlm_kv_tokens{tier="disk"}' in text and figures["kv"]["disk"] is not None
    assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers] == [0, 64]


def test_the_page_about_it(served: Running, expected: dict[str, Any]) -> None:
    """The example of docs/server.md, and each route that it names."""
    page = (Path(__file__).parent.parent / "docs" / "server.md").read_text()
    example = re.search(r"```py\n(.*?)```", page, re.DOTALL)
    assert example is not None
    namespace: dict[str, Any] = {}
    exec(example[1].replace("http://127.0.0.1:8000", served.url), namespace)
    assert namespace["reply"].choices[0].message.content.startswith(expected["chat"].text)
    paths = set(json.loads(served.get("/openapi.json")[1])["paths"]) - {"/v1/models/{name}"}
    assert set(re.findall(r"`(/[a-z0-9_/]+)`", page)) == paths


@contextmanager
def command(*words: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``tierlm serve demo``, ready, and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tierlm", "serve", "demo", "--ram", "2GiB", "--port", "0", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert "listening at http://127.0.0.1:" in line, line + process.stderr.read()
        port = int(line.split(":")[2].split("/")[0])
        assert "demo is ready" in process.stderr.readline()
        yield process, port
    finally:
        process.kill()
        process.communicate()


def test_the_command_drains(tmp_path: Path) -> None:
    """After SIGTERM a running answer ends as asked, new connections are refused, and the exit code is 0."""
    with command("--context", "1000", TIERLM_SERVE_API_KEY="k") as (process, port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0)
        stream = client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        count = 1 + bool(next(stream))
        process.send_signal(signal.SIGTERM)
        count += sum(bool(chunk.choices[0].text) for chunk in stream)
        assert count > 150
        client.close()
        assert process.wait(60) == 0


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, "-m", "tierlm", "serve", "demo", "--port", port],
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"cannot listen at 127.0.0.1:{port}" in ended.stderr


def test_an_empty_key_is_refused() -> None:
    """It would let everybody in."""
    words = [sys.executable, "-m", "tierlm", "serve", "demo", "--port", "0", "--api-key", ""]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2 and "--api-key: expected at least one character" in ended.stderr


def test_a_bug_while_loading_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the command does not end as if all were well."""

    async def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr("tierlm.server.service.AsyncLLM.load", fail)
    service = Service("demo", Limits())
    with pytest.raises(MemoryError):
        asyncio.run(service.load("demo", Budget("2GiB"), OPTIONS))
    assert isinstance(service.failure, MemoryError)


def test_a_model_that_does_not_load() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tierlm", "serve", "/nothing/here", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 2 and "ModelNotFoundError" in ended.stderr and "Traceback" not in ended.stderr
