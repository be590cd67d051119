"""What a program does with the compacted prefixes of its own engine, by the functions of the package."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from harness import BLOCK_SIZE, NUM_BLOCKS
from vllm import SamplingParams

import vllm_kvcompress
from vllm_kvcompress import KVCompressionError

TOKENS = 1000  # 31 full blocks, of which 30 below the window are kept as 8
OPTIONS = {"method": "knorm", "budget": 0.25}


@pytest.fixture(scope="module")
def llm(engines, random_model):
    return engines(random_model, "keydiff:budget=0.25,prefix_share=0.2,min_freed_tokens=256").llm


@pytest.fixture(autouse=True)
def every_block_is_returned(llm):
    yield
    for prefix in vllm_kvcompress.list_prefixes(llm):
        if prefix["name"] is not None:
            assert vllm_kvcompress.delete_prefix(llm, prefix["name"])
    assert llm.reset_prefix_cache()
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1


def ask(llm, ids, option=OPTIONS, salt=None, max_tokens=8):
    params = SamplingParams(
        max_tokens=max_tokens, temperature=0.0, ignore_eos=True, extra_args={"kv_compression": option}
    )
    prompt = {"prompt_token_ids": ids} | ({} if salt is None else {"cache_salt": salt})
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    return output, output.kv_transfer_params["kv_compression"]


def test_a_prefix_is_made_used_listed_and_deleted(llm, long_ids):
    ids = long_ids(TOKENS)
    made = vllm_kvcompress.compact_prefix(llm, ids, "document", **OPTIONS)
    assert made.items() >= {"name": "document", "tokens": 31 * BLOCK_SIZE, "engine": 0}.items()
    assert made["compacted_tokens"] == 30 * BLOCK_SIZE and made["blocks"] == 8 + 1
    assert (made["method"], made["budget"], made["adapter"]) == ("knorm", 0.25, None)
    assert made["bytes"] == 9 * BLOCK_SIZE * 4 * 3 * 2 * 32 * 4  # layers, heads, K and V, channels, bytes
    _, told = ask(llm, ids + long_ids(50, seed=1))
    assert told["prefix_tokens"] == 31 * BLOCK_SIZE
    (listed,) = [each for each in vllm_kvcompress.list_prefixes(llm) if each["name"]]
    assert (listed["hits"], listed["users"]) == (1, 0)
    assert listed | {"hits": 0, "engine": 0} == made
    assert vllm_kvcompress.delete_prefix(llm, "document")
    assert not vllm_kvcompress.delete_prefix(llm, "document")
    (listed,) = vllm_kvcompress.list_prefixes(llm)
    assert listed["name"] is None, "what its user was compacted to is one of its own"


def test_an_answer_on_a_prefix_is_one_of_compacted_context(llm, long_ids):
    """What follows is computed on what is kept: an answer is neither raw nor that of other options."""
    ids, question = long_ids(TOKENS, seed=3), long_ids(40, seed=4)
    answers = {"raw": list(ask_raw(llm, ids + question).outputs[0].token_ids)}
    for budget in (0.1, 0.5):
        option = OPTIONS | {"budget": budget}
        vllm_kvcompress.compact_prefix(llm, ids, f"at {budget}", **option)
        once, told = ask(llm, ids + question, option, max_tokens=16)
        again, _ = ask(llm, ids + question, option, max_tokens=16)
        assert told["prefix_tokens"] == 31 * BLOCK_SIZE
        answers[budget] = list(once.outputs[0].token_ids)
        assert answers[budget] == list(again.outputs[0].token_ids)
    assert answers[0.1] != answers["raw"] and answers[0.1] != answers[0.5]


def ask_raw(llm, ids):
    params = SamplingParams(
        max_tokens=16, temperature=0.0, ignore_eos=True, extra_args={"kv_compression": "off"}
    )
    return llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)[0]


def test_text_and_salts(llm, long_texts):
    text = long_texts(TOKENS)
    made = vllm_kvcompress.compact_prefix(llm, text, "document", cache_salt="mine", **OPTIONS)
    assert made["tokens"] == 31 * BLOCK_SIZE
    named = [[each["name"] for each in vllm_kvcompress.list_prefixes(llm, salt)] for salt in (None, "mine")]
    assert "document" not in named[0] and named[1] == ["document"]
    ids = llm.get_tokenizer().encode(text)
    assert "prefix_tokens" not in ask(llm, ids + [5] * 9, salt="yours")[1]
    assert ask(llm, ids + [5] * 9, salt="mine")[1]["prefix_tokens"] == 31 * BLOCK_SIZE
    assert not vllm_kvcompress.delete_prefix(llm, "document")
    assert vllm_kvcompress.delete_prefix(llm, "document", cache_salt="mine")


def test_without_a_name_of_its_own_what_ended_is_kept_in_a_share(llm, long_ids):
    ids = long_ids(TOKENS, seed=6)
    output, _ = ask(llm, ids, max_tokens=20)
    (listed,) = vllm_kvcompress.list_prefixes(llm)
    assert listed["name"] is None and listed["tokens"] == (TOKENS + 19) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize(
    ("length", "name", "options", "message"),
    [
        (100, "document", OPTIONS, "'document' was not kept: the prompt is short: compacting it"),
        (1000, "taken", OPTIONS, "'taken' was not kept: the name is taken; delete the prefix that"),
        (1000, "x" * 129, OPTIONS, "prefix must be a name of 1 to 128 printable characters"),
        (1000, 3, OPTIONS, "kv_compression option prefix must be str"),
        (1000, "document", {"method": "knrom"}, "did you mean 'knorm'"),
        (1000, "document", {"prefix": "other"}, "give the prefix its name by itself"),
        (4095, "document", OPTIONS, "no more than 4094 tokens with --max-model-len 4096"),
        (5000, "document", OPTIONS, "4096"),
    ],
)
def test_what_is_not_kept_is_one_line(llm, long_ids, length, name, options, message):
    vllm_kvcompress.compact_prefix(llm, long_ids(TOKENS, seed=9), "taken", **OPTIONS)
    with pytest.raises(KVCompressionError, match=message) as refused:
        vllm_kvcompress.compact_prefix(llm, long_ids(length), name, **options)
    assert len(str(refused.value).splitlines()) == 1
    names = [each["name"] for each in vllm_kvcompress.list_prefixes(llm) if each["name"]]
    assert names == ["taken"]


def test_an_engine_in_a_process_of_its_own_is_asked_by_utility_calls(llm):
    calls = []

    def call(*args):
        calls.append(args)
        return [{"name": "there"}] if len(args) == 2 else True

    engine = SimpleNamespace(
        vllm_config=llm.llm_engine.vllm_config, engine_core=SimpleNamespace(call_utility=call)
    )
    elsewhere = SimpleNamespace(llm_engine=engine)
    assert vllm_kvcompress.list_prefixes(elsewhere, "mine") == [{"name": "there"}]
    assert vllm_kvcompress.delete_prefix(elsewhere, "there", "mine") is True
    expected = [("kv_compression_prefixes", "mine"), ("kv_compression_delete_prefix", "there", "mine")]
    assert calls == expected
    for name, *args in expected:  # which is what the core takes
        getattr(llm.llm_engine.engine_core.engine_core, name)(*args)
    engine.vllm_config = SimpleNamespace(additional_config={"kv_compression": "off"})
    for ask in (vllm_kvcompress.list_prefixes, lambda llm: vllm_kvcompress.delete_prefix(llm, "there")):
        with pytest.raises(KVCompressionError, match="runs without kv_compression"):
            ask(elsewhere)


def test_importing_the_package_imports_nothing_of_vllm():
    code = (
        "import sys, vllm_kvcompress as k; assert 'vllm' not in sys.modules; "
        "assert k.compact_prefix and 'vllm' in sys.modules; print(k.nothing)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("AttributeError: module 'vllm_kvcompress' has no attribu")
