"""Each engine core's pool is its own; a front end knows the sum of those that it talks to."""

from types import SimpleNamespace

import pytest

from vllm_kvcompress.paging.repetition import Repetitions, longest_repetition
from vllm_kvcompress.plugin import blocks_of_an_engine


def configured(num_blocks: int, max_model_len: int = 100_000, watermark: float = 0.0, **parallel):
    defaults = dict(
        data_parallel_size=1,
        data_parallel_size_local=1,
        data_parallel_rank_local=None,
        local_engines_only=False,
    )
    return SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=num_blocks, block_size=32),
        model_config=SimpleNamespace(max_model_len=max_model_len),
        scheduler_config=SimpleNamespace(watermark=watermark),
        parallel_config=SimpleNamespace(**defaults | parallel),
        additional_config={},
    )


@pytest.mark.parametrize(
    "parallel, engines",
    [
        ({}, 1),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2}, 4),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2, "local_engines_only": True}, 2),
        ({"data_parallel_size": 4, "data_parallel_rank_local": 1}, 1),
    ],
)
def test_a_front_end_knows_the_blocks_of_one_engine(parallel, engines):
    assert blocks_of_an_engine(configured(1000 * engines, **parallel)) == 1000
    assert blocks_of_an_engine(configured(None, **parallel)) == 0


def test_a_repetition_in_an_engine_core_is_as_long_as_its_own_pool_allows():
    config = configured(101, data_parallel_size=4, data_parallel_size_local=4)
    owner = SimpleNamespace(
        request_id="r",
        prompt_token_ids=list(range(1600)),
        client_index=0,
        arrival_time=0.0,
        lora_request=None,
        priority=0,
    )
    repetitions = Repetitions(config)
    repetitions._encode = lambda text: [1] * 10
    repeating = repetitions.next_part(
        owner, SimpleNamespace(build_policy=lambda: SimpleNamespace(chunk=9999, study_tokens=0))
    )
    # 100 blocks, of which the context has 50: what is asked and one answered token take some of the rest.
    assert repeating.num_prompt_tokens == 1600 + 50 * 32 - 1


@pytest.mark.parametrize(
    "num_context, num_blocks, watermark, longest",
    [
        (1600, 101, 0.0, 50 * 32),
        (1601, 101, 0.0, 49 * 32 - 1),  # the context's last block is copied
        (1600, 101, 0.1, 40 * 32),  # whole blocks of the watermark
        (99_000, 0, 0.0, 1000),  # the pool is not known yet
        (99_000, 10_000, 0.0, 1000),  # the model's length
    ],
)
def test_a_repetition_leaves_the_owner_and_the_watermark_their_blocks(
    num_context, num_blocks, watermark, longest
):
    config = configured(num_blocks, watermark=watermark)
    assert longest_repetition(config, num_context, num_blocks) == longest
