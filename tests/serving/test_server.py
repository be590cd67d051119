"""A real `vllm serve --kv-compression` over HTTP, through the openai client.

The pool holds four raw prompts of the length used here. Every test leaves it empty.
"""

import itertools
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from vllm_serve import Server, serve

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

BLOCK_SIZE = 32
PROMPT_TOKENS = 1000
DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "kv_compression.json"
API_KEY = "a key"
NUM_BLOCKS = 4 * (PROMPT_TOKENS // BLOCK_SIZE + 4) + 1  # one is vLLM's null block


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    flags = ["--kv-compression", "snapkv:budget=0.25", "--block-size", str(BLOCK_SIZE)]
    flags += ["--api-key", API_KEY]
    flags += ["--max-model-len", "4096", "--enforce-eager", "--num-gpu-blocks-override", str(NUM_BLOCKS)]
    with serve(smollm2, *flags, folder=tmp_path_factory.mktemp("server")) as running:
        yield running
    assert running.process.returncode == 0, running.log_tail()


@pytest.fixture(autouse=True)
def server_log(server: Server):
    """What the server logged meanwhile; pytest shows it with a test that failed."""
    written = server.log.stat().st_size
    yield
    with open(server.log, errors="replace") as log:
        log.seek(written)
        print(log.read())


@pytest.fixture(autouse=True)
def every_block_is_returned(server: Server, server_log):
    yield
    deadline = time.monotonic() + 60
    while (now := server.metrics())["vllm:kv_cache_usage_perc"] or now["vllm:num_requests_running"]:
        assert time.monotonic() < deadline, "blocks are still held after every request has ended"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def client(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=500) as client:
        yield client


@pytest.fixture(scope="module")
def complete(server: Server, client: openai.OpenAI):
    """`complete(prompt, kv_compression=None, **options)`: greedy, always `max_tokens` tokens."""
    salts = itertools.count()

    def complete(prompt: str, kv_compression: object = None, max_tokens: int = 16, **options):
        # A salt of its own: no request starts from another's prefix, so equal requests compute equal numbers.
        extra = {"ignore_eos": True, "cache_salt": f"salt-{next(salts)}"}
        if kv_compression is not None:
            extra["vllm_xargs"] = {"kv_compression": kv_compression}
        return client.completions.create(
            model=server.model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            extra_body=extra,
            **options,
        )

    return complete


@pytest.fixture(scope="module")
def prompt(long_texts) -> str:
    return long_texts(PROMPT_TOKENS)


def text_of(completion) -> str:
    return completion.choices[0].text


# ---------------------------------------------------------------------- answers


def test_a_streamed_completion_is_the_completion(complete, prompt):
    whole = complete(prompt, max_tokens=32)
    assert whole.usage.prompt_tokens == PROMPT_TOKENS
    assert whole.usage.completion_tokens == 32
    pieces = [text_of(chunk) for chunk in complete(prompt, max_tokens=32, stream=True)]
    assert len(pieces) > 8
    assert "".join(pieces) == text_of(whole)


def test_a_streamed_chat_is_the_chat(server, client, long_texts):
    messages = [{"role": "user", "content": long_texts(500) + "\n\nWho is at Netherfield?"}]
    ask = {"model": server.model, "messages": messages, "max_completion_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**ask, extra_body={"cache_salt": "whole"})
    assert whole.choices[0].message.content
    chunks = client.chat.completions.create(**ask, stream=True, extra_body={"cache_salt": "streamed"})
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole.choices[0].message.content


# ---------------------------------------------------------------------- memory


def test_more_requests_run_at_once_than_fit_raw(server, complete, long_texts):
    options = [None] * 4 + ["snapkv:budget=0.1", "streaming_llm"]
    prompts = [long_texts(PROMPT_TOKENS, seed=seed) for seed in range(len(options))]
    before, running = server.metrics(), 0.0
    with ThreadPoolExecutor(len(options)) as pool:
        asked = [pool.submit(complete, *ask, max_tokens=32) for ask in zip(prompts, options, strict=True)]
        while not all(request.done() for request in asked):
            running = max(running, server.metrics()["vllm:num_requests_running"])
            time.sleep(0.1)
    answers = [request.result() for request in asked]
    assert [answer.usage.completion_tokens for answer in answers] == [32] * len(options)
    assert len({text_of(answer) for answer in answers}) == len(options)
    assert running == len(options)
    assert server.metrics()["vllm:num_preemptions_total"] == before["vllm:num_preemptions_total"]


@pytest.mark.parametrize(
    ("option", "below_boundary"),
    [("off", 30), (None, 8), ("snapkv:budget=0.1", 3), ("streaming_llm:budget=0.5", 15)],
)
def test_a_request_holds_the_blocks_of_its_budget(server, complete, prompt, option, below_boundary):
    # 30 blocks lie below the boundary, which is 1000 - 32 tokens, rounded down; the budget's share of them is
    # kept. The tail to token 1024 is 2 blocks more, and 3 if the answer gets that far before it is looked at.
    stream = complete(prompt, option, max_tokens=64, stream=True)
    for _ in itertools.islice(stream, 8):
        pass
    now = server.metrics()
    stream.close()
    assert now["vllm:num_requests_running"] == 1
    held = now["vllm:kv_cache_usage_perc"] * (NUM_BLOCKS - 1)
    assert round(held, 3) in (below_boundary + 2, below_boundary + 3)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("snapvk", "did you mean 'snapkv'"),
        ("snapkv:budget=7", "budget must be"),
        ("snapkv:budget=little", "option budget must be"),
        ("snapkv:budgte=0.1", "did you mean 'budget'"),
        ("snapkv:window", "'window' has no value"),
        ('{"method": 3}', "method"),
        ('{"method": "snapkv",}', "not valid JSON"),
        (0.1, "must be a string"),
    ],
)
def test_a_wrong_option_is_a_bad_request_and_the_server_goes_on(complete, prompt, option, named, stream):
    # vLLM checks a request when its first token is asked for. A stream has sent its HTTP status by then, and
    # carries the same error as its first event.
    with pytest.raises(openai.APIError if stream else openai.BadRequestError) as refused:
        for _ in complete(prompt, option, max_tokens=4, stream=stream):
            pass
    error = refused.value.body
    assert (error["code"], error["param"]) == (400, "kv_compression")
    assert named in error["message"] and len(error["message"].splitlines()) == 1
    assert text_of(complete("Netherfield Park is let", max_tokens=2))


def test_a_wrong_option_of_a_chat_is_a_bad_request(server, client):
    with pytest.raises(openai.BadRequestError, match="budget must be"):
        client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": "Hello"}],
            extra_body={"vllm_xargs": {"kv_compression": "snapkv:budget=7"}},
        )


# ---------------------------------------------------------------------- requests that end early


@pytest.mark.parametrize("option", [None, "off"])
def test_what_was_kept_is_told_with_the_answer_and_in_the_metrics(server, complete, prompt, option):
    """Of 1,000 tokens and a little more 30 blocks are compacted to 8."""
    before = server.metrics()
    told = complete(prompt, option, max_tokens=40).model_extra.get("kv_transfer_params")
    after = server.metrics()
    counted = [
        after[name] - before[name]
        for name in (
            "vllm:kv_compression_compactions_total",
            "vllm:kv_compression_compacted_requests_total",
            "vllm:kv_compression_freed_blocks_total",
        )
    ]
    seconds = after["vllm:kv_compression_seconds_total"] - before["vllm:kv_compression_seconds_total"]
    freed = after["vllm:kv_compression_freed_bytes_total"] - before["vllm:kv_compression_freed_bytes_total"]
    if option == "off":
        assert told is None and counted == [0, 0, 0]
        return
    source = told["kv_compression"]["compacted_tokens"] // BLOCK_SIZE
    kept = -(-source // 4)
    assert told == {
        "kv_compression": {
            "method": "snapkv",
            "compacted_tokens": source * BLOCK_SIZE,
            "kept_tokens": kept * BLOCK_SIZE,
        }
    }
    assert 0 < seconds < 60
    block_values = 30 * 3 * BLOCK_SIZE * 2 * 64  # layers, heads, tokens, channels of keys and values
    assert freed / counted[2] / block_values in (2, 4)  # bytes of one, as the machine has it
    assert source >= 29 and counted == [1, 1, source - kept]


def test_metrics_tell_of_running_requests_and_so_does_the_log(server, complete, prompt):
    seen = {"compacted": 0.0, "raw": 0.0, "kept": 1.0}
    with ThreadPoolExecutor() as pool:
        sent = [pool.submit(complete, prompt, option, max_tokens=400) for option in (None, "off", "off")]
        while not all(each.done() for each in sent):
            for state in ("compacted", "raw"):
                now = server.metrics(f'state="{state}"')["vllm:kv_compression_requests"]
                seen[state] = max(seen[state], now)
            seen["kept"] = min(seen["kept"], server.metrics()["vllm:kv_compression_kept_fraction"])
        assert all(each.exception() is None for each in sent)
    assert seen["compacted"] == 1 and seen["raw"] >= 2 and 0.6 < seen["kept"] < 0.85
    deadline = time.monotonic() + 30  # vLLM logs every ten seconds
    while "KV compression: " not in (log := server.log.read_text(errors="replace")):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert "running requests compacted" in log
    for state in ("compacted", "raw"):  # since the last one has ended nothing runs
        assert server.metrics(f'state="{state}"')["vllm:kv_compression_requests"] == 0
    assert server.metrics()["vllm:kv_compression_kept_fraction"] == 1


def test_the_dashboard_asks_for_all_that_is_told_and_nothing_else(server):
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    selectors = [found for query in asked for found in re.findall(r"(vllm:\w+)\{(.*?)\}", query)]
    exported = dict(re.findall(r"^(vllm:\w+)\{(.*)\}", server.get("/metrics"), re.MULTILINE))
    for name, labels in selectors:
        known = set(re.findall(r'(\w+)="', exported[name]))
        assert known >= set(re.findall(r"(\w+)=", labels)) >= {"model_name", "engine"}
    own = {name for name in exported if "kv_compression" in name and not name.endswith("_created")}
    assert {name for name, _ in selectors if "kv_compression" in name} == own
    assert len(re.findall("vllm:", "".join(asked))) == len(selectors)


# ---------------------------------------------------------------------- compacted prefixes

PREFIXES = "/v1/kv_compression/prefixes"


@pytest.fixture
def asked(server):
    """`asked(method, path, body)`: status and JSON of a path; what is kept is deleted after the test."""

    def ask(method: str, path: str = "", body: object = None, api_key: str | None = API_KEY):
        headers = {"Content-Type": "application/json"}
        headers |= {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(server.url + PREFIXES + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    yield ask
    for salt in ("", "?cache_salt=mine"):
        for prefix in ask("GET", salt)[1]["prefixes"]:
            assert ask("DELETE", f"/{urllib.parse.quote(prefix['name'])}{salt}")[0] == 200


def test_a_text_is_compacted_once_and_many_ask(server, client, asked, prompt):
    """30 blocks of its 1,000 tokens are kept as 8, and one is raw behind them."""
    options = {"kv_compression": "knorm:budget=0.25", "cache_salt": "mine"}
    status, made = asked("POST", body={"name": "the novel", "prompt": prompt} | options)
    assert status == 201, made
    expected = {"engine": 0, "name": "the novel", "blocks": 9, "users": 0, "hits": 0, "method": "knorm"}
    assert made.items() >= (expected | {"tokens": 992, "compacted_tokens": 960}).items()
    before = server.metrics()
    assert before["vllm:kv_compression_prefixes"] == 1 and before["vllm:kv_compression_prefix_blocks"] == 9
    assert before["vllm:kv_cache_usage_perc"] * (NUM_BLOCKS - 1) == pytest.approx(9)
    status, said = asked("POST", body={"name": "the novel", "prompt": prompt} | options)
    assert status == 409 and "name is taken" in said["error"]

    def answer(salt: str, question: str):
        return client.completions.create(
            model=server.model,
            prompt=prompt + question,
            max_tokens=16,
            temperature=0,
            extra_body={"vllm_xargs": {"kv_compression": "knorm:budget=0.25"}, "cache_salt": salt},
        )

    questions = ["\n\nWho is Bingley?", "\n\nWhat is let?", "\n\nWho is Bingley?"]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda question: answer("mine", question), questions))
    for each in answers:
        assert each.model_extra["kv_transfer_params"]["kv_compression"]["prefix_tokens"] == 992
    assert text_of(answers[0]) == text_of(answers[2])
    after = server.metrics()
    hits = [after[f"vllm:kv_compression_prefix_{name}_total"] for name in ("hits", "hit_tokens")]
    assert hits == [before["vllm:kv_compression_prefix_hits_total"] + 3, hits[1]] and hits[1] >= 3 * 992
    other = answer("yours", questions[0]).model_extra["kv_transfer_params"]["kv_compression"]
    assert "prefix_tokens" not in other

    assert asked("GET") == (200, {"prefixes": []})
    (listed,) = asked("GET", "?cache_salt=mine")[1]["prefixes"]
    assert listed == made | {"hits": 3} and "mine" not in json.dumps(listed)
    assert asked("DELETE", "/the%20novel")[0] == 404
    assert asked("DELETE", "/the%20novel?cache_salt=mine") == (200, {"deleted": "the novel"})
    assert asked("DELETE", "/the%20novel?cache_salt=mine")[0] == 404
    # Nothing runs meanwhile.
    holds = ["vllm:kv_compression_prefixes", "vllm:kv_compression_prefix_blocks", "vllm:kv_cache_usage_perc"]
    deadline = time.monotonic() + 10
    while any((now := server.metrics())[name] for name in holds):
        assert time.monotonic() < deadline, {name: now[name] for name in holds}
        time.sleep(0.1)


def test_a_system_message_is_compacted_as_its_chats_begin(server, client, asked, long_texts):
    system, option = {"role": "system", "content": long_texts(900, seed=5)}, {"kv_compression": "knorm"}
    status, made = asked("POST", body={"name": "system", "messages": [system]} | option)
    assert status == 201, made
    chat = client.chat.completions.create(
        model=server.model,
        messages=[system, {"role": "user", "content": "Who is at Netherfield?"}],
        max_completion_tokens=4,
        extra_body={"vllm_xargs": option},
    )
    told = chat.model_extra["kv_transfer_params"]["kv_compression"]
    assert told["prefix_tokens"] == made["tokens"] >= 896


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"name": "short", "prompt": "Netherfield Park is let"}, 422, "the prompt is short"),
        ({"name": "long", "prompt_token_ids": [5] * 4095}, 400, "no more than 4094 tokens"),
        ({"name": "long", "prompt_token_ids": [5] * 5000}, 400, "4096"),
        ({"name": "strange", "prompt_token_ids": [10**9] * 900}, 400, "vocabulary"),
        ({"name": "wrong", "prompt_token_ids": [5] * 900, "kv_compression": "snapvk"}, 400, "'snapkv'"),
        ({"name": "x" * 129, "prompt_token_ids": [5] * 900}, 400, "printable characters"),
        ({"name": "wrong", "prompt": "text", "model": "another"}, 404, "does not exist"),
        ({"name": "wrong", "messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "of text"),
        ({"name": "wrong", "prompt_token_ids": [5] * 900, "data_parallel_rank": 1}, 400, "must be one of 0"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_prefix_that_cannot_be_is_one_line_and_the_server_goes_on(asked, complete, body, status, said):
    answer = asked("POST", body=body)
    assert answer[0] == status and said in answer[1]["error"], answer
    assert len(answer[1]["error"].splitlines()) == 1
    assert asked("GET") == (200, {"prefixes": []})
    assert text_of(complete("Netherfield Park is let", max_tokens=2))


def test_prefixes_need_the_key(asked):
    body = {"name": "document", "prompt": "text"}
    for method, path, data in (("GET", "", None), ("POST", "", body), ("DELETE", "/document", None)):
        assert asked(method, path, data, api_key=None) == (401, {"error": "Unauthorized"})


# ---------------------------------------------------------------------- what is shown


@pytest.fixture(scope="module")
def shown(server):
    """`shown(path)`: the JSON of a path under `/kv_compression`, for who has the key."""
    return lambda path: json.loads(server.get(f"/kv_compression/{path}", API_KEY))


def refused(server: Server, path: str, api_key: str | None = API_KEY) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as answer:
        server.get(f"/kv_compression/{path}", api_key)
    error = json.loads(answer.value.read())["error"]
    assert len(error.splitlines()) == 1
    return answer.value.code, error


def state_with(shown, *states: str) -> dict:
    """The state of the engine once requests in these states run."""
    deadline = time.monotonic() + 120
    while True:
        (engine,) = shown("state")["engines"]
        if sorted(each["state"] for each in engine["requests"]) == sorted(states):
            return engine
        assert time.monotonic() < deadline, engine


def test_the_state_tells_what_each_request_holds_of_the_pool(server, complete, prompt, shown):
    streams = [complete(prompt, option, max_tokens=600, stream=True) for option in (None, "off")]
    for stream in streams:
        next(iter(stream))
    engine = state_with(shown, "compacted", "raw")
    with_names = {each["state"]: each for each in engine["requests"]}
    heads = shown(f"heads?request={urllib.parse.quote(with_names['compacted']['id'])}")
    raw_name = urllib.parse.quote(with_names["raw"]["id"])
    assert refused(server, f"heads?request={raw_name}") == (
        404,
        "no running request of this name is compacted",
    )
    for stream in streams:
        stream.close()

    assert engine["total_blocks"] == NUM_BLOCKS - 1 and engine["block_size"] == BLOCK_SIZE
    assert (engine["running"], engine["compacted"], engine["raw"], engine["waiting"]) == (2, 1, 1, 0)
    for each in engine["requests"]:
        assert each["prompt_tokens"] == PROMPT_TOKENS and each["id"].startswith("cmpl-")
        assert PROMPT_TOKENS <= each["computed_tokens"] <= PROMPT_TOKENS + 600
        assert each["raw_blocks"] == -(-each["computed_tokens"] // BLOCK_SIZE)
        assert each["step"] is None  # it was not compacted under pressure
    compacted, raw = with_names["compacted"], with_names["raw"]
    # 30 blocks below the boundary are kept as 8.
    assert compacted["raw_blocks"] - compacted["held_blocks"] == 22 and compacted["method"] == "snapkv"
    assert raw["held_blocks"] == raw["raw_blocks"] and raw["method"] is None
    assert engine["compacted_blocks"] == 8
    held = sum(each["held_blocks"] for each in engine["requests"])
    assert held == engine["held_blocks"] and 0 <= engine["used_blocks"] - held <= 2  # of the next step

    assert heads["raw_pages"] == 30 and heads["layers"] == list(range(30))
    assert {len(layer) for layer in heads["pages"]} == {3}
    assert sum(map(sum, heads["pages"])) == 8 * 30 * 3
    assert refused(server, f"heads?request={urllib.parse.quote(compacted['id'])}-")[0] == 404


def test_the_state_needs_the_key_and_a_wrong_question_ends_nothing(server, complete, shown):
    for path in ("state", "heads?request=one"):
        assert refused(server, path, api_key=None) == (401, "Unauthorized")
    assert refused(server, "heads")[0] == 400
    assert refused(server, "heads?request=one")[0] == 404
    assert text_of(complete("Netherfield Park is let", max_tokens=2))
    (engine,) = shown("state")["engines"]
    assert engine["requests"] == [] and engine["used_blocks"] == 0


def test_a_client_that_hangs_up_frees_its_blocks(complete, prompt):
    stream = complete(prompt, max_tokens=2000, stream=True)
    for _ in itertools.islice(stream, 3):
        pass
    stream.close()  # `every_block_is_returned` waits for them
