"""What a configuration means in tokens and blocks, against figures worked out by hand."""

import pytest

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.plan import Plan, next_point, peak_blocks, ring_budget, ring_tokens


def parse(text: str) -> KVCompressionConfig:
    return KVCompressionConfig.parse(text)


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


def test_a_ring_holds_the_window_and_what_drafts_may_overwrite():
    assert ring_tokens(parse("snapkv:window=32")) == 64
    assert ring_tokens(parse("snapkv:window=100")) == 132
    assert ring_tokens(parse("knorm")) == 0


def test_memory_for_rings():
    prompt, again = parse("snapkv"), parse("snapkv:recompact_every=100")
    roomy = 1 << 30
    assert ring_budget(prompt, 8, roomy, 2) == 8 * 64
    assert ring_budget(prompt, 256, roomy, 2) == 32 * 64, "some prompts at a time"
    assert ring_budget(again, 256, roomy, 2) == 256 * 64, "rings that last as long as their requests"
    assert ring_budget(parse("snapkv:window=100"), 8, roomy, 2) == 8 * 132
    assert ring_budget(parse("knorm"), 8, roomy, 2) == 8 * 64, "a request may ask for another method"
    assert ring_budget(prompt, 256, 4000, 4) == 4000 // 8 * 2 // 4
