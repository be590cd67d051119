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
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    left = num_tokens * dtype.itemsize // model.dtype.itemsize
    # What is left is seven eighths of the memory, or more.
    return ring_budget(config, num_requests, left * 8 // 7, group, of_moments(vllm_config))


def of_moments(vllm_config: VllmConfig) -> int:
    """Queries that take as much memory as the moments of all queries of a request."""
    model = vllm_config.model_config
    return moment_tokens(model.get_head_size(), model.dtype.itemsize)


class Rings:
    """Counts the queries that are kept, so that nobody starts for whose there is no memory.

    Attributes:
        budget: queries that there may be; moments of all of them count as the queries that take as much.
        taken: queries that are kept of running requests.
    """

    def __init__(self, budget: float, of_moments: int) -> None:
        self.budget = budget
        self._of_moments = of_moments
        self.taken = 0
        self._awaited = False  # in this step somebody was refused one

    def begin_step(self, running: Iterable[Tracked]) -> None:
        """Count anew."""
        self.taken = sum(
            ring_tokens(tracked.config, self._of_moments)
            for tracked in running
            if tracked.held is None or tracked.config.compacts_again
        )
        self._awaited = False

    def start(self, config: KVCompressionConfig) -> bool:
        """Count in the query ring of a request that is about to start, if there is memory for it."""
        needed = ring_tokens(config, self._of_moments)
        # Nobody who needs a ring overtakes one that waits for one. Who needs none may go on, where vLLM looks
        # past a request that cannot start (0.33; in 0.32 all behind it wait): it takes nothing of rings away.
        if needed and self.taken and self.taken + needed > self.budget:
            self._awaited = True
        if needed and self._awaited:
            return False
        self.taken += needed
        return True
