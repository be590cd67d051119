"""Rows of the table: the full cache, methods at budgets, stock vLLM's own quantized caches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from vllm_kvcompress import profiles
from vllm_kvcompress.config import METHODS, MOST_VALUE, KVCompressionConfig, KVCompressionError

FULL = "off"  # the full cache, as a request asks for it
# What a method does to a prompt is measured however short the prompt is, and however many are compacted in a
# step: who waited for its turn would answer its first tokens from raw context.
EVERY_PROMPT = KVCompressionConfig(min_freed_tokens=1, max_compaction_tokens=MOST_VALUE)
ROOM = 320  # tokens that a repetition needs beside the context and itself, and at least
STOCK = "stock:"  # before a `--kv-cache-dtype` of stock vLLM


@dataclass(frozen=True)
class Variant:
    """One row of the table: `off`, or what `--kv-compression` would be given."""

    spec: str
    label: str = "full cache"
    budget: float | None = None


def variants(methods: Sequence[str], budgets: Sequence[float]) -> list[Variant]:
    """The full cache, then each method at each budget, or at its own.

    Raises:
        KVCompressionError: a method or an option of it is wrong.
    """
    rows = [Variant(FULL)]
    for method in methods:
        if "budget=" in method:
            rows.append(Variant(method, method, KVCompressionConfig.parse(method).budget))
            continue
        for budget in budgets:
            spec = f"{method}{',' if ':' in method else ':'}budget={budget:g}"
            KVCompressionConfig.parse(spec)
            rows.append(Variant(spec, method, budget))
    return rows


def served_by(specs: Sequence[str]) -> KVCompressionConfig:
    """What an engine is started with so that it serves all of these.

    A request may name no file with a head profile but the server's own, so that one is the engine's; and the
    method that it is of is none of theirs, from which they would inherit it.

    Raises:
        KVCompressionError: they name several files.
    """
    named = {KVCompressionConfig.named_files(spec)[0] for spec in specs} - {"", *profiles.included()}
    if not named:
        return EVERY_PROMPT
    if len(named) > 1:
        raise KVCompressionError(f"one engine serves one head profile; choose of {', '.join(sorted(named))}")
    theirs = {KVCompressionConfig.parse(spec).method for spec in specs}
    method = next(name for name in METHODS if name not in theirs)
    return replace(EVERY_PROMPT, method=method, allocation=f"profile:{named.pop()}")


def behind(specs: Iterable[str]) -> int:
    """Tokens that a context must have behind each prompt: some, if one of these has prompts repeated.

    It is what the engine asks for of whoever has its prompt repeated, whatever its output.
    """
    from vllm_kvcompress.paging.repetition import LEAST

    return LEAST if any(KVCompressionConfig.parse(spec).repeats for spec in specs) else 0


def max_model_len(longest: int, limit: int, specs: Iterable[str]) -> int:
    """Of an engine, so that prompts are repeated in parts as long as in the whole context of the model.

    Args:
        longest: tokens of the longest request.
        limit: tokens of the model's context.
        specs: what requests are compacted by.
    """
    return min(limit, 2 * longest + ROOM) if behind(specs) else longest


def split_methods(given: str) -> list[str]:
    """`"adakv,snapkv:allocation=global,window=16"` as two methods."""
    methods: list[str] = []
    for part in given.split(","):
        goes_on = part[:1].isdigit() or part[:1] == "."  # a list, of a ladder's numbers
        if methods and (goes_on or "=" in part.partition(":")[0]):  # an option's value may have a colon
            methods[-1] += "," + part
        elif part:
            methods.append(part)
    return methods


def baselines(given: str) -> list[Variant]:
    """Rows of stock vLLM with a quantized cache, `fp8` or another `--kv-cache-dtype`.

    Raises:
        KVCompressionError: vLLM has no such cache.
    """
    from vllm.config.cache import CacheDType

    for dtype in filter(None, given.split(",")):
        if dtype not in get_args(CacheDType):
            raise KVCompressionError(f"--baselines takes {', '.join(get_args(CacheDType))}, got {dtype!r}")
    return [Variant(f"{STOCK}{dtype}", f"stock, {dtype} cache") for dtype in filter(None, given.split(","))]
