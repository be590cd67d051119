"""A float8 cache of several groups, whose layers are in the same places by scales of their own."""

import pytest
from test_float8 import (
    KEY_SCALES,
    OPTIONS,
    assert_same,
    stock,  # noqa: F401 (a fixture)
)
from test_groups_v2 import model  # noqa: F401 (a fixture)

METHODS = [
    "off",
    "kv_compress:budget=0.4,window=8",
    "snapkv:budget=0.3,window=8,recompact_every=3",
    "h2o:budget=0.3,window=8",
]


@pytest.fixture(scope="module")
def engines(model, start_engine):  # noqa: F811
    """One with a float8 cache, one with a plain one of the same numbers."""
    return [start_engine(model, "v2", "gpu", kv_cache_dtype=kind, **OPTIONS) for kind in ("fp8", "auto")]


def test_same_kept_tokens_and_same_answers_as_a_plain_cache_of_the_same_numbers(engines):
    cache = engines[0].worker.compactor.cache
    assert cache.grid.slots == (0, 0, 1) and len(set(KEY_SCALES[:5:2])) == 3
    assert cache.float8.key_scales.tolist() == list(KEY_SCALES[:5:2]), "of the layers of full attention"
    assert_same(engines, METHODS)
