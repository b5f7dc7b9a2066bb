"""``tierlm top``: the figures of a running server in the terminal."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from json import load
from typing import Annotated, Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text
from typer import Argument, Option

from tierlm.cli.options import Json
from tierlm.cli.output import pairs, report
from tierlm.config import format_size
from tierlm.errors import TierlmError, UsageError

EVERY = 1.0  # seconds between two frames
PATIENCE = 10.0  # seconds to wait for an answer
LOOKS = {"disk": ("·", "dim"), "arriving": ("▒", "yellow"), "ram": ("▓", "blue"), "vram": ("█", "red")}
MARGIN = 5  # columns for the number of a layer


def top(
    url: Annotated[str, Argument(metavar="URL", help="Of the server.")] = "http://127.0.0.1:8000",
    *,
    api_key: Annotated[str | None, Option(metavar="KEY", help="The server's; better in TIERLM_TOP_API_KEY.")] = None,
    once: Annotated[bool, Option("--once", help="One frame, with the rates of one second.")] = False,
    json: Json = None,
) -> None:
    """Watch a server of `tierlm serve`: experts by tier, links, hit rates, requests, times. Ctrl-C ends it."""
    address = _address(url)
    if once or json is not None or not sys.stdout.isatty():
        _read(address, api_key)  # rates begin with the first reader
        time.sleep(EVERY)
        found = _read(address, api_key)
        report(found, json, Frame(found))
        return
    from rich.live import Live

    with suppress(KeyboardInterrupt), Live(Frame(_read(address, api_key)), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(EVERY)
            live.update(Frame(_read(address, api_key)), refresh=True)


def _address(url: str) -> str:
    """The address of the figures. Raises UsageError."""
    from urllib.parse import urlsplit

    with suppress(ValueError):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}/live"
    raise UsageError(f"expected the URL of a server, such as http://127.0.0.1:8000, found {url!r}")


def _read(address: str, key: str | None) -> dict[str, Any]:
    """The figures at ``address``. Raises UsageError for a wrong key, TierlmError if there is no such server."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with urlopen(Request(address, headers=headers), timeout=PATIENCE) as reply:
            found = load(reply)
    except HTTPError as error:
        with error:
            if error.code == 401:
                raise UsageError(f"{address}: expected the server's API key, in --api-key") from None
            raise TierlmError(f"{address}: status {error.code}; expected a server of `tierlm serve`") from None
    except (OSError, HTTPException) as error:
        raise TierlmError(f"{address}: no answer: {getattr(error, 'reason', error)}; does the server run?") from None
    except ValueError:
        raise TierlmError(f"{address}: not JSON; expected a server of `tierlm serve`") from None
    if not isinstance(found, dict) or "status" not in found:
        raise TierlmError(f"{address}: expected the figures of `tierlm serve`, found other JSON")
    return found


class Frame:
    """One picture of the figures, fitted to the terminal."""

    def __init__(self, found: Mapping[str, Any]):
        self._found = found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self._found
        if found["status"] != "ready":
            share = f", {found['loaded_bytes'] / found['of_bytes']:.0%}" if found.get("of_bytes") else ""
            yield Text(f"{found['model']}: {found['status']}{share}")
            return
        table = Group(Text(str(found["model"]), style="bold"), pairs(self._rows()))
        left = options.size.height - len(console.render_lines(table, options)) - 2
        yield Group(
            table, *self._map(options.max_width, max(4, left) if console.is_terminal else len(found["experts"]))
        )

    def _rows(self) -> Iterator[tuple[str, str]]:
        found = self._found
        rates, kv, sequences = found["rates"], found["kv"], found["sequences"]
        if rates is not None:
            yield "tokens", f"{rates['new_tokens']:.1f} new, {rates['prompt_tokens']:.1f} of prompts a second"
        requests = found["requests"]
        yield "requests", f"{requests['live']} of {requests['limit']}"
        yield "sequences", f"{sequences['running']} running, {sequences['waiting']} waiting"
        for name, title in (("first_token", "first token"), ("next_token", "next token")):
            yield title, _times(found["seconds"][name])
        yield "KV cache", f"{kv['tokens']} tokens; {kv['reserved']} of {kv['context']} reserved"
        for tier, counts in (rates or {"experts": {}})["experts"].items():
            total = sum(counts.values())
            shares = ", ".join(
                f"{name.replace('_', ' ')} {count / total:.1%}" for name, count in counts.items() if total
            )
            yield f"experts in {tier}", f"{total:.0f} a second" + (f"; {shares}" if shares else "")
        for link, moved in (rates or {"links": {}})["links"].items():
            yield link, f"{moved['bytes'] / 1e9:.2f} GB/s, busy {moved['busy']:.0%}"
        for tier, parts in found["memory"]["plan"].items():
            listed = sorted(((size, name) for name, size in parts.items() if size), reverse=True)
            yield f"{tier} plan", ", ".join(f"{name} {format_size(size)}" for size, name in listed)
        yield "process", format_size(found["memory"]["process"])

    def _map(self, width: int, height: int) -> Iterator[Text]:
        """The experts: a line for a layer, or for several where the terminal is short."""
        legend, layers = self._found["legend"], self._found["experts"]
        total = Counter("".join(layers.values()))
        if not total:
            return
        told = Text("experts: ", style="dim")
        for letter, name in legend.items():
            told.append(LOOKS[name][0], LOOKS[name][1]).append(f" {name} {total[letter]}  ")
        yield told
        numbers, rows = list(layers), list(layers.values())
        step = -(-len(rows) // height)
        for at in range(0, len(rows), step):
            line = Text(f"{numbers[at]:>{MARGIN - 1}} ", style="dim", no_wrap=True)
            for letter in fitted("".join(rows[at : at + step]), max(1, width - MARGIN), "".join(legend)):
                line.append(*LOOKS[legend[letter]])
            yield line


def fitted(letters: str, width: int, order: str) -> str:
    """One line of ``letters``. Where they are too many, as many as fit, sorted from the end of ``order``: their shares
    are right, their places are lost."""
    if len(letters) <= width:
        return letters
    found = sorted(letters, key=order.index, reverse=True)
    return "".join(found[place * len(found) // width] for place in range(width))


def _times(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "-"
    return ", ".join(f"{name} {found[name]:.3f} s" for name in ("p50", "p95", "p99"))
