"""What a request may ask for, through vLLM's own input processor and endpoints; no engine is started."""

import asyncio
import dataclasses
import importlib
import pkgutil
import shutil
import typing
from types import SimpleNamespace

import pytest
from pydantic import BaseModel, ValidationError
from vllm import SamplingParams, entrypoints
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.pooling.typing import AnyPoolingRequest
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.engine.typing import AnyRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams
from vllm.v1.engine.input_processor import InputProcessor

from vllm_kvcompress import KVCompressionConfig, scorers
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.paging.groups import GROUP
from vllm_kvcompress.plan import peak_blocks
from vllm_kvcompress.plugin import register
from vllm_kvcompress.support import _warn_of_queries

STREAMING = KVCompressionConfig(method="snapkv", budget=0.25, when="streaming", recompact_every=256)


def processor_of(smollm2, **options) -> InputProcessor:
    config = EngineArgs(
        str(smollm2), max_model_len=4096, block_size=32, enable_prompt_embeds=True, **options
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = 1000
    return InputProcessor(config)


@pytest.fixture(scope="module")
def streaming(smollm2) -> InputProcessor:
    register()
    return processor_of(smollm2, **STREAMING.engine_kwargs())


@pytest.fixture(scope="module")
def at_the_end(smollm2) -> InputProcessor:
    register()
    return processor_of(smollm2, **KVCompressionConfig(method="snapkv", budget=0.25).engine_kwargs())


def asked(processor: InputProcessor, length: int, option: object = None, resumable=False, **params):
    extra = None if option is None else {"kv_compression": option}
    prompt = {"type": "token", "prompt_token_ids": [1 + i % 1000 for i in range(length)]}
    given = SamplingParams(extra_args=extra, **{"max_tokens": 8} | params)
    return processor.process_inputs("0", prompt, given, ("generate",), resumable=resumable)


# ---------------------------------------------------------------------- log-probabilities of a prompt


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_of_a_prompt_that_is_compacted_while_it_is_read_are_refused(streaming, count):
    with pytest.raises(VLLMValidationError, match="prompt_logprobs.*compacted context") as refused:
        asked(streaming, 1000, prompt_logprobs=count)
    assert len(str(refused.value).splitlines()) == 1


def test_a_request_may_not_ask_for_streaming_and_prompt_logprobs(at_the_end):
    with pytest.raises(VLLMValidationError, match="prompt_logprobs"):
        asked(at_the_end, 1000, "snapkv:when=streaming,recompact_every=256", prompt_logprobs=1)


@pytest.mark.parametrize("option", ["off", "snapkv:when=prompt", "snapkv:recompact_every=1024"])
def test_prompt_logprobs_of_raw_context_are_served_by_a_streaming_server(streaming, option):
    assert asked(streaming, 1000, option, prompt_logprobs=1).sampling_params.prompt_logprobs == 1


@pytest.mark.parametrize(
    ("every", "length", "compacted"),
    # Compaction at token 256 is felt by the 257th. At 64 tokens, 32 of them recent, nothing can be freed.
    [(256, 256, False), (256, 257, True), (32, 96, False), (32, 97, True)],
)
def test_prompts_up_to_the_first_compaction_have_their_logprobs(streaming, every, length, compacted):
    option = f"snapkv:recompact_every={every}"
    if compacted:
        with pytest.raises(VLLMValidationError):
            asked(streaming, length, option, prompt_logprobs=1)
    else:
        assert asked(streaming, length, option, prompt_logprobs=1)


def test_prompt_logprobs_before_compaction_are_served(at_the_end):
    assert asked(at_the_end, 1000, prompt_logprobs=1)
    assert asked(at_the_end, 1000, "kvzip", prompt_logprobs=1)
    assert asked(at_the_end, 1000, n=3, prompt_logprobs=1)


@pytest.mark.parametrize("option", ["attention_matching", "attention_matching:queries=self-study"])
def test_a_prompt_that_leaves_no_room_for_what_it_is_matched_by_is_refused(at_the_end, option):
    assert asked(at_the_end, 3840, option)
    with pytest.raises(VLLMValidationError, match="needs 256 tokens behind the prompt of 3841") as refused:
        asked(at_the_end, 3841, option)
    assert len(str(refused.value).splitlines()) == 1
    assert asked(at_the_end, 3841, "attention_matching:queries=prompt"), "which repeats nothing"


def test_logprobs_of_what_is_added_to_a_compacted_session_are_refused(at_the_end):
    assert asked(at_the_end, 1000, resumable=True)
    with pytest.raises(VLLMValidationError, match="goes on later"):
        asked(at_the_end, 1000, resumable=True, prompt_logprobs=1)
    assert asked(at_the_end, 1000, "off", resumable=True, prompt_logprobs=1)


def test_streaming_without_prompt_logprobs_is_served(streaming):
    assert asked(streaming, 1000, logprobs=5)


def test_blocks_of_windows_and_of_all_groups_count_in_what_a_streamed_request_needs(smollm2, monkeypatch):
    register()
    processor = processor_of(smollm2, **STREAMING.engine_kwargs())
    cache, additional = processor.vllm_config.cache_config, processor.vllm_config.additional_config
    monkeypatch.setitem(additional, GROUP, {"block_size": 64, "beside": 20, "groups": 3})
    needed = 3 * peak_blocks(STREAMING, 3000, 3008, 64) + 20
    monkeypatch.setattr(cache, "num_gpu_blocks", needed + 1)
    assert asked(processor, 3000)
    monkeypatch.setattr(cache, "num_gpu_blocks", needed)
    with pytest.raises(VLLMValidationError, match=f"need {needed} blocks of the pool's {needed - 1}"):
        asked(processor, 3000)


def test_a_streamed_request_may_fill_the_pool_but_for_the_null_block(smollm2, streaming, monkeypatch):
    cache = streaming.vllm_config.cache_config
    needed = peak_blocks(STREAMING, 3000, 3008, cache.block_size)
    monkeypatch.setattr(cache, "num_gpu_blocks", needed + 1)
    asked(streaming, 3000)
    monkeypatch.setattr(cache, "num_gpu_blocks", needed)
    with pytest.raises(VLLMValidationError, match=f"need {needed} blocks of the pool's {needed - 1} with"):
        asked(streaming, 3000)


# ---------------------------------------------------------------------- compacted prefixes

NAMED = "knorm:budget=0.25,prefix=document"


def test_a_request_may_leave_a_prefix_under_a_name(at_the_end, streaming):
    for processor in (at_the_end, streaming):
        assert asked(processor, 1000, NAMED)
        assert asked(processor, 1000, {"prefix": "a name, with spaces"})
    assert asked(at_the_end, 1000, NAMED, prompt_logprobs=1), "of raw context"
    assert asked(at_the_end, 1000, NAMED, skip_reading_prefix_cache=True), "which says what it reads"
    assert asked(at_the_end, 4094, NAMED)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (dict(option=NAMED, max_tokens=1), "with prefix use max_tokens=2 or more"),
        (
            dict(option=NAMED, length=4095, max_tokens=None),
            "than 4094 tokens with --max-model-len 4096, got 4095",
        ),
        (dict(option=NAMED, n=2, temperature=1.0), "got n=2; use n=1"),
        (dict(option=NAMED, resumable=True), "goes on later stays raw; leave prefix out"),
        (dict(option={"method": "off", "prefix": "document"}), "nothing is compacted with off"),
        (dict(option=NAMED + "x" * 200), "a name of 1 to 128 printable characters"),
        (dict(option={"prefix": "two\nlines"}), "a name of 1 to 128 printable characters"),
        (dict(option={"prefix": ""}), "a name of 1 to 128 printable characters"),
        (dict(option={"prefix": 3}), "option prefix must be str"),
        (dict(option="knorm:prefix_share=0.5"), "prefix_share is the engine's"),
    ],
)
def test_what_cannot_leave_a_prefix_is_refused_in_one_line(at_the_end, request_, message):
    with pytest.raises(VLLMValidationError, match=message) as refused:
        asked(at_the_end, **{"length": 1000} | request_)
    assert len(str(refused.value).splitlines()) == 1
    if (option := request_["option"]) == NAMED:  # without the name there is nothing wrong
        request_ = request_ | {"option": option.partition(",")[0]}
        assert asked(at_the_end, **{"length": 1000} | request_)


def test_prefixes_need_the_prefix_cache(smollm2, at_the_end, monkeypatch):
    share = KVCompressionConfig.parse("knorm:prefix_share=0.5").engine_kwargs()
    assert processor_of(smollm2, **share)
    with pytest.raises(KVCompressionError, match="leave prefix_share out, or remove --no-enable-prefix-cach"):
        processor_of(smollm2, **share, enable_prefix_caching=False)
    with pytest.raises(KVCompressionError, match="leave it out of the engine's options and give it to requ"):
        processor_of(smollm2, **KVCompressionConfig.parse(NAMED).engine_kwargs())
    config = at_the_end.vllm_config
    with monkeypatch.context() as patched:
        patched.setattr(config.cache_config, "enable_prefix_caching", False)
        with pytest.raises(VLLMValidationError, match="leave prefix out, or remove --no-enable-prefix-cach"):
            asked(at_the_end, 1000, NAMED)
        assert asked(at_the_end, 1000, "knorm")
    monkeypatch.setitem(config.additional_config, GROUP, {"block_size": 64, "beside": 20})
    assert asked(at_the_end, 1000, NAMED), "beside other groups, in larger blocks"


def test_a_method_that_looks_at_one_prompts_last_queries_is_warned_of_once(smollm2, at_the_end, caplog):
    _warn_of_queries.cache_clear()

    def warned() -> list[str]:
        said = [record.getMessage() for record in caplog.records if "last queries" in record.getMessage()]
        caplog.clear()
        return said

    for method in ("knorm", "keydiff", "kvzip", "expected_attention", "attention_matching", "kivi"):
        asked(at_the_end, 1000, f"{method}:prefix=document")
    asked(at_the_end, 1000, "snapkv")
    assert warned() == []
    for method in ("snapkv", "adakv", "kv_compress", "snapkv:budget=0.5"):
        asked(at_the_end, 1000, f"{method}{',' if ':' in method else ':'}prefix=document")
    said = warned()
    assert [line.split()[1] for line in said] == ["snapkv", "adakv", "kv_compress"]
    assert all("with prefix better use kvzip" in line and len(line.splitlines()) == 1 for line in said)
    for _ in range(2):
        processor_of(smollm2, **KVCompressionConfig.parse("snapkv:prefix_share=0.5").engine_kwargs())
    assert len(said := warned()) == 1 and "with prefix_share better use" in said[0]


# ---------------------------------------------------------------------- profiles


@pytest.mark.parametrize("path", ["/etc/passwd", "some/profile.json", "nowhere.json"])
def test_a_request_naming_any_file_as_its_profile_is_refused(at_the_end, path):
    with pytest.raises(VLLMValidationError, match="server's own head profile or a packaged one") as refused:
        asked(at_the_end, 1000, f"snapkv:allocation=profile:{path}")
    for form in ({"allocation": f"profile:{path}"}, f'{{"allocation": "profile:{path}"}}'):
        with pytest.raises(VLLMValidationError, match="server's own head profile or a packaged one"):
            asked(at_the_end, 1000, form)
    assert len(str(refused.value).splitlines()) == 1


# ---------------------------------------------------------------------- scorers


def test_a_request_may_use_the_servers_scorer_or_a_packaged_one_and_no_other_file(at_the_end):
    asked(at_the_end, 1000, "foresight:budget=0.125")
    asked(at_the_end, 1000, "auto")
    asked(at_the_end, 1000, "foresight:scorer=smollm2-135m-instruct")
    asked(at_the_end, 1000, {"scorer": scorers.find("smollm2-135m-instruct")})
    for form in ("foresight:scorer=/etc/passwd", {"method": "snapkv", "scorer": "/etc/passwd"}):
        with pytest.raises(VLLMValidationError, match="the server's own scorer or a packaged one") as refused:
            asked(at_the_end, 1000, form)
        assert len(str(refused.value).splitlines()) == 1


def test_a_scorer_is_looked_for_when_the_engine_is_configured(random_model, tmp_path, monkeypatch):
    register()
    found = processor_of(random_model, **KVCompressionConfig(method="auto").engine_kwargs()).vllm_config
    option = found.additional_config["kv_compression"]
    assert option["scorer"] == str(random_model / scorers.BESIDE)
    own = tmp_path / "random-llama"
    shutil.copytree(random_model, own)
    path = own / scorers.BESIDE
    path.write_text("damaged")
    with pytest.raises(
        KVCompressionError, match=f"^kv-compression: {path} is not a scorer; .*; remove it or"
    ):
        processor_of(own, **KVCompressionConfig().engine_kwargs())
    scorers.write(path, dataclasses.replace(scorers.load(option["scorer"]), fingerprint="another's"))
    plain = processor_of(own, **KVCompressionConfig(method="auto").engine_kwargs())
    assert "scorer" not in plain.vllm_config.additional_config["kv_compression"], "it is another model's"
    refusals = {
        "foresight": "^kv-compression method foresight needs a scorer of this model, and none was found; `",
        f"foresight:scorer={path}": "was given a scorer of random-llama, which is another model; ",
        "criticalkv:base=foresight,scorer=smollm2-135m-instruct": (
            "was given a scorer for 30 layers of 3 KV heads of 64 channels, "
            "and the model has 4 layers of 3 KV heads of 32 channels; "
        ),
    }
    for option, message in refusals.items():
        with pytest.raises(KVCompressionError, match=message) as refused:
            processor_of(own, **KVCompressionConfig.parse(option).engine_kwargs())
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(VLLMValidationError, match="needs a scorer of this model"):
        asked(plain, 1000, "foresight")


# ---------------------------------------------------------------------- endpoints


def check(request, serving=BaseServing) -> None:
    """vLLM's first look at an HTTP request, of a server that knows its model."""
    knows = SimpleNamespace(request_logger=None, _is_model_supported=lambda name: True)
    assert asyncio.run(serving._check_model(knows, request)) is None


MESSAGES = [{"role": "user", "content": "Hello"}]
OPTION = {"vllm_xargs": {"kv_compression": "off"}}


@pytest.mark.parametrize("option", ["off", "snapvk", "snapkv:budget=0.1"])
@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
def test_beam_search_refuses_an_option_that_it_would_drop(at_the_end, kind, option):
    prompt = {"prompt": "Hello"} if kind is CompletionRequest else {"messages": MESSAGES}
    given = {"vllm_xargs": {"kv_compression": option}}
    with pytest.raises(VLLMValidationError, match="beam search") as refused:
        check(kind(model="m", use_beam_search=True, **prompt, **given))
    assert len(str(refused.value).splitlines()) == 1
    check(kind(model="m", use_beam_search=True, **prompt))
    check(kind(model="m", use_beam_search=True, **prompt, vllm_xargs={"other": 1}))
    check(kind(model="m", **prompt, **given))  # refused or honoured with its sampling parameters


def request_kinds() -> list[type]:
    """Every kind of request that an endpoint of vLLM takes in its body."""

    def leaves(annotation) -> list[type]:
        arguments = typing.get_args(annotation)
        if typing.get_origin(annotation) is typing.Annotated:
            arguments = arguments[:1]
        if arguments:
            return [leaf for argument in arguments for leaf in leaves(argument)]
        return [annotation] if isinstance(annotation, type) else []

    routers = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(entrypoints.__path__, f"{entrypoints.__name__}.")
        if module.name.endswith(".api_router")
    ]
    endpoints = [
        route.endpoint
        for module in routers
        for route in getattr(getattr(module, "router", None), "routes", [])
    ]
    taken = [
        leaf
        for endpoint in endpoints
        for name, annotation in typing.get_type_hints(endpoint).items()
        for leaf in leaves(annotation)
        if name != "return" and issubclass(leaf, BaseModel)
    ]
    return list(dict.fromkeys(taken + leaves(AnyRequest) + leaves(AnyPoolingRequest)))


# Compute nothing that could be compacted; vLLM throws fields away that they do not know.
IDLE = ("Derender", "CohereEmbed", "StartProfile", "AnthropicCountTokens")


@pytest.mark.parametrize("kind", request_kinds(), ids=lambda kind: kind.__name__)
def test_every_endpoint_honours_an_option_or_refuses_it(at_the_end, kind):
    fields = kind.model_fields
    request = kind.model_construct(**OPTION)
    if kind is AnthropicMessagesRequest:  # becomes a chat before vLLM looks at it
        anthropic = kind(model="m", messages=MESSAGES, max_tokens=8, **OPTION)
        chat = AnthropicServingMessages.to_chat_completion_request(anthropic)
        assert chat.vllm_xargs == OPTION["vllm_xargs"]
    elif "vllm_xargs" in fields:  # vLLM makes sampling parameters of it, which the input processor checks
        check(request)
        if kind.__name__ != "ResponsesRequest":
            request = kind.model_construct(**OPTION, model="m", messages=MESSAGES, prompt="Hello")
            made = request.to_sampling_params(8, {})
            assert made.extra_args["kv_compression"] == "off"
    elif kind is BatchChatCompletionRequest:  # passes on what it does not know
        check(request)
        one = kind(messages=[MESSAGES], **OPTION).to_chat_completion_request(MESSAGES)
        assert one.to_sampling_params(8, {}).extra_args["kv_compression"] == "off"
    elif kind.model_config.get("extra") == "allow":
        with pytest.raises(VLLMValidationError, match="no effect at this endpoint"):
            check(request)
    elif kind.model_config.get("extra") == "forbid":
        with pytest.raises(ValidationError, match="vllm_xargs\n *Extra inputs are not permitted"):
            kind(**OPTION)
    else:
        # vLLM throws unknown fields away before anybody can look. One takes `SamplingParams` themselves.
        assert kind.__name__.startswith(IDLE) or "sampling_params" in fields


@pytest.mark.parametrize("serving", [BaseServing, PoolingBaseServing])
def test_an_option_outside_vllm_xargs_is_refused(at_the_end, serving):
    with pytest.raises(VLLMValidationError, match="option of vllm_xargs"):
        check(CompletionRequest(model="m", prompt="Hello", kv_compression="off"), serving)


def test_beam_search_of_llm_takes_no_options():
    with pytest.raises(TypeError, match="extra_args"):
        BeamSearchParams(beam_width=2, max_tokens=4, extra_args={"kv_compression": "off"})
