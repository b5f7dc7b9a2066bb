"""A server that plays the Hugging Face Hub, for the library and for range requests."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/model"
LARGE = (".safetensors", ".gguf")


class MadeHub:
    """Serves ``files`` as REPO at COMMIT, which is also ``main`` and ``v1``.

    ``allow(name, start, stop)``: bytes of a large file to send before the connection is cut; None: all. ``token``:
    required if set. ``elsewhere``: large files are redirected to another host, which notes the tokens that it gets.
    ``sent``: (name, start) of each answer with bytes of large files.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files, self.token, self.elsewhere = files, "", False
        self.tokens_elsewhere: set[str | None] = set()
        self.allow: Callable[[str, int, int], int | None] = lambda name, start, stop: None
        self.sent: list[tuple[str, int]] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, head=True)

            def do_GET(self) -> None:
                hub.answer(self, head=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @classmethod
    def of(cls, folder: Path) -> MadeHub:
        return cls({str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()})

    def etag(self, name: str) -> str:
        data = self.files[name]
        return hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else hashlib.sha1(data).hexdigest()

    def answer(self, request: BaseHTTPRequestHandler, head: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        if path.startswith("/cdn/"):
            self.tokens_elsewhere.add(request.headers.get("Authorization"))
            return self.file(request, path.removeprefix("/cdn/"), head)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self.reply(request, 401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "no access"}, head)
        if match := re.fullmatch(rf"/api/models/{REPO}(?:/revision/([^/]+))?", path):
            if match[1] not in (None, "main", "v1", COMMIT):
                return self.reply(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, head)
            answer = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": [*map(self.sibling, self.files)]}
            return self.reply(request, 200, json.dumps(answer).encode(), {}, head)
        if re.fullmatch(rf"/api/models/{REPO}/tree/[^/]+", path):
            tree = [{"type": "file", "path": n, "oid": self.etag(n)[:40], **self.lfs(n)} for n in self.files]
            return self.reply(request, 200, json.dumps(tree).encode(), {}, head)
        match = re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path)
        if match is None or match[2] not in self.files:
            code = "EntryNotFound" if match else "RepoNotFound"
            return self.reply(request, 404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, head)
        if self.elsewhere and match[2].endswith(LARGE):
            other = f"{self.url.replace('127.0.0.1', 'localhost')}/cdn/{match[2]}"
            return self.reply(request, 302, b"", {"Location": other, "X-Repo-Commit": COMMIT}, head)
        return self.file(request, match[2], head)

    def sibling(self, name: str) -> dict[str, object]:
        return {"rfilename": name, "blobId": self.etag(name)[:40], **self.lfs(name)}

    def lfs(self, name: str) -> dict[str, object]:
        size = len(self.files[name])
        if not name.endswith(LARGE):
            return {"size": size}
        etag = self.etag(name)
        return {"size": size, "lfs": {"sha256": etag, "oid": etag, "size": size, "pointerSize": 100}}

    def file(self, request: BaseHTTPRequestHandler, name: str, head: bool) -> None:
        data, headers = self.files[name], {"ETag": f'"{self.etag(name)}"', "X-Repo-Commit": COMMIT}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked is None:
            return self.reply(request, 200, data, headers, head)
        start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        most = self.allow(name, start, stop)
        with self.lock:
            self.sent.append((name, start))
        return self.reply(request, 206, data[start:stop], headers, head, most)

    def reply(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        headers: dict[str, str],
        head: bool,
        most: int | None = None,
    ) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(key, value)
        request.end_headers()
        if not head:
            request.wfile.write(data[:most])
            if most is not None:
                request.close_connection = True


@contextmanager
def serving(hub: MadeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeHub]:
    """The library's Hub is ``hub``, its cache ``cache``."""
    from huggingface_hub import constants

    thread = threading.Thread(target=hub.server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        hub.server.shutdown()
        thread.join()
        hub.server.server_close()
