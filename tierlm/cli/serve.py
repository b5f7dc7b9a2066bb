"""``tierlm serve``: a model behind HTTP."""

from __future__ import annotations

import signal
import socket
from typing import Annotated

from typer import Option

from tierlm.cli.generation import note
from tierlm.cli.interrupts import importing
from tierlm.cli.options import Loading, Memory, Messages, Model, Stored, grouped
from tierlm.config import Budget, LoadOptions, parse_size
from tierlm.errors import UsageError


@grouped
def serve(
    model: Model,
    *,
    host: Annotated[str, Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0: for other machines too.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, Option(min=0, max=65535, metavar="N", help="0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, Option(metavar="KEY", help="What clients must send; better in TIERLM_SERVE_API_KEY.")
    ] = None,
    name: Annotated[str | None, Option(metavar="NAME", help="The model's id in the API; default: MODEL.")] = None,
    requests: Annotated[int, Option(min=1, metavar="N", help="Requests that run or wait; more get status 429.")] = 64,
    time_limit: Annotated[float, Option(min=0.1, metavar="SECONDS", help="Of a request.")] = 600.0,
    body_limit: Annotated[str, Option(metavar="SIZE", help="Of a request.")] = "8MiB",
    drain: Annotated[int, Option(min=0, metavar="SECONDS", help="For running requests, when it is stopped.")] = 30,
    budget: Annotated[Budget, Memory()],
    options: Annotated[LoadOptions, Loading()],
    stored: Annotated[LoadOptions, Stored()],
    quiet: Annotated[bool, Messages()],
) -> None:
    """Serve a model over HTTP, as OpenAI's API does. Ctrl-C or SIGTERM: finish what runs, then end."""
    with importing():
        try:
            import uvicorn

            from tierlm.server.app import application
        except ImportError as error:
            raise UsageError(f"serve needs {error.name}: pip install 'tierlm[serve]'") from error
        from tierlm.server.guard import Guard, is_loopback
        from tierlm.server.service import Limits, Service

    if api_key == "":
        raise UsageError("--api-key: expected at least one character; leave it out to serve without a key")
    service = Service(name or model, Limits(requests, time_limit, parse_size(body_limit, "--body-limit")))
    local = is_loopback(host)
    if not local and api_key is None and not quiet:
        note(f"{host} is reachable by others, and no --api-key is set: everybody there can use the model")

    async def load() -> None:
        try:
            await service.load(model, budget, {**options, **stored})
        except BaseException:
            server.should_exit = True
            raise
        if not quiet:
            note(f"{service.name} is ready")

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started and not quiet:
                where = self.servers[0].sockets[0].getsockname()
                note(f"listening at http://{host}:{where[1]}/v1, loading {model}")

    guard = Guard(application(service, load), api_key, local, service.limits.body)
    server = Server(
        uvicorn.Config(
            guard,
            host=host,
            port=port,
            lifespan="on",
            log_level="warning",
            timeout_graceful_shutdown=drain,
            server_header=False,
        )
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # the server raises what it has handled once more when it has ended
        signal.signal(number, lambda *_: None)
    try:
        server.run()
    except SystemExit as error:  # uvicorn's own, for an address in use
        raise UsageError(f"cannot listen at {host}:{port}: see above") from error
    if service.failure is not None:
        raise service.failure
