"""Memory for what is kept of running requests' queries, which the workers have set aside."""

import math
from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.tracked import Tracked
from vllm_kvcompress.plan import moment_tokens, ring_budget, ring_tokens


def memory_for_rings(
    vllm_config: VllmConfig,
    config: KVCompressionConfig,
    num_requests: int,
    num_tokens: int,
    dtype: torch.dtype,
) -> float:
    """Queries for which the workers have set memory aside; host memory is not counted.

    Args:
        vllm_config: of the engine.
        config: the server's options.
        num_requests: that run at a time, at most.
        num_tokens: that the pool holds.
        dtype: of keys and values in it.
    """
    if current_platform.is_cpu():
        return math.inf
    left = num_tokens * dtype.itemsize // vllm_config.model_config.dtype.itemsize
    # What is left is seven eighths of the memory, or more.
    return ring_budget(config, num_requests, left * 8 // 7, _group(vllm_config), of_moments(vllm_config))


def _group(vllm_config: VllmConfig) -> int:
    """Query heads of each KV head."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)


def of_moments(vllm_config: VllmConfig) -> int:
    """Queries that take as much memory as the moments of all queries of a request."""
    model = vllm_config.model_config
    return moment_tokens(model.get_head_size(), model.dtype.itemsize)


def columns_of_query(vllm_config: VllmConfig) -> int:
    """Tokens of which a KV head's float32 numbers take as much memory as a query of its group."""
    model = vllm_config.model_config
    return _group(vllm_config) * model.get_head_size() * model.dtype.itemsize // 4


class Rings:
    """Counts the queries that are kept, so that nobody starts for whose there is no memory.

    Attributes:
        budget: queries that there may be; moments of all of them, and numbers that policies keep of each
            token, count as the queries that take as much.
        taken: queries that are kept of running requests.
    """

    def __init__(self, budget: float, vllm_config: VllmConfig, engine: KVCompressionConfig) -> None:
        self.budget = budget
        self._of_moments = of_moments(vllm_config)
        self._columns = columns_of_query(vllm_config)
        # Which have their place beside the pages.
        self._keeps_sums = engine.kept_in_graphs(vllm_config.speculative_config is not None) == "sums"
        self.taken = 0
        self._awaited = False  # in this step somebody was refused one

    def begin_step(self, running: Iterable[tuple[Tracked, int]]) -> None:
        """Count anew; of requests and their tokens."""
        self.taken = sum(
            self._needed(tracked.config, num_tokens)
            for tracked, num_tokens in running
            if tracked.held is None or tracked.config.compacts_again
        )
        self._awaited = False

    def _needed(self, config: KVCompressionConfig, num_tokens: int) -> int:
        if self.budget == math.inf:
            return 0
        kept = self._keeps_sums and config.build_policy().sums is not None
        return ring_tokens(config, self._of_moments, 0 if kept else -(-num_tokens // self._columns))

    def start(self, config: KVCompressionConfig, num_tokens: int) -> bool:
        """Count in what is kept of a request of so many tokens that is about to start, if there is memory."""
        needed = self._needed(config, num_tokens)
        # Nobody who needs a ring overtakes one that waits for one. Who needs none may go on, where vLLM looks
        # past a request that cannot start (0.33; in 0.32 all behind it wait): it takes nothing of rings away.
        if needed and self.taken and self.taken + needed > self.budget:
            self._awaited = True
        if needed and self._awaited:
            return False
        self.taken += needed
        return True
