"""The application: routes, errors, and the model's life from start to shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tierlm.errors import PromptError, TierlmError, UsageError, shown
from tierlm.server import anthropic, openai
from tierlm.server.connection import Gone
from tierlm.server.figures import Figures
from tierlm.server.page import page
from tierlm.server.replies import error
from tierlm.server.service import Busy, NotReady, Service, TimedOut, UnknownModel

LOADING = 5  # seconds after which a client may ask again, while the model is being loaded
CLOSED = 499  # nginx's status for a client that is gone; nobody reads it


def application(service: Service, load: Callable[[], Coroutine[Any, Any, None]]) -> FastAPI:
    """``load``: begins with the server, and ends before it accepts work."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load())
        try:
            yield
        finally:
            loading.cancel()
            with suppress(asyncio.CancelledError, Exception):  # kept by the service
                await loading
            await service.close()

    app = FastAPI(title="tierlm", lifespan=life, docs_url=None, redoc_url=None)
    figures = Figures(service)
    app.include_router(openai.routes(service))
    app.include_router(anthropic.routes(service))

    @app.get("/health")
    async def health() -> Response:
        """Ready, failed, or how far the load is."""
        return JSONResponse(service.state(), 200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/live")
    async def live() -> dict[str, Any]:
        """The figures of the page: rates of the last seconds, and which experts are where."""
        return figures.now()

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return page()

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        """All counters of the model, as ``tierlm run --json`` writes them."""
        return service.llm.stats().as_json()

    _handle(app)
    return app


def _handle(app: FastAPI) -> None:
    """Errors as OpenAI's API writes them."""

    def on(kind: type[Exception], status: int, name: str, after: Callable[[Any], int] | None = None) -> None:
        async def reply(_: Request, failure: Any) -> Response:
            headers = None if after is None else {"retry-after": str(after(failure))}
            return JSONResponse(error(str(failure), name), status, headers)

        app.add_exception_handler(kind, reply)

    on(TierlmError, 500, "server_error")
    on(UsageError, 400, "invalid_request_error")
    on(UnknownModel, 404, "invalid_request_error")
    on(Busy, 429, "rate_limit_error", lambda busy: busy.after)
    on(NotReady, 503, "server_error", lambda _: LOADING)
    on(TimedOut, 504, "server_error")
    on(Gone, CLOSED, "cancelled")

    async def too_long(_: Request, failure: Any) -> Response:
        return JSONResponse(error(str(failure), "invalid_request_error", "context_length_exceeded", "messages"), 400)

    async def malformed(_: Request, failure: Any) -> Response:
        first = failure.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        found = f", found {shown(first['input'])}" if "input" in first and first["type"] != "missing" else ""
        message = f"{where}: {first['msg']}{found}" if where else f"{first['msg']}{found}"
        return JSONResponse(error(message, "invalid_request_error", param=where or None), 400)

    async def by_status(_: Request, failure: Any) -> Response:
        return JSONResponse(error(str(failure.detail), "invalid_request_error"), failure.status_code, failure.headers)

    app.add_exception_handler(PromptError, too_long)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, by_status)
