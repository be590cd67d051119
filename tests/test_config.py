"""Every form users write means the same, and every mistake is one clear line."""

import dataclasses
import json
import pickle
import re

import pytest

from vllm_kvcompress import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.allocation import ALLOCATIONS
from vllm_kvcompress.config import METHODS
from vllm_kvcompress.plan import Plan, is_ever_compacted, next_point, peak_blocks
from vllm_kvcompress.policies import POLICIES, Policy, get_policy, register_policy

FULL = {"method": "snapkv", "budget": 0.5, "allocation": "global", "kernel_size": 5}


@pytest.mark.parametrize(
    "form",
    [
        "snapkv:budget=0.5,allocation=global,kernel_size=5",
        '{"method": "snapkv", "budget": 0.5, "allocation": "global", "kernel_size": 5}',
        FULL,
        {name: str(value) for name, value in FULL.items()},
        KVCompressionConfig("snapkv", 0.5, "global", options={"kernel_size": 5}),
    ],
    ids=["string", "json", "dict", "strings", "config"],
)
def test_every_form_parses_to_the_same_configuration(form):
    config = KVCompressionConfig.parse(form)
    assert config == KVCompressionConfig("snapkv", 0.5, "global", options={"kernel_size": 5})
    assert config.build_policy() == POLICIES["snapkv"](kernel_size=5)
    assert config.build_allocation().name == "global"
    assert KVCompressionConfig.parse(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.engine_kwargs() == {"additional_config": {"kv_compression": config.to_dict()}}


PROFILED = {"mixed_dim_kv_h": {"allocation": "profile:smollm2-135m-instruct"}}


@pytest.mark.parametrize("method", METHODS)
def test_a_bare_method_name_has_its_presets(method):
    form = {"method": method} | PROFILED.get(method, {})
    config = KVCompressionConfig.parse(form | {"budget": 0.25})
    assert config.build_policy().name == METHODS[method].policy
    assert config.build_allocation().name == METHODS[method].allocation
    if not METHODS[method].keeps_all:
        assert KVCompressionConfig.parse(form) == config


@pytest.mark.parametrize("format", ["auto", "mixed_dim"])
def test_formats_of_several_parts_are_not_solved_for_nor_counted(format):
    with pytest.raises(KVCompressionError, match=f"^attention_matching solves .* {format} mixes several"):
        KVCompressionConfig.parse(f"attention_matching+{format}")
    with pytest.raises(KVCompressionError, match=f"^max_tokens_kept counts tokens, and {format} keeps"):
        KVCompressionConfig.parse(f"snapkv+{format}:max_tokens_kept=100")


def test_full_vectors_save_nothing_so_there_is_always_a_budget():
    assert KVCompressionConfig.parse("kivi+mixed_dim").budget == 0.25
    assert KVCompressionConfig.parse("mixed_dim_kv:budget=none").budget == 0.25
    engine = KVCompressionConfig.parse("mixed_dim_kv:budget=0.5")
    assert engine.for_request("kivi").budget is None and engine.for_request("snapkv").budget == 0.5
    assert KVCompressionConfig.parse("kivi").for_request("mixed_dim_kv").budget == 0.25


def test_a_method_whose_heads_have_a_profile_is_refused_without_one():
    with pytest.raises(KVCompressionError, match=r"write allocation=profile:PATH$"):
        KVCompressionConfig("mixed_dim_kv_h")


# ---------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("form", "method", "format", "budget"),
    [
        ("snapkv+kivi4", "snapkv", "kivi4", 0.25),
        ("snapkv + kivi4:budget=0.5", "snapkv", "kivi4", 0.5),
        ({"method": "snapkv", "format": "kivi2"}, "snapkv", "kivi2", 0.25),
        ('{"method": "snapkv+kivi2", "format": "kivi2"}', "snapkv", "kivi2", 0.25),
        ("snapkv:format=kivi8", "snapkv", "kivi8", 0.25),
        ("kivi", "kivi", "kivi4", None),
        ("kivi+kivi2", "kivi", "kivi2", None),
        ("kivi:budget=0.125", "kivi", "kivi4", 0.125),
        ("turboquant", "turboquant", "turbo4_centred", None),
        ("snapkv", "snapkv", None, 0.25),
    ],
)
def test_a_format_is_named_behind_the_method_or_by_itself(form, method, format, budget):
    config = KVCompressionConfig.parse(form)
    assert (config.method, config.budget, config.keeps_all) == (method, budget, budget is None)
    assert (None if config.record_format is None else config.record_format.name) == format
    assert KVCompressionConfig.parse(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_what_keeps_every_token_observes_nothing():
    config = KVCompressionConfig.parse("kivi")
    assert not config.observes and not config.build_policy().reads_keys
    assert KVCompressionConfig.parse("kivi:budget=0.5").observed_window == 32


def test_formats_are_compacted_again_every_128_tokens_where_nobody_watches_every_query():
    intervals = {
        form: KVCompressionConfig.parse(form).interval
        for form in (
            "kivi",
            "snapkv+kivi4",
            "snapkv+kivi4:recompact_every=64",
            "kvzip+kivi4",
            "attention_matching",
            "attention_matching:queries=prompt",
            "attention_matching:recompact_every=96",
            "h2o+turbo4",
            "snapkv",
            "kivi:when=streaming",
        )
    }
    assert list(intervals.values()) == [128, 128, 64, None, None, None, 96, None, None, 1024]


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ("snapkv+kivi3", "did you mean 'kivi"),
        ("snapkv+", "unknown kv_compression format ''"),
        ("snapkv+kivi4:format=kivi2", "given twice"),
        ("snapkv+kivi4+kivi2", "unknown kv_compression format"),
        ("snap+kivi4", "did you mean 'snapkv'"),
        ("foresight+kivi4:threshold=0.2", "leave it or the format kivi4"),
        ("h2o+kivi4:recompact_every=64", "watches every query"),
        ("foresight+auto:max_tokens_kept=2048", "use budget alone, or another format"),
        ("kivi:budget=0", "budget"),
    ],
)
def test_formats_that_cannot_be_are_refused_in_one_line(form, says):
    with pytest.raises(KVCompressionError, match=re.escape(says)) as error:
        KVCompressionConfig.parse(form)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("engine", "request_", "method", "format", "budget"),
    [
        ("snapkv:budget=0.5", "kivi", "kivi", "kivi4", None),
        ("snapkv:budget=0.5", "kivi:budget=0.1", "kivi", "kivi4", 0.1),
        ("snapkv:budget=0.5", "snapkv+kivi2", "snapkv", "kivi2", 0.5),
        ("snapkv:budget=0.5", {"format": "kivi2"}, "snapkv", "kivi2", 0.5),
        ("snapkv+kivi2:budget=0.5", "keydiff", "keydiff", None, 0.5),
        ("snapkv+kivi2:budget=0.5", {"budget": 0.1}, "snapkv", "kivi2", 0.1),
        ("snapkv+kivi2", {"format": None}, "snapkv", None, 0.25),
        ("kivi", "snapkv", "snapkv", None, 0.25),
        ("kivi", {"format": "turbo3"}, "kivi", "turbo3", None),
    ],
)
def test_a_request_takes_another_format_or_none(engine, request_, method, format, budget):
    config = KVCompressionConfig.parse(engine).for_request(request_)
    assert (config.method, config.budget) == (method, budget)
    assert (None if config.record_format is None else config.record_format.name) == format


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("snapkvv", "did you mean 'snapkv'"),
        ("snapkv:budgets=0.5", "did you mean 'budget'"),
        ("snapkv:budget=0", "budget"),
        ("snapkv:budget=1.5", "budget"),
        ("snapkv:budget=lots", "budget must be float"),
        ("snapkv:budget", "has no value"),
        ("snapkv:window=0", "window"),
        ("snapkv:sink_tokens=-1", "sink_tokens"),
        ("snapkv:sink_tokens=1.5", "sink_tokens must be int"),
        ("snapkv:kernel_size=4", "kernel_size"),
        ("snapkv:pooling=sum", "pooling must be 'max' or 'avg'"),
        ("snapkv:alpha=0.2", "unknown kv_compression option of snapkv 'alpha'"),
        ("adakv:alpha=2", "alpha"),
        ("snapkv:allocation=square", "use one of"),
        ("{", "not valid JSON"),
        (3, "must be a string or a dictionary"),
        ({1: "snapkv"}, "must be a string or a dictionary"),
        ("snapkv:method=adakv", "'method' is given twice"),
        ("snapkv:budget=0.5,budget=0.6", "'budget' is given twice"),
        ("snapkv:budget=nan", "budget"),
        ("expected_attention:epsilon=nan", "epsilon is out of range, got nan"),
        ({"method": "snapkv", "budget": True}, "budget must be float, got True"),
        ({"method": 3}, "method must be str"),
        ({"method": "snapkv", "kernel_size": [5]}, "kernel_size must be int"),
        ("streaming_llm:kernel_size=5", "unknown kv_compression option of streaming_llm 'kernel_size'"),
        ({"method": ["snapkv"]}, "method must be str"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_that_names_the_option(value, says):
    with pytest.raises(KVCompressionError) as caught:
        KVCompressionConfig.parse(value)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [{"method": 5}, {1: 2}, {"window": {1}}, {"kernle_size": 3}, "adakvv", 7], ids=str
)
def test_mistakes_of_a_request_are_one_line_too(value):
    with pytest.raises(KVCompressionError) as caught:
        KVCompressionConfig().for_request(value)
    assert "\n" not in str(caught.value)


def test_own_options_hidden_among_the_methods_are_refused():
    for name in ("budget", "window"):
        with pytest.raises(KVCompressionError, match=f"give {name} by itself"):
            KVCompressionConfig(options={name: 1})


@pytest.mark.parametrize(
    "value", ["off", " off ", {"method": "off"}, {"enabled": "false"}, '{"method": "off"}']
)
def test_off_in_any_form_disables(value):
    assert not KVCompressionConfig.parse(value).enabled
    assert not KVCompressionConfig().for_request(value).enabled


@pytest.fixture
def head_profile(tmp_path):
    path = tmp_path / "of=a:model.json"
    shares = {"budgets": [0.25], "shares": [[[1, 3]]], "num_layers": 1, "num_kv_heads": 2}
    path.write_text(json.dumps({"version": 1, "model": "tiny", **shares}))
    return path


def test_an_allocation_may_name_a_file(head_profile):
    config = KVCompressionConfig.parse(f"snapkv:budget=0.5,allocation=profile:{head_profile},kernel_size=5")
    assert config.build_allocation() == ALLOCATIONS["profile"](str(head_profile))
    assert config.options == {"kernel_size": 5}
    assert config.to_dict()["allocation"] == f"profile:{head_profile}"
    for form in (config.to_dict(), json.dumps(config.to_dict())):
        assert KVCompressionConfig.parse(form) == config
    assert pickle.loads(pickle.dumps(config)) == config
    plain = KVCompressionConfig.parse("snapkv:budget=0.5,kernel_size=5")
    assert plain.for_request({"allocation": f"profile:{head_profile}"}) == config
    assert plain.for_request(f"snapkv:allocation=profile:{head_profile}") == config
    assert config.for_request({"allocation": "uniform"}).build_allocation().name == "uniform"
    assert config.for_request("adakv").build_allocation().name == "adaptive"


def test_an_engine_does_not_need_the_file_after_its_start(head_profile):
    config = KVCompressionConfig.parse(f"snapkv:allocation=profile:{head_profile}")
    head_profile.unlink()
    assert config.build_allocation().profile.shape == (1, 2)


@pytest.mark.parametrize(
    ("allocation", "says"),
    [
        ("profile", "write allocation=profile:PATH"),
        ("profile:", "write allocation=profile:PATH"),
        ("profile:/nowhere/to/be/found.json", "there is no head profile /nowhere/to/be/found.json"),
        ("uniform:3", "allocation uniform takes no argument, got '3'"),
        ("profiel:x", "did you mean 'profile'"),
    ],
)
def test_mistakes_about_a_file_are_one_line(allocation, says):
    for parse in (KVCompressionConfig.parse, KVCompressionConfig().for_request):
        with pytest.raises(KVCompressionError) as caught:
            parse({"method": "snapkv", "allocation": allocation})
        assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_file_of_an_allocation_has_one_place(head_profile):
    with pytest.raises(KVCompressionError, match="unknown kv_compression option of snapkv 'path'"):
        KVCompressionConfig.parse({"allocation": f"profile:{head_profile}", "path": str(head_profile)})


def test_what_one_request_wrote_does_not_change_what_another_means():
    engine = KVCompressionConfig()
    assert engine.for_request({"budget": 1}).budget == 1.0
    with pytest.raises(KVCompressionError, match="got True"):
        engine.for_request({"budget": True})


@pytest.mark.parametrize("text", [".5", "5e-1", "0.50"])
def test_numbers_are_read_as_people_write_them(text):
    assert KVCompressionConfig.parse({"budget": text}).budget == 0.5


def test_no_recent_token_is_scored_by_fewer_queries_than_its_policy_needs():
    for method in METHODS:
        for window in (None, 1, 8, 64):
            config = KVCompressionConfig(method, window=window, **PROFILED.get(method, {}))
            assert config.recent_tokens >= max(config.observed_window, window or 0)
    assert KVCompressionConfig("streaming_llm").observed_window == 0
    assert KVCompressionConfig("streaming_llm").recent_tokens == 32


def test_presets_name_their_papers():
    assert "2404.14469" in METHODS["adakv"].paper and "2407.11550" in METHODS["adakv"].paper
    assert METHODS["streaming_llm"].cost.startswith("none")


def test_a_request_overrides_what_it_names():
    engine = KVCompressionConfig.parse("snapkv:budget=0.5,kernel_size=5,sink_tokens=2")
    assert engine.for_request(None) is engine
    assert engine.for_request({"budget": 0.1}) == KVCompressionConfig.parse(
        "snapkv:budget=0.1,kernel_size=5,sink_tokens=2"
    )
    assert not engine.for_request("off").enabled
    assert Plan.of(engine.for_request("off"), 10_000, 32) is None


def test_a_request_that_names_another_method_keeps_only_options_the_method_has():
    engine = KVCompressionConfig.parse("adakv:budget=0.5,kernel_size=5,pooling=avg,alpha=0.3")
    assert engine.for_request("kv_compress") == KVCompressionConfig.parse(
        "kv_compress:budget=0.5,kernel_size=5"
    )
    # Naming the method that the engine has anyway is naming none.
    assert (
        engine.for_request({"method": engine.method, "budget": 0.1}).build_allocation()
        == engine.build_allocation()
    )
    other = KVCompressionConfig.parse("snapkv:allocation=adaptive,alpha=0.4")
    assert other.for_request("snapkv:budget=0.1").build_allocation() == other.build_allocation()
    assert engine.for_request({"allocation": "uniform"}) == KVCompressionConfig.parse(
        "adakv:budget=0.5,allocation=uniform,kernel_size=5,pooling=avg"
    )
    with pytest.raises(KVCompressionError, match="alpha"):
        engine.for_request("kv_compress:alpha=0.1")


def test_a_request_can_opt_in_where_the_engine_leaves_requests_alone():
    engine = KVCompressionConfig.parse({"method": "snapkv", "enabled": False})
    assert not engine.for_request(None).enabled
    assert engine.for_request({"budget": 0.5}).enabled


@pytest.mark.parametrize(
    ("form", "prompt", "block", "wanted"),
    [
        ("snapkv:budget=0.25", 1500, 128, (1408, 11, 3)),
        ("snapkv:budget=0.5", 1500, 32, (1440, 45, 23)),
        ("snapkv:budget=0.1", 31 * 32, 32, (960, 30, 3)),
        ("snapkv:budget=0.14", 51 * 32, 32, (1600, 50, 7)),  # and not ceil(7.000000000000001)
        ("snapkv:budget=0.07", 101 * 32, 32, (3200, 100, 7)),  # likewise
        ("snapkv:budget=0.14", 51 * 32 - 1, 32, (1568, 49, 7)),  # of 6.86
        ("snapkv:budget=0.14", 52 * 32, 32, (1632, 51, 8)),  # of 7.14
        ("snapkv:budget=0.25,window=100", 1500, 32, (1376, 43, 11)),
        ("streaming_llm:budget=0.25,window=100", 1500, 32, (1376, 43, 11)),
        ("snapkv:budget=1", 1500, 32, None),  # nothing to free
        ("snapkv:budget=0.9", 63, 32, None),
        ("snapkv:budget=0.5", 20, 32, None),
        ("snapkv:budget=0.1,sink_tokens=50", 200, 32, (160, 5, 2)),  # blocks for the sinks at least
    ],
)
def test_the_plan_is_known_before_the_scores(form, prompt, block, wanted):
    plan = Plan.of(KVCompressionConfig(min_freed_tokens=1).for_request(form), prompt, block)
    assert (plan and (plan.boundary, plan.source_blocks, plan.kept_blocks)) == wanted


def test_a_policy_of_user_code_is_a_method_by_its_name():
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True)
    class Keep(Policy):
        name: ClassVar[str] = "keep_everything_first"
        paper: ClassVar[str] = "none"
        cost: ClassVar[str] = "none"
        window: int = 8
        strength: float = 1.0

        def score(self, observation):
            raise AssertionError("not called")

    register_policy(Keep)
    try:
        config = KVCompressionConfig.parse("keep_everything_first:strength=2,window=16")
        assert config.build_policy() == Keep(window=16, strength=2.0)
        assert config.build_allocation().name == "uniform"
        assert config.recent_tokens == 16
    finally:
        del POLICIES["keep_everything_first"]


def test_a_policy_that_cannot_be_configured_or_hides_another_is_refused():
    class Bare(Policy):
        name = "bare"

        def score(self, observation):
            raise AssertionError("not called")

    with pytest.raises(ValueError, match="must be a dataclass"):
        register_policy(Bare)
    taken = dataclasses.dataclass(frozen=True)(type("Other", (Bare,), {"name": "snapkv"}))
    with pytest.raises(ValueError, match="'snapkv' is taken"):
        register_policy(taken)
    assert get_policy("snapkv") is POLICIES["snapkv"]
    with pytest.raises(ValueError, match="unknown policy 'bare'"):
        get_policy("bare")


# ---------------------------------------------------------------------- compaction that goes on


def points(text: str, num_prompt: int, count: int) -> list[int | None]:
    config, found = KVCompressionConfig.parse(text), [None]
    while len(found) <= count and (len(found) == 1 or found[-1] is not None):
        found.append(next_point(config, num_prompt, found[-1]))
    return found[1:]


def test_compaction_points_depend_on_the_request_alone():
    assert points("snapkv", 500, 4) == [500, None]
    assert points("snapkv:recompact_every=100", 500, 3) == [500, 600, 700]
    assert points("snapkv:when=streaming", 2500, 4) == [1024, 2048, 2500, 3524]
    assert points("snapkv:when=streaming,recompact_every=200", 500, 4) == [200, 400, 500, 700]
    assert points("snapkv:when=streaming", 500, 2) == [500, 1524]


def test_a_later_plan_frees_blocks_or_is_none():
    config = KVCompressionConfig.parse("snapkv:budget=0.25,recompact_every=64")
    first = Plan.of(config, 512, 32)
    assert (first.source_blocks, first.kept_blocks) == (15, 4)
    second = Plan.of(config, 576, 32, first)
    assert (second.source_blocks, second.kept_blocks) == (17, 5)  # of the 4 + 2 that are held
    assert Plan.of(config, 512, 32, first) is None


def test_a_number_of_tokens_bounds_what_is_kept():
    config = KVCompressionConfig.parse("snapkv:budget=0.5,max_tokens_kept=100")
    assert Plan.of(config, 4096, 32).kept_blocks == 3
    short = KVCompressionConfig.parse("snapkv:budget=0.5,max_tokens_kept=100,min_freed_tokens=1")
    assert Plan.of(short, 128, 32).kept_blocks == 2  # half of the 3 below the boundary
    assert Plan.of(KVCompressionConfig.parse("snapkv:max_tokens_kept=10"), 4096, 32).kept_blocks == 1


def blocks_held(config, num_prompt: int, num_tokens: int, block: int) -> int:
    """The most blocks that a request holds, counted token by token."""
    held, point, most = None, next_point(config, num_prompt), 0
    for computed in range(1, num_tokens + 1):
        raw = -(-computed // block) - (held.source_blocks if held else 0)
        most = max(most, raw + (held.kept_blocks if held else 0))
        if computed == point:
            held = Plan.of(config, computed, block, held) or held
            point = next_point(config, num_prompt, point)
    return most


@pytest.mark.parametrize("tokens", [1, 100, 1000, None])
def test_what_bounds_a_step_is_the_engines_and_no_request_may_give_it(tokens):
    engine = KVCompressionConfig.parse("snapkv:budget=0.5,max_compaction_tokens=100")
    assert engine.for_request("kv_compress:budget=0.1").max_compaction_tokens == 100
    for given in ({"max_compaction_tokens": tokens}, f"snapkv:max_compaction_tokens={tokens}"):
        with pytest.raises(KVCompressionError, match="^max_compaction_tokens is the engine's; [^\n]*$"):
            engine.for_request(given)


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("options", ["", ",recompact_every=100", ",when=streaming,recompact_every=64"])
@pytest.mark.parametrize("bound", ["", ",max_tokens_kept=130"])
@pytest.mark.parametrize("num_prompt", [10, 300, 1000])
@pytest.mark.parametrize("min_freed", [1, 256, 300])
def test_no_request_holds_more_than_its_peak(budget, options, bound, num_prompt, min_freed):
    config = KVCompressionConfig.parse(f"snapkv:budget={budget}{options}{bound},min_freed_tokens={min_freed}")
    for num_tokens in (num_prompt, num_prompt + 7, num_prompt + 500):
        most = blocks_held(config, num_prompt, num_tokens, 16)
        assert most <= peak_blocks(config, num_prompt, num_tokens, 16)


def test_the_peak_of_a_streamed_prompt_is_far_below_its_length():
    config = KVCompressionConfig.parse("snapkv:budget=0.25,when=streaming,max_tokens_kept=512")
    assert peak_blocks(config, 100_000, 100_000, 32) == 512 // 32 + (1024 + 32) // 32 + 2
    assert peak_blocks(KVCompressionConfig.parse("snapkv"), 1000, 1100, 32) == 35


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("snapkv:recompact_every=0", "recompact_every must be at least 1"),
        ("snapkv:max_tokens_kept=3", "max_tokens_kept must be at least 1 and sink_tokens"),
        ("snapkv:max_compaction_tokens=0", "max_compaction_tokens must be at least 1, got 0"),
        ("snapkv:min_freed_tokens=0", "min_freed_tokens must be at least 1, got 0"),
        ("foresight:threshold=0", "threshold must be a score above 0, got 0.0"),
        ("foresight:threshold=-1", "threshold must be a score above 0, got -1.0"),
        ("snapkv:threshold=0.1", "scores of snapkv mean nothing across prompts: use threshold with one"),
        ("kvzip:threshold=0.1,allocation=uniform", "use allocation=global"),
        ("snapkv:when=never", "when must be"),
        ("snapkv:when=pressure,recompact_every=64", "both say when a request is compacted again; remove one"),
        ("foresight:when=pressure,threshold=1", "both say how much a request keeps; remove one"),
        ("h2o:when=pressure", "h2o watches every query, also of requests that stay raw"),
        ("kvzip:when=pressure", "kvzip watches every query, also of requests that stay raw"),
        ("attention_matching:when=pressure", "attention_matching watches every query"),
        ("snapkv:ladder=0.5,0.25", "use it with when=pressure and a budget"),
        ("kivi:ladder=0.5,when=pressure", "use it with when=pressure and a budget"),
        ("snapkv:when=pressure,ladder=0.25,0.5", "ladder must be falling fractions"),
        ("snapkv:when=pressure,ladder=0.5,0.5", "ladder must be falling fractions"),
        ("snapkv:when=pressure,ladder=1.5", "ladder must be falling fractions"),
        ("snapkv:when=pressure,ladder=0.5,0", "ladder must be falling fractions"),
        ("snapkv:when=pressure,ladder=half", "option ladder must be float, got 'half'"),
        ("snapkv:when=pressure,0.5", "option '0.5' has no value"),
        ("kvzip:recompact_every=64", "remove when=streaming and recompact_every"),
        ("kvzip:when=streaming", "remove when=streaming and recompact_every"),
        ("criticalkv:base=kvzip,when=streaming", "remove when=streaming and recompact_every"),
        ("attention_matching:when=streaming", "attention_matching solves for a whole prompt at once"),
        ("attention_matching:queries=prompt,recompact_every=64", "watches every query.* over matched k4v3"),
        ("attention_matching:queries=prompt,when=streaming", "solves for a whole prompt at once"),
        ("attention_matching:threshold=0.1", "scores of attention_matching mean nothing across prompts"),
        ("attention_matching+auto", "solves for tokens of one format, and auto mixes several"),
        ("attention_matching+auto:max_tokens_kept=100", "and auto mixes several"),
        ("attention_matching:queries=all", "queries must be"),
        ("attention_matching:keys=all", "keys must be"),
        ("attention_matching:references=0", "references must be at least 1, got 0"),
        ("criticalkv:base=snapkw", "did you mean 'snapkv'"),
        ("criticalkv:base=criticalkv", "base of criticalkv must be another policy"),
        ("criticalkv:base=tova,kernel_size=3", "unknown kv_compression option of criticalkv 'kernel_size'"),
        ("h2o:recent=2", "recent must be between 0 and 1"),
    ],
)
def test_mistakes_in_what_goes_on_are_one_line(text, said):
    with pytest.raises(KVCompressionError, match=said) as error:
        KVCompressionConfig.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "form",
    [
        "snapkv:budget=0.2,when=pressure,ladder=0.6,0.4",
        "snapkv:ladder=0.6,0.4,when=pressure,budget=0.2",
        {"method": "snapkv", "budget": 0.2, "when": "pressure", "ladder": [0.6, 0.4]},
        {"method": "snapkv", "budget": "0.2", "when": "pressure", "ladder": ["0.6", "0.4"]},
    ],
)
def test_a_ladder_leads_down_to_the_budget(form):
    config = KVCompressionConfig.parse(form)
    assert config.ladder == (0.6, 0.4) and config.ladder_steps == (0.6, 0.4, 0.2)
    assert KVCompressionConfig.parse(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.for_request({"budget": 0.5}).ladder_steps == (0.6, 0.5)
    assert config.for_request({"when": "prompt"}).ladder is None
    assert config.for_request("keydiff").ladder == (0.6, 0.4)


def test_without_a_ladder_there_is_a_usual_one():
    assert KVCompressionConfig.parse("snapkv:when=pressure").ladder_steps == (0.5, 0.25)
    assert KVCompressionConfig.parse("snapkv:when=pressure,budget=0.1").ladder_steps == (
        0.5,
        0.25,
        0.125,
        0.1,
    )
    assert KVCompressionConfig.parse("kivi:when=pressure").ladder_steps == (None,)


def test_under_pressure_auto_is_what_looks_at_no_query():
    for form, policy in (("auto", "kv_compress"), ("auto:when=pressure", "keydiff")):
        assert KVCompressionConfig.parse(form).build_policy().name == policy
    assert not KVCompressionConfig.parse("auto:when=pressure").observes


def test_under_pressure_no_compaction_is_planned_and_none_frees_little():
    config = KVCompressionConfig.parse("snapkv:when=pressure,budget=0.25,min_freed_tokens=100")
    assert next_point(config, 1000) is None and config.interval is None and config.compacts_again
    assert is_ever_compacted(config, 10, 400, 32) and not is_ever_compacted(config, 10, 120, 32)
    held = Plan.of(config, 1000, 32, budget=0.5)
    assert (held.boundary, held.kept_blocks) == (960, 15)
    lower = Plan.of(config, 1001, 32, held, budget=0.25)
    assert (lower.boundary, lower.kept_blocks) == (960, 8)
    assert Plan.of(config, 1001, 32, lower, budget=0.25) is None
    assert Plan.of(config, 1100, 32, lower, budget=0.25) is None
    assert Plan.of(config, 1152, 32, lower, budget=0.25) is not None


def test_a_threshold_goes_with_its_method():
    engine = KVCompressionConfig.parse("kvzip:budget=0.5,threshold=0.1")
    assert engine.for_request("kvzip:budget=0.3").threshold == 0.1
    assert engine.for_request({"threshold": "none"}).threshold is None
    assert engine.for_request("snapkv").threshold is None and engine.for_request("snapkv").budget == 0.5
    with pytest.raises(KVCompressionError, match="allocation=global"):
        engine.for_request("kvzip:allocation=uniform")


def test_a_policy_on_top_of_another_takes_its_options():
    policy = KVCompressionConfig.parse("criticalkv:base=kv_compress,kernel_size=3,window=16").build_policy()
    assert (type(policy.base).__name__, policy.base.kernel_size, policy.window) == ("KVCompress", 3, 16)


@pytest.mark.parametrize(
    "value", [{"method": ["snapkv"]}, {"method": {"name": "kivi"}}, {"method": 3}, {"format": ["kivi4"]}]
)
def test_a_request_whose_names_are_no_names_is_refused(value):
    with pytest.raises(KVCompressionError):
        KVCompressionConfig.parse("kivi").for_request(value)
