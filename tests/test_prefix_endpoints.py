"""The paths under `/v1/kv_compression/prefixes`, over engines and a tokenizer that do what a test says."""

import asyncio
import json
import time
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.tokenize.protocol import TokenizeResponse
from vllm.exceptions import QueueOverflowError, VLLMNotFoundError, VLLMValidationError

from vllm_kvcompress import prefix_endpoints
from vllm_kvcompress.paging.statistics import TAKEN
from vllm_kvcompress.prefix_endpoints import MOST_SALT, PATH, PrefixEndpoints

ADAPTER = object()


class Engines:
    """Two engine cores, of ranks 4 and 7, that keep prefixes as theirs do."""

    core_engines = [b"\x04\x00", b"\x07\x00"]

    def __init__(self) -> None:
        self.kept: list[tuple[int, str, str | None]] = []
        self.asked: list[tuple[str | None, ...]] = []
        self.unsaved: str | None = None  # why it could not be
        self.saving_s = 0.0
        self.tickets: dict[str, float] = {}  # when each save ends

    async def call_utility_all_async(self, *call: str | None):
        self.asked.append(call)
        method, *arguments = call
        if method == "kv_compression_prefixes":
            own = [(rank, name) for rank, name, salt in self.kept if [salt] == arguments]
            return [[{"id": "0", "name": name} for at, name in own if at == rank] for rank in (4, 7)]
        if method == "kv_compression_save_prefix":
            self.tickets[arguments[0]] = time.monotonic() + self.saving_s
            return [None, None]
        if method == "kv_compression_prefix_saved":
            (ticket,) = arguments
            ended = time.monotonic() >= self.tickets[ticket]
            return [[True, None], [ended, self.unsaved if ended else None]]
        assert method == "kv_compression_delete_prefix"
        found = [each for each in self.kept if list(each[1:]) == arguments]
        self.kept = [each for each in self.kept if each not in found]
        return [any(rank == each[0] for each in found) for rank in (4, 7)]


class Client:
    """An engine client whose requests leave a prefix, unless a test gives a reason or an error."""

    def __init__(self, engines: Engines) -> None:
        self.engine_core = engines
        self.model_config = SimpleNamespace(max_model_len=100)
        self.reason: str | None = None
        self.error: Exception | None = None
        self.ran: list[SimpleNamespace] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def generate(self, prompt, params, request_id, *, lora_request, data_parallel_rank):
        self.ran.append(
            SimpleNamespace(prompt=prompt, params=params, adapter=lora_request, index=data_parallel_rank)
        )
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        name, salt = params.extra_args["kv_compression"]["prefix"], prompt.get("cache_salt")
        told = {"kept": False, "name": name, "reason": self.reason}
        if self.reason is None:
            rank = (4, 7)[data_parallel_rank or 0]
            self.engine_core.kept.append((rank, name, salt))
            told = {"kept": True, "engine": rank, "id": "prefix-0", "name": name}
        yield SimpleNamespace(kv_transfer_params=None)
        yield SimpleNamespace(kv_transfer_params={"kv_compression": {"prefix": told}})


class Tokenization:
    """Knows a model and an adapter, and has a token for each character."""

    async def _check_model(self, request):
        if request.model in (None, "a model", "an adapter"):
            return None
        return create_error_response(VLLMNotFoundError(f"The model `{request.model}` does not exist."))

    def _maybe_get_adapters(self, request):
        return ADAPTER if request.model == "an adapter" else None

    async def create_tokenize(self, request, raw_request):
        text = getattr(request, "prompt", None)
        if text is None:
            assert not request.add_generation_prompt
            text = "".join(f"<{each['role']}>{each['content']}" for each in request.messages)
        if text == "untokenizable":
            raise VLLMValidationError("it has\nno tokens")
        ids = [ord(character) for character in text]
        return TokenizeResponse(tokens=ids, count=len(ids), max_model_len=100)


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def client(engines) -> Client:
    return Client(engines)


@pytest.fixture
def asking(client):
    app = FastAPI()
    app.include_router(PrefixEndpoints(client, Tokenization(), []).router)
    with TestClient(app) as asking:
        yield asking


def listed(asking, **query) -> list[tuple[int, str]]:
    answer = asking.get(PATH, params=query)
    assert answer.status_code == 200 and answer.json().keys() == {"prefixes"}
    return [(each["engine"], each["name"]) for each in answer.json()["prefixes"]]


def test_a_prefix_is_made_listed_and_deleted(asking, client):
    made = asking.post(PATH, json={"name": "a/b c", "prompt": "text"})
    assert made.status_code == 201
    assert made.json() == {"engine": 4, "id": "prefix-0", "name": "a/b c"}
    (ran,) = client.ran
    assert ran.prompt == {"type": "token", "prompt_token_ids": [ord(each) for each in "text"]}
    params = ran.params
    assert (params.max_tokens, params.min_tokens, params.ignore_eos, params.temperature) == (2, 2, True, 0)
    assert params.extra_args == {"kv_compression": {"prefix": "a/b c"}} and params.n == 1
    assert (ran.adapter, ran.index) == (None, None)
    assert listed(asking) == [(4, "a/b c")]
    deleted = asking.delete(f"{PATH}/a/b%20c")
    assert (deleted.status_code, deleted.json()) == (200, {"deleted": "a/b c"})
    again = asking.delete(f"{PATH}/a/b%20c")
    assert again.status_code == 404 and "no prefix of this name" in again.json()["error"]
    assert listed(asking) == []


def test_a_prefix_that_could_not_be_saved_is_told_of(asking, client, engines):
    engines.unsaved = "cannot write /kept/document: No space left on device"
    made = asking.post(PATH, json={"name": "document", "prompt": "text", "cache_salt": "salt"})
    assert made.status_code == 507 and made.json() == {
        "error": "the prefix is kept, but not saved: cannot write /kept/document: No space left on device"
    }
    (ticket,) = engines.tickets
    assert ("kv_compression_save_prefix", ticket, "document", "salt") in engines.asked
    assert listed(asking, cache_salt="salt") == [(4, "document")]


def test_what_takes_long_to_be_saved_is_waited_for(asking, engines, monkeypatch):
    engines.saving_s = 0.4
    begun = time.monotonic()
    assert asking.post(PATH, json={"name": "document", "prompt": "text"}).status_code == 201
    assert time.monotonic() - begun >= 0.4
    monkeypatch.setattr(prefix_endpoints, "SAVED_S", 0.1)
    answer = asking.post(PATH, json={"name": "another", "prompt": "text"})
    assert answer.status_code == 503 and "kept, but not saved within" in answer.json()["error"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"prompt_token_ids": [3, 0, 7]}, "\x03\x00\x07"),
        ({"messages": [{"role": "system", "content": "read"}]}, "<system>read"),
    ],
)
def test_a_prompt_may_be_tokens_or_messages_with_options_of_any_form(asking, client, given, text):
    flat = {"method": "knorm", "budget": "0.5"}
    options = ["knorm:budget=0.5", json.dumps(flat), flat]
    for number, option in enumerate(options):
        body = given | {"name": f"n{number}", "kv_compression": option, "model": "an adapter"}
        assert asking.post(PATH, json=body).status_code == 201
    for number, ran in enumerate(client.ran):
        assert ran.prompt["prompt_token_ids"] == [ord(each) for each in text] and ran.adapter is ADAPTER
        assert ran.params.extra_args["kv_compression"] == flat | {"prefix": f"n{number}"}


def test_salts_keep_their_prefixes_apart(asking, client):
    for salt in (None, "mine", "yours"):
        body = {"name": "document", "prompt": "text", "cache_salt": salt}
        assert asking.post(PATH, json=body).status_code == 201
        assert client.ran[-1].prompt.get("cache_salt") == salt
    assert listed(asking) == listed(asking, cache_salt="mine") == [(4, "document")]
    assert asking.delete(f"{PATH}/document", params={"cache_salt": "mine"}).status_code == 200
    assert (listed(asking, cache_salt="mine"), len(client.engine_core.kept)) == ([], 2)
    assert asking.delete(f"{PATH}/document", params={"cache_salt": "mine"}).status_code == 404


def test_each_engine_may_have_its_own_and_all_are_deleted_together(asking, client):
    def make(**rank) -> int:
        return asking.post(PATH, json={"name": "document", "prompt": "text"} | rank).status_code

    assert make(data_parallel_rank=7) == 201 and client.ran[-1].index == 1
    assert make() == make(data_parallel_rank=7) == 409 and len(client.ran) == 1
    assert make(data_parallel_rank=4) == 201 and client.ran[-1].index == 0
    assert listed(asking) == [(4, "document"), (7, "document")]
    assert asking.delete(f"{PATH}/document").status_code == 200 and listed(asking) == []
    for rank in (0, 1, "4", 4.0, True, -1):
        assert make(data_parallel_rank=rank) == 400


def test_why_nothing_was_kept_is_told(asking, client):
    client.reason = "the prompt is too short"
    answer = asking.post(PATH, json={"name": "document", "prompt": "text"})
    assert (answer.status_code, answer.json()) == (422, {"error": client.reason})
    client.reason = TAKEN  # by one that was made meanwhile
    answer = asking.post(PATH, json={"name": "document", "prompt": "text"})
    assert (answer.status_code, answer.json()) == (409, {"error": TAKEN})


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (VLLMValidationError("budget must be\nless", parameter="kv_compression"), 400, "budget must be"),
        (QueueOverflowError(), 503, ""),
        (ValueError("not so"), 400, "not so"),
    ],
)
def test_what_an_engine_refuses_is_one_line(asking, client, error, status, said):
    client.error = error
    answer = asking.post(PATH, json={"name": "document", "prompt": "text"})
    assert answer.status_code == status and answer.json()["error"].startswith(said)
    assert len(answer.json()["error"].splitlines()) == 1
    client.error = None
    assert asking.post(PATH, json={"name": "document", "prompt": "text"}).status_code == 201


GOOD = {"name": "document", "prompt": "text"}
PICTURE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}


@pytest.mark.parametrize(
    "body",
    [
        [],
        "text",
        {"prompt": "text"},
        {"name": "document"},
        GOOD | {"name": ""},
        GOOD | {"name": "x" * 129},
        GOOD | {"name": "two\nlines"},
        GOOD | {"name": "\ud800"},
        GOOD | {"name": 3},
        GOOD | {"prompt": 3},
        GOOD | {"prompt": "\ud800"},
        GOOD | {"prompt": "untokenizable"},
        GOOD | {"prompt_token_ids": [1]},
        GOOD | {"cache_salt": ""},
        GOOD | {"cache_salt": "x" * (MOST_SALT + 1)},
        GOOD | {"cache_salt": ["a"]},
        GOOD | {"max_tokens": 5},
        GOOD | {"model": 3},
        GOOD | {"kv_compression": 0.5},
        GOOD | {"kv_compression": "knorm:prefix=other"},
        GOOD | {"kv_compression": {"prefix": "document"}},
        GOOD | {"kv_compression": "{"},
        {"name": "document", "prompt_token_ids": []},
        {"name": "document", "prompt_token_ids": [1, -1]},
        {"name": "document", "prompt_token_ids": [1, True]},
        {"name": "document", "prompt_token_ids": [1.0]},
        {"name": "document", "prompt_token_ids": "12"},
        {"name": "document", "messages": 3},
        {"name": "document", "messages": ["text"]},
        {"name": "document", "messages": [{"content": "text"}]},
        {"name": "document", "messages": [{"role": "user", "content": [PICTURE]}]},
        {"name": "document", "messages": [{"role": "user", "content": [3]}]},
    ],
    ids=lambda body: json.dumps(body)[:60],
)
def test_a_malformed_body_is_one_line_and_runs_nothing(asking, client, body):
    answer = asking.post(PATH, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json().keys() == {"error"}
    assert len(answer.json()["error"].splitlines()) == 1 and len(answer.json()["error"]) < 300
    assert not client.ran
    assert asking.post(PATH, json=GOOD).status_code == 201


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 50_000, b'{"name": ' + b"1" * 5_000 + b"}", b" " * 1_000_000],
    ids=lambda content: str(content[:12]),
)
def test_what_is_no_json_or_too_much_of_it_is_refused(asking, client, content):
    answer = asking.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and len(answer.json()["error"].splitlines()) == 1
    assert ("bytes" in answer.json()["error"]) == (len(content) == 1_000_000)
    assert not client.ran


def test_only_json_is_read_for_a_page_of_another_site_may_send_anything_else(asking, client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = asking.post(PATH, content=json.dumps(GOOD), headers={"Content-Type": kind})
        assert answer.status_code == 400 and "application/json" in answer.json()["error"]
    assert not client.ran


def test_an_unknown_model_is_not_found(asking, client):
    answer = asking.post(PATH, json=GOOD | {"model": "another"})
    assert (answer.status_code, answer.json()["error"]) == (404, "The model `another` does not exist.")
    assert not client.ran


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "?cache_salt="),
        ("GET", "?cache_salt=one&cache_salt=two"),
        ("GET", "?salt=one"),
        ("GET", f"?cache_salt={'x' * (MOST_SALT + 1)}"),
        ("DELETE", f"/{'x' * 129}"),
        ("DELETE", "/two%09tabs"),
        ("DELETE", "/document?cache_salt="),
        ("DELETE", "/document?salt=one"),
    ],
)
def test_a_malformed_question_reaches_no_engine(asking, engines, method, path):
    answer = asking.request(method, PATH + path)
    assert answer.status_code == 400 and len(answer.json()["error"].splitlines()) == 1
    assert not engines.asked


def test_only_so_many_are_made_at_a_time(client, monkeypatch):
    monkeypatch.setattr(prefix_endpoints, "MOST_MADE", 2)
    client.go_on.clear()
    paths = PrefixEndpoints(client, Tokenization(), [])

    def request():
        async def receive():
            return {"type": "http.request", "body": json.dumps(GOOD).encode(), "more_body": False}

        scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
        return prefix_endpoints.Request(scope, receive)

    async def all_at_once() -> list[int]:
        tasks = [asyncio.create_task(paths.make(request())) for _ in range(5)]
        while len(client.ran) < 2:
            await asyncio.sleep(0)
        client.go_on.set()
        statuses = [(await task).status_code for task in tasks]
        return [*statuses, (await paths.make(request())).status_code]

    assert asyncio.run(all_at_once()) == [201, 201, 503, 503, 503, 409]


def test_every_path_asks_for_the_key(client):
    app = FastAPI()
    app.include_router(PrefixEndpoints(client, Tokenization(), ["first", "second"]).router)
    with TestClient(app) as asking:
        for key, status in ((None, 401), ("third", 401), ("second", 201)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            answers = [
                asking.post(PATH, json=GOOD, headers=headers),
                asking.get(PATH, headers=headers),
                asking.delete(f"{PATH}/document", headers=headers),
            ]
            assert [each.status_code for each in answers] == ([401] * 3 if status == 401 else [201, 200, 200])
            assert client.engine_core.asked == [] or status == 201
