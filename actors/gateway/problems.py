"""Every HTTP error as one JSON shape: a sentence with the way out, never a traceback."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import msgspec
import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from schema.messages import Problem

log = structlog.get_logger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

JSON: Final = "application/json"
NO_STORE: Final = "no-store"


class HttpProblem(Exception):
    """An answer of ``status`` whose body is ``{"error": sentence}``."""

    def __init__(self, status: int, error: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.headers = dict(headers or {})


def unavailable(error: str, retry_after: int = 1) -> HttpProblem:
    """503: asking again is safe and may help."""
    return HttpProblem(503, error, {"Retry-After": str(retry_after)})


def answer(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A value as a JSON response that no cache keeps."""
    return web.Response(
        body=msgspec.json.encode(value),
        status=status,
        content_type=JSON,
        headers={"Cache-Control": NO_STORE, **(headers or {})},
    )


def problem_response(problem: HttpProblem) -> web.Response:
    return answer(Problem(error=problem.error), status=problem.status, headers=problem.headers)


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost middleware: whatever a handler raises leaves as a :class:`schema.messages.Problem`."""
    try:
        response = await handler(request)
    except HttpProblem as problem:
        response = problem_response(problem)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        response = problem_response(_of_aiohttp(request, error))
    except ConnectionError:
        raise  # the client has gone: there is nobody to answer
    except Exception:
        incident = secrets.token_hex(4)
        log.exception(
            "request failed", action="http.failed", incident=incident, method=request.method, path=request.path
        )
        response = problem_response(
            HttpProblem(500, f"The gateway failed to answer this; its log has the details under {incident}.")
        )
    if not response.prepared:
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
    return response


class ServerLog(logging.Filter):
    """What is no HTTP at all never reaches a handler: the server answers 400 by itself, and its log needs a line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            log.info("not HTTP", action="http.bad", error=str(error.message)[:200])
            return False
        return True


def server_logger() -> logging.Logger:
    """A logger for the HTTP server without tracebacks for what senders do."""
    logger = logging.getLogger("aiohttp.server")
    if not any(isinstance(known, ServerLog) for known in logger.filters):
        logger.addFilter(ServerLog())
    return logger


def _of_aiohttp(request: web.Request, error: web.HTTPException) -> HttpProblem:
    if isinstance(error, web.HTTPNotFound):
        return HttpProblem(404, "There is nothing at this path: /docs lists what there is.")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return HttpProblem(405, f"This path takes {allowed}, not {request.method}.", {"Allow": allowed})
    return HttpProblem(error.status, f"The request was refused: {error.reason}.")
