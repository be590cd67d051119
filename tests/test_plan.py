"""What a configuration means in tokens and blocks, against figures worked out by hand."""

import pytest

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.plan import (
    Plan,
    is_ever_compacted,
    moment_tokens,
    next_point,
    page_tokens,
    peak_blocks,
    ring_budget,
    ring_tokens,
)


def parse(text: str) -> KVCompressionConfig:
    return KVCompressionConfig(min_freed_tokens=1).for_request(text)


@pytest.mark.parametrize(
    "budget, source, kept",
    [(0.14, 50, 7), (0.28, 25, 7), (0.55, 100, 55), (0.25, 29, 8), (0.001, 50, 1), (1 / 3, 30, 10)],
)
def test_a_budget_is_the_decimal_number_that_was_written(budget, source, kept):
    plan = Plan.of(parse(f"knorm:budget={budget},window=16"), source * 16 + 16, 16)
    assert (plan.source_blocks, plan.kept_blocks, plan.boundary) == (source, kept, source * 16)


@pytest.mark.parametrize(
    "num_tokens, source", [(63, None), (64, 2), (79, 2), (80, 3), (511, 29), (512, 30), (513, 30)]
)
def test_the_window_stays_raw_and_the_boundary_is_whole_blocks(num_tokens, source):
    plan = Plan.of(parse("snapkv:budget=0.25"), num_tokens, 16)
    assert (plan and plan.source_blocks) == source


def test_nothing_is_planned_that_frees_nothing():
    assert Plan.of(parse("snapkv:budget=1"), 1000, 16) is None
    assert Plan.of(parse("snapkv:budget=0.25,enabled=false"), 1000, 16) is None
    # 4 of 16 blocks are held; two more sources raise what is kept to 5 of 18: one is freed.
    held = Plan(256, 16, 4)
    assert Plan.of(parse("snapkv:budget=0.25"), 32 + 256, 16, held) is None
    assert Plan.of(parse("snapkv:budget=0.25"), 32 + 288, 16, held) == Plan(288, 18, 5)
    assert Plan.of(parse("snapkv:budget=0.25"), 32 + 272, 16, held) is None  # 5 of 5 blocks


def test_a_threshold_plans_for_the_most_that_it_may_keep():
    config = parse("foresight:budget=0.5,threshold=0.1")
    assert Plan.of(config, 32 + 256, 16) == Plan(256, 16, 8)
    # It kept 3 of 16 blocks. With four more it may keep all 7, though the budget has 10.
    held = Plan(256, 16, 3)
    assert Plan.of(config, 32 + 320, 16, held) == Plan(320, 20, 7)
    assert Plan.of(config, 32 + 256 + 15, 16, held) is None  # no block is new
    assert Plan.of(config, 32 + 640, 16, held) == Plan(640, 40, 20)  # of 27
    # A first one may keep all, if it could also free enough: all but a block.
    config = parse("foresight:budget=1,threshold=0.1,min_freed_tokens=256")
    assert Plan.of(config, 32 + 256, 16) is None
    assert Plan.of(config, 32 + 272, 16) == Plan(272, 17, 17)
    assert (
        Plan.of(parse("foresight:budget=1,threshold=0.1,sink_tokens=20,min_freed_tokens=256"), 304, 16)
        is None
    )


# Of 384 tokens 22 blocks lie below the window, 6 of which are kept: 256 tokens are freed.
LEAST = "snapkv:budget=0.25,min_freed_tokens=256"


@pytest.mark.parametrize("least, freeing", [(256, True), (257, False), (240, True), (1, True)])
def test_a_prompt_that_would_free_too_little_is_left_alone(least, freeing):
    config = parse(f"snapkv:budget=0.25,min_freed_tokens={least}")
    assert (Plan.of(config, 384, 16) == Plan(352, 22, 6)) == freeing
    assert (Plan.of(config, 384, 16) is None) != freeing
    assert Plan.of(config, 383, 16) is None or least <= 240


def test_by_default_a_prompt_frees_256_tokens_or_is_left_alone():
    assert KVCompressionConfig.parse("snapkv").min_freed_tokens == 256
    assert Plan.of(KVCompressionConfig.parse("snapkv:budget=0.25"), 383, 16) is None
    assert Plan.of(KVCompressionConfig.parse("snapkv:budget=0.25"), 384, 16)


def test_what_follows_an_interval_may_free_less():
    again = parse(f"{LEAST},recompact_every=32")
    assert Plan.of(again, 383, 16) is None
    held = Plan.of(again, 384, 16)
    assert Plan.of(again, 416, 16, held) == Plan(384, 24, 6), "of 6 + 2 blocks two are freed"
    assert Plan.of(parse(f"{LEAST},when=streaming"), 80, 16) == Plan(48, 3, 1)


@pytest.mark.parametrize("least", [1, 100, 256, 1000])
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("options", ["", ",recompact_every=40", ",when=streaming,recompact_every=100"])
def test_a_request_is_ever_compacted_if_it_is_at_one_of_its_points(budget, options, least):
    config = parse(f"snapkv:budget={budget},min_freed_tokens={least}{options}")
    seen = set()
    for num_prompt in range(1, 3000, 71):
        for num_tokens in (num_prompt + 1, num_prompt + 90, num_prompt + 800):
            # Points that are computed before its last step; the last token is never computed.
            point, points = None, []
            while (point := next_point(config, num_prompt, point)) is not None and point <= num_tokens - 2:
                points.append(point)
            compacted = any(Plan.of(config, point, 16) for point in points)
            assert is_ever_compacted(config, num_prompt, num_tokens, 16) == compacted
            seen.add(compacted)
    assert seen == {False, True}


def test_sinks_and_the_limit_of_tokens_bound_what_is_kept():
    assert Plan.of(parse("snapkv:budget=0.01,sink_tokens=33"), 1632, 16).kept_blocks == 3
    assert Plan.of(parse("snapkv:budget=0.5,max_tokens_kept=64"), 1632, 16).kept_blocks == 4
    assert Plan.of(parse("snapkv:budget=0.5,max_tokens_kept=5,sink_tokens=4"), 1632, 16).kept_blocks == 1


@pytest.mark.parametrize(
    "options, points",
    [
        ("", [100, None]),
        (",recompact_every=30", [100, 130, 160, 190]),
        (",when=streaming,recompact_every=30", [30, 60, 90, 100, 130, 160]),
        (",when=streaming,recompact_every=50", [50, 100, 150]),
        (",when=streaming", [100, 1124]),
    ],
)
def test_compaction_points_depend_on_the_prompt_alone(options, points):
    config, found, point = parse(f"snapkv:budget=0.25{options}"), [], None
    for _ in points:
        found.append(point := next_point(config, 100, point))
    assert found == points


def test_what_a_request_holds_at_most():
    assert peak_blocks(parse("snapkv:budget=0.25"), 100, 161, 16) == 11
    assert peak_blocks(parse("snapkv:budget=0.25,when=streaming,enabled=false"), 100, 161, 16) == 11
    # 125 blocks, an eighth of them 16, and 128 + 32 raw tokens between boundaries: 10, and two edges.
    streaming = parse("snapkv:budget=0.125,when=streaming,recompact_every=128")
    assert peak_blocks(streaming, 1000, 2000, 16) == 16 + 10 + 2
    assert peak_blocks(streaming, 1000, 300, 16) == 3 + 12
    assert peak_blocks(streaming, 100, 160, 16) == 10, "never more than all of it"
    again = parse("snapkv:budget=0.125,recompact_every=128")
    assert peak_blocks(again, 1000, 2000, 16) == 63, "the whole prompt is held before it is compacted"
    assert peak_blocks(again, 100, 2000, 16) == 28
    patient = parse("snapkv:budget=0.125,recompact_every=128,min_freed_tokens=256")
    assert peak_blocks(patient, 100, 2000, 16) == 28 + 15, "it grows until 16 blocks are freed, not one"
    assert peak_blocks(parse(f"{LEAST},when=streaming"), 1000, 2000, 16) == 32 + 66 + 2


def test_a_ring_holds_the_window_and_what_drafts_may_overwrite():
    assert ring_tokens(parse("snapkv:window=32")) == 64
    assert ring_tokens(parse("snapkv:window=100")) == 132
    assert ring_tokens(parse("knorm")) == 0
    assert ring_tokens(parse("attention_matching")) == 0
    assert ring_tokens(parse("attention_matching:recompact_every=64")) == 64 + 64, "and what is recalled"
    assert ring_tokens(parse("attention_matching:recompact_every=64,recalled=10")) == 64 + 10


def test_moments_of_all_queries_take_the_memory_of_some():
    assert moment_tokens(128, 2) == 4 * 34 * 2 and moment_tokens(80, 4) == 3 * 34
    expected = parse("expected_attention")
    assert ring_tokens(expected, 272) == ring_tokens(parse("criticalkv:base=expected_attention"), 272) == 272
    assert ring_tokens(parse("snapkv:window=32"), 272) == 64 and ring_tokens(parse("h2o"), 272) == 0
    assert ring_budget(expected, 8, 10**6, 2, 272) == 8 * 272
    noted = {method: ring_tokens(parse(method), 272, 9) for method in ("h2o", "kvzip", "snapkv", "knorm")}
    assert noted == {"h2o": 9, "kvzip": 9, "snapkv": ring_tokens(parse("snapkv")), "knorm": 0}
    assert ring_tokens(expected, 272, 9) == 272 and ring_tokens(parse("attention_matching"), 272, 9) == 0
    assert ring_budget(parse("expected_attention:recompact_every=9"), 99, 10**9, 2, 272) == 99 * 272


def test_memory_for_rings():
    prompt, again = parse("snapkv"), parse("snapkv:recompact_every=100")
    roomy = 1 << 30
    assert ring_budget(prompt, 8, roomy, 2) == 8 * 64
    assert ring_budget(prompt, 256, roomy, 2) == 32 * 64, "some prompts at a time"
    assert ring_budget(again, 256, roomy, 2) == 256 * 64, "rings that last as long as their requests"
    assert ring_budget(parse("snapkv:window=100"), 8, roomy, 2) == 8 * 132
    assert ring_budget(parse("knorm"), 8, roomy, 2) == 8 * 64, "a request may ask for another method"
    assert ring_budget(prompt, 256, 4000, 4) == 4000 // 8 * 2 // 4


# ---------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("form", "num_tokens", "block_size", "in_page", "expected"),
    [
        # 41 blocks of 32 and a window of 32: 1,312 tokens in 14 pages of 96, of any head.
        ("kivi", 1344 + 5, 32, 96, (1312, 41, 14)),
        # A page of 48 tokens where raw ones have 16: the boundary is a multiple of 32.
        ("kivi", 1344 - 10, 16, 48, (1280, 80, 27)),
        ("kivi:budget=0.25", 1344, 32, 96, (1312, 41, 11)),
        ("kivi:budget=0.9", 1344, 32, 96, (1312, 41, 14)),
        ("snapkv+kivi4", 1344, 32, 96, (1312, 41, 11)),
        ("snapkv+kivi4:max_tokens_kept=200", 1344, 32, 96, (1312, 41, 2)),
        ("kivi:sink_tokens=100", 1344, 32, 640, (1312, 41, 3)),
        ("kivi:min_freed_tokens=256", 200, 32, 96, None),  # 5 blocks become 2: less than 256 tokens are freed
    ],
)
def test_with_a_format_bytes_hold_more_tokens(form, num_tokens, block_size, in_page, expected):
    plan = Plan.of(parse(form), num_tokens, block_size, page_tokens=in_page)
    assert (plan and (plan.boundary, plan.source_blocks, plan.kept_blocks)) == expected


def test_with_a_format_a_later_compaction_adds_what_was_raw():
    config = parse("kivi")
    first = Plan.of(config, 1344, 32, page_tokens=96)
    later = Plan.of(config, 1344 + 128, 32, first, page_tokens=96)
    assert (later.source_blocks, later.kept_blocks) == (45, 15)
    assert Plan.of(config, 1344 + 20, 32, first, page_tokens=96) is None


def test_tokens_of_a_page_are_counted_in_whole_records():
    assert page_tokens(parse("snapkv"), 32, 32, 64, 2) is None
    # Codes of 32 tokens, scale and zero of 64 channels, and of two groups of each token's value.
    record = 2 * 32 * 64 // 2 + 4 * 64 + 4 * 2 * 32
    assert page_tokens(parse("kivi"), 32, 32, 64, 2) == 2 * 32 * 64 * 2 // record * 32 == 96
    assert page_tokens(parse("kivi"), 128, 128, 64, 2) == 2 * 128 * 64 * 2 // record * 32 == 384
    assert page_tokens(parse("kivi"), 288, 32, 64, 2) == 9 * 96, "of nine small pages"
    assert page_tokens(parse("kivi+kivi8"), 16, 16, 128, 2) == 0


@pytest.mark.parametrize("block_size", [16, 24, 32, 48])
def test_with_a_format_no_request_holds_more_than_its_peak(block_size):
    config = parse("kivi:when=streaming,recompact_every=100")
    held, in_page, most = None, 3 * block_size // 32 * 32, 0
    for computed in range(1, 2000):
        blocks = -(-computed // block_size)
        raw = blocks - held.source_blocks + held.kept_blocks if held else blocks
        most = max(most, raw)
        assert raw <= peak_blocks(config, 2000, 2001, block_size, page_tokens=in_page), computed
        if computed % 100 == 0 and (plan := Plan.of(config, computed, block_size, held, in_page)):
            assert plan.boundary % 32 == 0
            held = plan
    assert most < 2000 // block_size


@pytest.mark.parametrize(
    "options",
    ["", ",max_tokens_kept=300", ",sink_tokens=2000", ",budget=0.1,sink_tokens=1000", ",budget=0.9"],
)
def test_with_a_format_no_more_is_planned_than_there_is(options):
    for num_tokens in range(100, 3000, 100):
        config = parse(f"kivi:min_freed_tokens=1{options}")
        plan = Plan.of(config, num_tokens, 32, page_tokens=96)
        if plan is not None:
            everything = -(-plan.boundary // 96)
            assert plan.kept_blocks <= everything
            assert not config.keeps_all or plan.kept_blocks == everything


def test_a_bound_without_a_budget_prunes():
    config = parse("kivi:max_tokens_kept=300")
    assert not config.keeps_all and config.build_policy().name == "kv_compress"
    assert Plan.of(config, 3000, 32, page_tokens=96).kept_blocks == 3
