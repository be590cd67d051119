"""What a server shows of compression: a page, and the JSON that it polls."""

from importlib import resources

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from vllm.v1.engine.core_client import AsyncMPClient

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.endpoints import Endpoints, Refused, answered
from vllm_kvcompress.paging.statistics import ID_LENGTH

INLINE = "'unsafe-inline'"
# It loads nothing, and asks nobody but this server.
POLICY = f"default-src 'none'; connect-src 'self'; img-src data:; script-src {INLINE}; style-src {INLINE}"


class Page(Endpoints):
    """The paths under `/kv_compression`."""

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
        super().__init__(engines, api_keys)
        self._about = {"model": model, "method": config.method, "budget": config.budget, "when": config.when}
        self._html = resources.files("vllm_kvcompress").joinpath("page.html").read_text(encoding="utf-8")
        for path, handler in {"": self.page, "/state": self.state, "/heads": self.heads}.items():
            self.router.add_api_route(f"/kv_compression{path}", handler, include_in_schema=False)

    async def page(self) -> Response:
        """One file that needs nothing else."""
        return HTMLResponse(self._html, headers={"Content-Security-Policy": POLICY})

    @answered
    async def state(self, request: Request) -> Response:
        """The pool and the running requests of each engine (see `EngineState`)."""
        states = await self._ask("kv_compression_state")
        engines = [{"engine": rank} | state for rank, state in zip(self._ranks, states, strict=True)]
        return JSONResponse(self._about | {"engines": engines})

    @answered
    async def heads(self, request: Request) -> Response:
        """Pages that each head keeps of the request that is named as `state` names it."""
        named = request.query_params.getlist("request")
        if len(named) != 1 or not 0 < len(named[0]) <= ID_LENGTH:
            raise Refused(400, f"give one request=ID of 1 to {ID_LENGTH} characters, as /state names it")
        told = await self._ask("kv_compression_heads", named[0])
        heads = next((each for each in told if each is not None), None)
        if heads is None:
            raise Refused(404, "no running request of this name is compacted")
        return JSONResponse(heads)
