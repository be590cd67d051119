"""What a server shows of compression: a page, and the JSON that it polls.

Each engine core is asked by vLLM's utility calls, which it answers between two steps.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.logger import init_logger
from vllm.v1.engine.core_client import AsyncMPClient

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.statistics import ID_LENGTH

logger = init_logger("vllm.kv_compression")  # under the name whose messages vLLM shows

ANSWER_S = 10.0  # an engine answers between two steps
MOST_CALLS = 8  # that an engine has not answered
INLINE = "'unsafe-inline'"
# It loads nothing, and asks nobody but this server.
POLICY = f"default-src 'none'; connect-src 'self'; img-src data:; script-src {INLINE}; style-src {INLINE}"
Handler = Callable[["Page", Request], Awaitable[Response]]


class _Refused(Exception):
    """One line for who asked, and an HTTP status."""

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status = status


def _answered(handler: Handler) -> Handler:
    """A handler for who has the API key, if there is one, whose errors are one line of JSON."""

    @functools.wraps(handler)
    async def wrapped(self: "Page", request: Request) -> Response:
        if self._guard is not None and not self._guard.verify_token(request.headers):
            return JSONResponse({"error": "Unauthorized"}, 401)  # as vLLM has it
        try:
            return await handler(self, request)
        except _Refused as refused:
            return JSONResponse({"error": str(refused)}, refused.status)

    return wrapped


class Page:
    """The paths of one front end.

    Attributes:
        router: to be included in its app.
    """

    def __init__(
        self, engines: AsyncMPClient, config: KVCompressionConfig, model: str, api_keys: list[str]
    ) -> None:
        """
        Args:
            engines: the engine cores that this front end talks to.
            config: the engine's options.
            model: its name.
            api_keys: one of which is asked for, if there are any, except for the page, which tells nothing.
        """
        self._engines = engines
        self._about = {"model": model, "method": config.method, "budget": config.budget, "when": config.when}
        self._calls: dict[tuple[str, ...], asyncio.Future[list[Any]]] = {}
        self.router = APIRouter()
        # vLLM's own middleware passes over paths that are not its own.
        self._guard = AuthenticationMiddleware(self.router, api_keys) if api_keys else None
        self._html = resources.files("vllm_kvcompress").joinpath("page.html").read_text(encoding="utf-8")
        for path, handler in {"": self.page, "/state": self.state, "/heads": self.heads}.items():
            self.router.add_api_route(f"/kv_compression{path}", handler, include_in_schema=False)

    async def page(self) -> Response:
        """One file that needs nothing else."""
        return HTMLResponse(self._html, headers={"Content-Security-Policy": POLICY})

    @_answered
    async def state(self, request: Request) -> Response:
        """The pool and the running requests of each engine (see `EngineState`)."""
        ranks = [int.from_bytes(identity, "little") for identity in self._engines.core_engines]
        states = await self._ask("kv_compression_state")
        engines = [{"engine": rank} | state for rank, state in zip(ranks, states, strict=True)]
        return JSONResponse(self._about | {"engines": engines})

    @_answered
    async def heads(self, request: Request) -> Response:
        """Pages that each head keeps of the request that is named as `state` names it."""
        named = request.query_params.getlist("request")
        if len(named) != 1 or not 0 < len(named[0]) <= ID_LENGTH:
            raise _Refused(400, f"give one request=ID of 1 to {ID_LENGTH} characters, as /state names it")
        told = await self._ask("kv_compression_heads", named[0])
        heads = next((each for each in told if each is not None), None)
        if heads is None:
            raise _Refused(404, "no running request of this name is compacted")
        return JSONResponse(heads)

    async def _ask(self, *call: str) -> list[Any]:
        """One answer of each engine; who asks the same meanwhile shares it."""
        asked = self._calls.get(call)
        if asked is None:
            if len(self._calls) >= MOST_CALLS:
                raise _Refused(503, "too many questions are open; try again")
            asked = asyncio.ensure_future(self._engines.call_utility_all_async(*call))
            self._calls[call] = asked
            asked.add_done_callback(lambda _: self._calls.pop(call))
        done, _ = await asyncio.wait([asked], timeout=ANSWER_S)
        if not done:
            raise _Refused(503, f"the engine did not answer within {ANSWER_S:.0f} s; try again")
        if asked.cancelled() or (error := asked.exception()) is not None:
            problem = "cancelled" if asked.cancelled() else (str(error) or type(error).__name__)
            logger.warning("kv-compression: %s: %s", call[0], problem.splitlines()[0])
            raise _Refused(503, "the engine could not answer; see the server's log")
        return asked.result()
