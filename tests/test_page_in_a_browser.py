"""What a person sees at `/kv_compression`, in Chromium, over engines that tell what a test says."""

import shutil
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi import FastAPI

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.page import Page
from vllm_kvcompress.paging.statistics import EngineState, PrefixState, RequestState
from vllm_kvcompress.prefix_endpoints import PrefixEndpoints

CHROMIUM = shutil.which("chromium")
HOSTILE = 'cmpl-<img src=x onerror="document.title=1">-0'  # a client may name its requests
COMPACTED = RequestState("cmpl-a", 1_500, 1_600, "compacted", 100, 31, "snapkv", None, None)
RAW = RequestState(HOSTILE, 600, 610, "raw", 39, 39, None, None, None)
STATE = EngineState(16, 200, 70, 25, 2, 1, 1, 1, 139, 70, 0.0, [COMPACTED, RAW])
HEADS = {"request": "cmpl-a", "layers": [0, 3], "pages": [[1, 2, 3], [4, 5, 6]], "raw_pages": 94}
NOVEL = PrefixState("prefix-1", 'a/b <img src=x> "c"', 40_000, 39_968, 314, 1, 2, 31, "kvzip", 0.25, None)
LAWS = PrefixState("prefix-2", "laws", 1_000, 960, 9, 1, 0, 0, "knorm", 0.25, "an adapter")
UNNAMED = replace(LAWS, id="prefix-3", name=None)
WITH_PREFIXES = replace(STATE, prefixes=2, named_prefixes=2, prefix_blocks=323)
LIGHT, DARK = "rgb(245, 246, 248)", "rgb(17, 21, 26)"


class Engines:
    """Engine cores; the first one knows what the heads keep of `COMPACTED`."""

    def __init__(self, *states: EngineState) -> None:
        self.show(*states)
        self.asked_heads = 0
        self.prefixes: list[PrefixState] = []  # of the first one

    def show(self, *states: EngineState) -> None:
        self.states = states
        self.core_engines = [bytes([rank, 0]) for rank in range(len(states))]

    async def call_utility_all_async(self, method: str, *arguments: str):
        if method == "kv_compression_state":
            return [state.to_dict() for state in self.states]
        if method == "kv_compression_prefixes":
            assert arguments == (None,)
            return [[each.to_dict() for each in self.prefixes]] + [[]] * (len(self.states) - 1)
        if method == "kv_compression_delete_prefix":
            kept = [each for each in self.prefixes if each.name != arguments[0]]
            found, self.prefixes = len(kept) < len(self.prefixes), kept
            return [found] + [False] * (len(self.states) - 1)
        self.asked_heads += 1
        return [HEADS if arguments == ("cmpl-a",) else None] + [None] * (len(self.states) - 1)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def look(browser):
    """`look(engines, *api_keys, path="", **context)`: the page of a server over them, in a browser."""
    running, contexts = [], []

    def look(engines: Engines, *api_keys: str, path: str = "", **context):
        app = FastAPI()
        config = KVCompressionConfig.parse("snapkv:budget=0.25")
        app.include_router(Page(engines, config, "a model", list(api_keys)).router)
        client = SimpleNamespace(engine_core=engines)
        app.include_router(PrefixEndpoints(client, None, list(api_keys)).router)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda said: page.errors.append(said.text) if said.type == "error" else None)
        page.goto(f"http://127.0.0.1:{port}/kv_compression{path}")
        return page

    yield look
    for context in contexts:
        context.close()
    for server, thread in running:
        server.should_exit = True
        thread.join()


def rows(page) -> list[str]:
    page.wait_for_selector("#requests tr")
    return [" ".join(row.inner_text().split()) for row in page.query_selector_all("#requests tr")]


def test_pool_and_requests_are_shown_and_a_clients_markup_is_text(look):
    page = look(Engines(STATE))
    assert rows(page) == [
        "cmpl-a compacted snapkv 1,500 1,600 31 of 100",
        f"{HOSTILE} raw none 600 610 39 of 39",
    ]
    assert page.title() == "KV compression" and not page.query_selector_all("#requests img")
    tiles = page.inner_text("#tiles").split("\n")
    assert [text for text in tiles if text] == [
        *("Blocks in use", "35%", "70 of 200"),
        *("Kept", "50%", "70 of 139 blocks"),
        *("Running", "2", "1 compacted, 1 raw"),
        *("Waiting", "1", "requests"),
    ]
    widths = [part.bounding_box()["width"] for part in page.query_selector_all("#pools .bar, #pools .bar i")]
    assert [width / widths[0] for width in widths[1:]] == pytest.approx([25 / 200, 45 / 200], abs=0.002)
    assert not page.errors


def test_a_chosen_requests_heads_are_shown_and_asked_for_once_a_compaction(look):
    engines = Engines(STATE)
    page = look(engines)
    page.click("text=cmpl-a")
    page.wait_for_selector("#heads:not([hidden])")
    assert page.inner_text("#kept") == "Of 94 pages below the boundary: 3.5 on average, from 1 to 6"
    labels = [cell.inner_text() for cell in page.query_selector_all("#map .label")]
    assert labels == ["layer, head", "0", "1", "2", "0", "3"]
    cells = page.query_selector_all("#map .cell")
    assert [cell.inner_text() for cell in cells] == list("123456")
    assert cells[3].get_attribute("title") == "layer 3, head 0: 4 of 94 pages"
    assert page.url.endswith("#request=cmpl-a") and page.query_selector("tr.chosen")

    grown = replace(COMPACTED, computed_tokens=1_616, raw_blocks=101, held_blocks=32)
    engines.show(replace(STATE, requests=[grown]))
    page.wait_for_selector("text=32 of 101")
    assert engines.asked_heads == 1
    engines.show(replace(STATE, requests=[replace(grown, held_blocks=20)]))
    page.wait_for_selector("text=20 of 101")
    engines.show(replace(STATE, requests=[RAW]))
    page.wait_for_selector("#whose:has-text('has ended')")
    assert engines.asked_heads == 2 and not page.errors


def test_a_ladder_and_several_engines_have_columns_of_their_own(look):
    request = replace(COMPACTED, step=2, steps=4)
    state = replace(STATE, pressure=0.5, requests=[request])
    page = look(Engines(state, replace(state, pressure=0.0, requests=[])), path="#request=cmpl-a")
    assert rows(page) == ["cmpl-a compacted snapkv 1,500 1,600 31 of 100 2 of 4 0"]
    assert len(page.query_selector_all("#pools .bar")) == 2
    assert "Pressure\n25%" in page.inner_text("#tiles")
    page.wait_for_selector("#heads:not([hidden])")
    assert page.inner_text("#more") == "and 3 more" and not page.errors


def named(page) -> list[str]:
    return [" ".join(row.inner_text().split()) for row in page.query_selector_all("#named tr")]


def test_prefixes_with_a_name_are_shown_and_deleted_by_who_confirms_it(look):
    engines = Engines(replace(STATE, prefixes=6, named_prefixes=3, prefix_blocks=360))
    engines.prefixes = [NOVEL, LAWS, UNNAMED]
    page = look(engines, "secret")
    page.fill("#key", "secret")
    page.click("#login button")
    page.wait_for_selector("#named tr")
    assert named(page) == [
        f"{NOVEL.name} kvzip 40,000 39,968 314 2 31 Delete",
        "laws knorm, an adapter 1,000 960 9 0 0 Delete",
    ]
    assert page.inner_text("#others") == "360 blocks in all, also of 1 under a salt and 3 without a name"
    assert not page.query_selector_all("#prefixes img")
    said = []

    def answer(accept):
        def handle(dialog):
            said.append(dialog.message)
            dialog.accept() if accept else dialog.dismiss()

        page.once("dialog", handle)

    answer(False)
    page.click("#named tr:first-child button")
    assert len(engines.prefixes) == 3
    answer(True)
    page.click("#named tr:first-child button")
    page.wait_for_selector("#named tr:only-child")
    assert engines.prefixes == [LAWS, UNNAMED] and len(said) == 2 and NOVEL.name in said[0]
    engines.show(STATE)
    page.wait_for_selector("#prefixes", state="hidden")
    assert page.errors == [error for error in page.errors if "401" in error]


def test_where_no_prefix_is_kept_none_is_shown_or_asked_for(look):
    page = look(Engines(STATE, STATE))
    assert rows(page) and page.is_hidden("#prefixes") and not page.errors
    engines = Engines(replace(STATE, prefixes=2, prefix_blocks=20), STATE)
    page = look(engines)
    page.wait_for_selector("#prefixes:not([hidden])")
    assert page.inner_text("#others") == "20 blocks in all, also of 2 without a name"
    engines.prefixes = [LAWS]
    engines.show(replace(STATE, prefixes=1, named_prefixes=1, prefix_blocks=9), STATE)
    page.wait_for_selector("#named tr")
    assert named(page) == ["laws knorm, an adapter 1,000 960 9 0 0 0 Delete"]
    assert page.inner_text("#others") == "9 blocks in all"


def test_the_page_asks_for_the_servers_key(look):
    page = look(Engines(STATE), "secret")
    page.wait_for_selector("#login:not([hidden])")
    assert "cmpl-a" not in page.content()
    page.fill("#key", "wrong")
    page.click("#login button")
    page.wait_for_selector("#login:not([hidden])")
    page.fill("#key", "secret")
    page.click("#login button")
    assert len(rows(page)) == 2
    assert page.is_hidden("#problem")


@pytest.mark.parametrize(("scheme", "ground"), [("light", LIGHT), ("dark", DARK)])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_its_window_in_both_schemes(look, scheme, ground, width):
    engines, viewport = Engines(WITH_PREFIXES), {"width": width, "height": 800}
    engines.prefixes = [NOVEL, LAWS]
    page = look(engines, path="#request=cmpl-a", viewport=viewport, color_scheme=scheme)
    page.wait_for_selector("#heads:not([hidden])")
    page.wait_for_selector("#named tr")
    assert len(rows(page)) == 2
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for inner in page.query_selector_all("main > *, #requests td, #named td, #map"):
        if (box := inner.bounding_box()) is not None:
            assert 0 <= box["x"] and box["x"] + box["width"] <= width


def test_a_server_that_answers_no_more_is_told(look, monkeypatch):
    engines = Engines(STATE)
    page = look(engines)
    assert len(rows(page)) == 2

    async def fail(*call: str):
        raise RuntimeError("it is gone")

    monkeypatch.setattr(engines, "call_utility_all_async", fail)
    page.wait_for_selector("#problem:not([hidden])")
    assert page.inner_text("#said") == "the engine could not answer; see the server's log"
    monkeypatch.undo()
    page.wait_for_selector("#problem", state="hidden")
