"""What paths of a server's front end have in common: the API key, errors of one line, questions to engines.

Each engine core is asked by vLLM's utility calls, which it answers between two steps.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.v1.engine.core_client import AsyncMPClient

from vllm_kvcompress.log import logger

ANSWER_S = 10.0  # an engine answers between two steps
MOST_CALLS = 8  # that an engine has not answered
Handler = Callable[[Any, Request], Awaitable[Response]]


class Refused(Exception):
    """One line for who asked, and an HTTP status."""

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status = status


def answered(handler: Handler) -> Handler:
    """A handler for who has the API key, if there is one, whose errors are one line of JSON."""

    @functools.wraps(handler)
    async def wrapped(self: "Endpoints", request: Request) -> Response:
        if self._guard is not None and not self._guard.verify_token(request.headers):
            return JSONResponse({"error": "Unauthorized"}, 401)  # as vLLM has it
        try:
            return await handler(self, request)
        except Refused as refused:
            return JSONResponse({"error": str(refused)}, refused.status)

    return wrapped


class Endpoints:
    """Paths of one front end.

    Attributes:
        router: to be included in its app.
    """

    def __init__(self, engines: AsyncMPClient, api_keys: list[str]) -> None:
        """
        Args:
            engines: the engine cores that this front end talks to.
            api_keys: one of which is asked for, if there are any.
        """
        self._engines = engines
        self._calls: dict[tuple[str | None, ...], asyncio.Future[list[Any]]] = {}
        self.router = APIRouter()
        # vLLM's own middleware passes over paths that are not its own.
        self._guard = AuthenticationMiddleware(self.router, api_keys) if api_keys else None

    @property
    def _ranks(self) -> list[int]:
        """Of the engines, in the order of their answers."""
        return [int.from_bytes(identity, "little") for identity in self._engines.core_engines]

    async def _ask(self, method: str, *args: str | None) -> list[Any]:
        """One answer of each engine, within `ANSWER_S`; who asks the same meanwhile shares it."""
        call = method, *args
        asked = self._calls.get(call)
        if asked is None:
            if len(self._calls) >= MOST_CALLS:
                raise Refused(503, "too many questions are open; try again")
            asked = asyncio.ensure_future(self._engines.call_utility_all_async(*call))
            self._calls[call] = asked
            asked.add_done_callback(lambda _: self._calls.pop(call))
        done, _ = await asyncio.wait([asked], timeout=ANSWER_S)
        if not done:
            raise Refused(503, f"the engine did not answer within {ANSWER_S:.0f} s; try again")
        if asked.cancelled() or (error := asked.exception()) is not None:
            problem = "cancelled" if asked.cancelled() else (str(error) or type(error).__name__)
            logger.warning("kv-compression: %s: %s", method, problem.splitlines()[0])
            raise Refused(503, "the engine could not answer; see the server's log")
        return asked.result()
