"""The paths under `/kv_compression`, over engines that answer what a test says."""

import asyncio
import threading
from argparse import Namespace
from types import SimpleNamespace

import pytest
import vllm.plugins
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from vllm_kvcompress import endpoints
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.page import Page
from vllm_kvcompress.paging.statistics import ID_LENGTH, shown_id
from vllm_kvcompress.plugin import register

HEADS = {"request": "two", "layers": [0, 1], "pages": [[1, 2], [3, 4]], "raw_pages": 5}


class Engines:
    """Two engine cores; the second one knows of a compacted request."""

    core_engines = [b"\x00\x00", b"\x01\x00"]

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.answer_at = threading.Event()
        self.answer_at.set()
        self.error: Exception | None = None

    async def call_utility_all_async(self, *call: str):
        self.asked.append(call)
        while not self.answer_at.is_set():
            await asyncio.sleep(0.01)
        if self.error is not None:
            raise self.error
        if call == ("kv_compression_state",):
            return [{"running": 0}, {"running": 1}]
        if call[0] == "kv_compression_prefixes":
            return [[], []]
        return [None, HEADS if call == ("kv_compression_heads", "two") else None]


@pytest.fixture
def engines() -> Engines:
    return Engines()


def served(engines: Engines, *api_keys: str):
    config = KVCompressionConfig.parse("snapkv:budget=0.25")
    app = FastAPI()
    app.include_router(Page(engines, config, "a model", list(api_keys)).router)
    return TestClient(app)


def test_what_every_engine_tells_is_shown_under_its_rank(engines):
    with served(engines) as client:
        assert client.get("/kv_compression/state").json() == {
            "model": "a model",
            "method": "snapkv",
            "budget": 0.25,
            "when": "prompt",
            "engines": [{"engine": 0, "running": 0}, {"engine": 1, "running": 1}],
        }
        answer = client.get("/kv_compression/heads", params={"request": "two"})
    assert (answer.status_code, answer.json()) == (200, HEADS)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 400),
        ("?request=", 400),
        ("?request=two&request=one", 400),
        ("?id=two", 400),
        (f"?request={'x' * (ID_LENGTH + 1)}", 400),
        (f"?request={'x' * ID_LENGTH}", 404),
        ("?request=one", 404),
    ],
)
def test_what_cannot_be_shown_is_one_line_and_a_malformed_question_reaches_no_engine(engines, query, status):
    with served(engines) as client:
        answer = client.get(f"/kv_compression/heads{query}")
    assert answer.status_code == status and len(answer.json()["error"].splitlines()) == 1
    assert bool(engines.asked) == (status == 404)


def test_an_error_of_an_engine_is_one_line_and_the_next_question_is_asked_anew(engines, caplog):
    engines.error = RuntimeError("a worker failed\nwith a trace")
    with served(engines) as client:
        answer = client.get("/kv_compression/state")
        assert answer.status_code == 503 and "see the server's log" in answer.json()["error"]
        engines.error = None
        assert client.get("/kv_compression/state").status_code == 200
    assert "a worker failed" in caplog.text and "trace" not in caplog.text


def test_a_busy_engine_is_asked_once_by_all_who_look_and_waited_for_no_longer_than_a_while(
    engines, monkeypatch
):
    monkeypatch.setattr(endpoints, "ANSWER_S", 0.1)
    engines.answer_at.clear()
    with served(engines) as client:
        answers = [client.get("/kv_compression/state") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [503] * 3
        assert "within" in answers[0].json()["error"] and engines.asked == [("kv_compression_state",)]
        for name in map(str, range(endpoints.MOST_CALLS)):  # one more than may be open
            last = client.get("/kv_compression/heads", params={"request": name})
        assert last.status_code == 503 and "too many" in last.json()["error"]
        assert len(engines.asked) == endpoints.MOST_CALLS
        engines.answer_at.set()
        monkeypatch.setattr(endpoints, "ANSWER_S", 10)
        assert client.get("/kv_compression/state").status_code == 200


def test_with_api_keys_all_but_the_empty_page_asks_for_one(engines):
    with served(engines, "first", "second") as client:
        for path in ("state", "heads?request=two"):
            for header in ({}, {"Authorization": "Bearer third"}, {"Authorization": "first"}):
                answer = client.get(f"/kv_compression/{path}", headers=header)
                assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
            assert not engines.asked
        for path in ("state", "heads?request=two"):
            header = {"Authorization": "Bearer second"}
            assert client.get(f"/kv_compression/{path}", headers=header).status_code == 200
        assert client.get("/kv_compression").status_code == 200


def test_the_page_is_one_file_that_loads_nothing_else(engines):
    with served(engines) as client:
        answer = client.get("/kv_compression")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert (
        "http" not in answer.text.replace("http://www.w3.org/2000/svg", "") and "innerHTML" not in answer.text
    )
    assert not engines.asked


@pytest.mark.parametrize(
    ("additional", "status"),
    [({"kv_compression": "snapkv"}, 200), ({"kv_compression": "off"}, 404), ({}, 404)],
)
@pytest.mark.parametrize("key", ["given", "in the environment"])
def test_a_server_has_it_where_it_compresses_with_the_key_of_its_other_paths(
    engines, additional, status, key, monkeypatch
):
    register()
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    plugins = vllm.plugins.load_endpoint_plugins(("generate",))
    assert len(plugins) == 1 and isinstance(plugins[0], EndpointPlugin)
    monkeypatch.setenv("VLLM_API_KEY", key if key == "in the environment" else "")
    app, config = FastAPI(), SimpleNamespace(served_model_name="a model")
    client = SimpleNamespace(
        engine_core=engines, vllm_config=SimpleNamespace(additional_config=additional, model_config=config)
    )
    args = Namespace(api_key=[key] if key == "given" else None)
    app.state.serving_tokenization = None
    plugins[0].attach_router(app)
    asyncio.run(plugins[0].init_state(client, app.state, args))
    with TestClient(app) as asking:
        assert asking.get("/kv_compression").status_code == status
        for path in ("/kv_compression/state", "/v1/kv_compression/prefixes"):
            assert asking.get(path).status_code == (401 if status == 200 else 404)
            assert asking.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == status


def test_a_front_end_without_engines_shows_nothing():
    register()
    (plugin,) = vllm.plugins.load_endpoint_plugins(("render",))
    app = FastAPI()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(None, app.state, Namespace(api_key=None)))
    with TestClient(app) as client:
        assert client.get("/kv_compression").status_code == 404


def test_a_long_name_is_shown_by_both_its_ends():
    assert shown_id("x" * ID_LENGTH) == "x" * ID_LENGTH
    one, other = (shown_id("cmpl-" + "x" * 500 + end) for end in ("-0-12345678", "-0-87654321"))
    assert len(one) == len(other) == ID_LENGTH and one != other
    assert one.startswith("cmpl-xxx") and one.endswith("x-0-12345678")
