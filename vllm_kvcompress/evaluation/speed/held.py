"""Blocks that requests hold over time: a long output, and a prompt larger than the pool."""

import argparse
from typing import Any

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.evaluation.host import engine_dtype
from vllm_kvcompress.plan import peak_blocks

EVERY = 256  # tokens between two compactions
KEPT = 512  # tokens that a head keeps on average
ENGINE_WIDE = {"when": "streaming", "recompact_every": EVERY, "max_tokens_kept": KEPT, "budget": 1.0}
PROMPT, ANSWER = 256, 64  # tokens before the long output, and behind the long prompt


def longest_request(arguments: argparse.Namespace) -> int:
    """Tokens of the longest request."""
    return max(arguments.long_prompt + ANSWER, PROMPT + arguments.long_output)


def check_pool(arguments: argparse.Namespace) -> None:
    """Refuse a pool that is too small for what a request holds between two compactions.

    Raises:
        KVCompressionError: with the least `--long-prompt`.
    """
    config = KVCompressionConfig.parse(arguments.compression).for_request(ENGINE_WIDE)
    longest = longest_request(arguments)
    needed = peak_blocks(config, arguments.long_prompt, longest, arguments.block_size)
    if needed > _pool(arguments):
        raise KVCompressionError(
            f"--long-prompt {arguments.long_prompt} makes a pool of {_pool(arguments)} blocks, and a request "
            f"holds up to {needed}; use at least {3 * needed * arguments.block_size}"
        )


def _pool(arguments: argparse.Namespace) -> int:
    """Blocks of the pool, a third of the long prompt's."""
    return arguments.long_prompt // arguments.block_size // 3


def measure_blocks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Generate a long output and serve a prompt larger than the pool, counting blocks after every step.

    The method is that of `--compression`, streaming, with `EVERY` and `KEPT`. The pool is a third of
    the longer prompt. Stock vLLM is started on the same pool to show what it says.
    """
    import torch
    from tqdm import tqdm
    from vllm import LLM

    torch.compiler.set_stance("force_eager")
    config = KVCompressionConfig.parse(arguments.compression).for_request(ENGINE_WIDE)
    longest = longest_request(arguments)
    block_size = arguments.block_size
    options = dict(
        model=arguments.model,
        dtype=engine_dtype(),
        enforce_eager=True,
        max_model_len=longest,
        block_size=block_size,
        num_gpu_blocks_override=_pool(arguments) + 1,  # one is vLLM's null block
        seed=0,
        disable_log_stats=True,
    )
    try:
        LLM(**options)
        refusal = None
    except ValueError as error:
        refusal = str(error).strip().splitlines()[-1]
    llm = LLM(**options, **config.engine_kwargs())
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    usable = pool.get_num_free_blocks()
    runs = {"output": (PROMPT, arguments.long_output), "prompt": (arguments.long_prompt, ANSWER)}
    result: dict[str, Any] = {"pool_blocks": usable, "stock_says": refusal, "block_size": block_size}
    for name, (prompt, output) in runs.items():
        with tqdm(total=prompt + output, desc=f"long {name}") as bar:
            result[name] = {"prompt": prompt, "held": _held(llm, usable, prompt, output, bar)}
    result["options"] = ENGINE_WIDE
    return result


def _held(llm, usable: int, num_prompt: int, num_output: int, bar) -> list[tuple[int, int]]:
    """Pairs of tokens computed and blocks taken from the pool, after every step of one request."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    prompt = [position * 104729 % 40000 + 100 for position in range(num_prompt)]
    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
    engine.add_request("long", {"prompt_token_ids": prompt}, params)
    held = []
    while engine.has_unfinished_requests():
        engine.step()
        for request in scheduler.requests.values():
            held.append((request.num_computed_tokens, usable - pool.get_num_free_blocks()))
            bar.update(request.num_computed_tokens - bar.n)
    assert pool.get_num_free_blocks() == usable
    return held
