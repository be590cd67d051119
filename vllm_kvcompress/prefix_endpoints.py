"""Compacted prefixes over HTTP: made once of a prompt, for all requests that begin with it."""

import asyncio
import json
import time
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.utils import random_uuid
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError, check_name
from vllm_kvcompress.endpoints import Endpoints, Refused, answered
from vllm_kvcompress.paging.statistics import TAKEN
from vllm_kvcompress.prefix_requests import SAVE, SAVED, leaving, left_by, pauses

PATH = "/v1/kv_compression/prefixes"
PROMPTS = "prompt", "prompt_token_ids", "messages"
FIELDS = {"name", *PROMPTS, "kv_compression", "cache_salt", "model", "data_parallel_rank"}
MOST_SALT = 1024  # characters
MOST_MADE = 8  # at a time
SAVED_S = 600.0  # a large one takes longer to be written than a question to be answered
TOKEN_BYTES = 64  # of a body, for each token that the model can take


class PrefixEndpoints(Endpoints):
    """The paths under `/v1/kv_compression/prefixes`."""

    def __init__(self, client: AsyncLLM, tokenization: ServingTokenization, api_keys: list[str]) -> None:
        """
        Args:
            client: by whom requests are run.
            tokenization: what makes tokens of text and messages, and knows the adapters.
            api_keys: one of which is asked for, if there are any.
        """
        super().__init__(client.engine_core, api_keys)
        self._client = client
        self._tokenization = tokenization
        self._being_made = 0
        add = self.router.add_api_route
        add(PATH, self.make, methods=["POST"], include_in_schema=False)
        add(PATH, self.show, methods=["GET"], include_in_schema=False)
        add(PATH + "/{name:path}", self.delete, methods=["DELETE"], include_in_schema=False)

    @answered
    async def make(self, request: Request) -> Response:
        """Compact a prompt, and keep it under a name; 201 with its description."""
        if self._being_made >= MOST_MADE:
            raise Refused(503, f"{MOST_MADE} prefixes are being made; try again")
        self._being_made += 1
        try:
            return await self._make(request, await self._body(request))
        finally:
            self._being_made -= 1

    async def _make(self, request: Request, body: dict[str, Any]) -> Response:
        name, salt, rank = body.get("name"), _salt(body.get("cache_salt")), body.get("data_parallel_rank")
        index = None if rank is None else self._index(rank)
        try:
            check_name(name)
            option = KVCompressionConfig.with_prefix(body.get("kv_compression"), name)
        except KVCompressionError as error:
            raise Refused(400, str(error)) from None
        listed = await self._listed(salt)
        if any(each["name"] == name and rank in (None, each["engine"]) for each in listed):
            raise Refused(409, TAKEN)
        try:
            tokens, adapter = await self._tokens(request, body)
            answers = self._client.generate(
                tokens_input(tokens, cache_salt=salt),
                leaving(option),
                f"kv-prefix-{random_uuid()}",
                lora_request=adapter,
                data_parallel_rank=index,
            )
            output = [answer async for answer in answers][-1]
        except (VLLMClientError, GracefulHTTPError, ValueError, TypeError) as error:
            raise _refused(create_error_response(error)) from None
        told = left_by(output)
        if not told.pop("kept"):
            raise Refused(409 if told["reason"] == TAKEN else 422, told["reason"])
        for problem in filter(None, await self._saved(name, salt)):
            raise Refused(507, f"the prefix is kept, but not saved: {problem}")
        return JSONResponse(told, 201)

    async def _saved(self, name: str, salt: str | None) -> list[str | None]:
        """Have a prefix saved by who has it, if it has a folder; of each engine what was in the way."""
        ticket, deadline = random_uuid(), time.monotonic() + SAVED_S
        await self._ask(SAVE, ticket, name, salt)
        for pause in pauses():
            outcomes = await self._ask(SAVED, ticket)
            if all(ended for ended, _ in outcomes):
                break
            if time.monotonic() > deadline:
                raise Refused(503, f"the prefix is kept, but not saved within {SAVED_S:.0f} s")
            await asyncio.sleep(pause)
        return [problem for _, problem in outcomes]

    @answered
    async def show(self, request: Request) -> Response:
        """The prefixes under a salt, of each engine (see `PrefixState`)."""
        return JSONResponse({"prefixes": await self._listed(_salt_of(request))})

    @answered
    async def delete(self, request: Request) -> Response:
        """Delete the prefix of a name under a salt, in every engine that has it."""
        name, salt = request.path_params["name"], _salt_of(request)
        try:
            check_name(name)
        except KVCompressionError as error:
            raise Refused(400, str(error)) from None
        if not any(await self._ask("kv_compression_delete_prefix", name, salt)):
            raise Refused(404, "there is no prefix of this name under this cache_salt")
        return JSONResponse({"deleted": name})

    async def _listed(self, salt: str | None) -> list[dict[str, Any]]:
        told = zip(self._ranks, await self._ask("kv_compression_prefixes", salt), strict=True)
        return [{"engine": rank} | each for rank, prefixes in told for each in prefixes]

    async def _body(self, request: Request) -> dict[str, Any]:
        """What a client sent, if it is an object with known fields."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(400, "send the body as application/json")
        most, read = TOKEN_BYTES * self._client.model_config.max_model_len + (1 << 16), bytearray()
        try:
            async for part in request.stream():
                read += part
                if len(read) > most:
                    raise Refused(400, f"the body has more than {most} bytes")
        except ClientDisconnect:
            raise Refused(400, "the body did not arrive") from None
        try:
            body = json.loads(read)
            json.dumps(body, ensure_ascii=False).encode()  # no half of a surrogate pair
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON in UTF-8") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body must be an object")
        if unknown := sorted(body.keys() - FIELDS):
            raise Refused(400, f"unknown field {unknown[0][:64]!r}; use {', '.join(sorted(FIELDS))}")
        return {field: value for field, value in body.items() if value is not None}

    def _index(self, rank: object) -> int:
        """Of an engine among those that this front end talks to."""
        if type(rank) is not int or rank not in self._ranks:
            known = ", ".join(map(str, self._ranks))
            raise Refused(400, f"data_parallel_rank must be one of {known}")
        return self._ranks.index(rank)

    async def _tokens(self, request: Request, body: dict[str, Any]) -> tuple[list[int], LoRARequest | None]:
        """The prompt, and the adapter that computes it, as vLLM's own endpoints have them."""
        given, model = [field for field in PROMPTS if field in body], body.get("model")
        if len(given) != 1:
            raise Refused(400, f"give one of {', '.join(PROMPTS)}")
        ids = body.get("prompt_token_ids")
        if ids is not None and not _are_ids(ids):
            raise Refused(400, "prompt_token_ids must be a list of numbers, 0 or more")
        if _are_more_than_text(body.get("messages")):
            raise Refused(400, "messages must be of text alone")
        try:
            asked: TokenizeCompletionRequest | TokenizeChatRequest
            if given == ["messages"]:
                messages = body["messages"]
                asked = TokenizeChatRequest(model=model, messages=messages, add_generation_prompt=False)
            else:
                asked = TokenizeCompletionRequest(model=model, prompt=body.get("prompt", ""))
        except ValidationError as error:
            first = error.errors()[0]
            raise Refused(400, f"{first['loc'][0]}: {first['msg']}") from None
        if (problem := await self._tokenization._check_model(asked)) is not None:
            raise _refused(problem)
        if ids is None:
            made = await self._tokenization.create_tokenize(asked, request)
            if isinstance(made, ErrorResponse):
                raise _refused(made)
            ids = made.tokens
        return ids, self._tokenization._maybe_get_adapters(asked)


def _salt(value: object) -> str | None:
    if value is None or (isinstance(value, str) and 0 < len(value) <= MOST_SALT):
        return value
    raise Refused(400, f"cache_salt must be a string of 1 to {MOST_SALT} characters")


def _salt_of(request: Request) -> str | None:
    """The salt in a query, which has nothing else."""
    given = request.query_params.multi_items()
    if [name for name, _ in given] not in ([], ["cache_salt"]):
        raise Refused(400, "give one cache_salt, or none, and nothing else")
    return _salt(given[0][1]) if given else None


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int and each >= 0 for each in value)


def _are_more_than_text(messages: object) -> bool:
    """Whether messages have pictures or the like, of which tokens alone are no prefix."""
    known = [each for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    contents = [message.get("content") for message in known]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(not isinstance(part, dict) or part.get("type") != "text" for part in parts)


def _refused(response: ErrorResponse) -> Refused:
    """What vLLM says of a request, in one line."""
    lines = response.error.message.splitlines()
    return Refused(response.error.code, lines[0] if lines else response.error.type)
