"""The same methods in NVIDIA kvpress on Hugging Face transformers: what ours is compared with.

Same prompts, same number of tokens kept. The plugin leaves the prompt's tail raw and keeps whole blocks below
it; kvpress keeps `int(P * (1 - compression_ratio))` of a prompt's P tokens, the tail among them. So:

    boundary = floor((P - window) / block) * block
    kept     = ceil(budget * boundary / block) * block + (P - boundary)      `kept_tokens`
    ratio    = 1 - (kept + 1/2) / P                                          `compression_ratio`

where the half makes `int` give exactly `kept` however the division rounds. A prompt too short to free a block
is left alone by both. `kept` is every head's number with SnapKV and StreamingLLM, a layer's mean with Ada-KV.

Deliberate differences, kvpress 0.5.5 being used as it is:

- Pooling. kvpress has average pooling only; its default kernel is 5 and its default window 64, here ours (7
  and 32) are passed. Ours pools with max unless told otherwise: compare it with `matching_config`. Both
  averages count the zero padding.
- Averaging. kvpress takes the mean over the window's queries, ours the sum: the same order. Both take the
  mean over the group, which after average pooling is the same as before it.
- Arithmetic. kvpress's window logits are products in the model's dtype, scaled by 1/sqrt(d) and without a
  soft cap, and their float32 softmax is rounded to the model's dtype: in bfloat16 many scores tie. Ours are
  float32 with the layer's own scale and cap.
- Forced tokens. kvpress's SnapKV and Ada-KV always keep the last `window` tokens only; ours keeps all from
  the boundary on, up to `block - 1` more, which compete in kvpress. kvpress forces sinks in StreamingLLM
  only, ours in every method unless `sink_tokens` is 0. With StreamingLLM both keep the very same tokens.
- Ada-KV's shares. kvpress guarantees each head the best `int(0.2 * kept)` of its tokens and lets the layer's
  heads compete for the rest token by token, the window competing too (and always winning). Ours gives a head
  (1 - 0.2) * (tokens won) + 0.2 * mean, rounded to whole pages, the tail being outside the budget.
- Ada-KV's memory. kvpress only masks: the cache keeps every key and value, and in each later step the pruned
  keys are overwritten with one whose weight should underflow to 0. Its `kv_bytes` are the full cache's.
- Ties. kvpress takes what `torch.topk` returns, ours the earlier token.
- Question after the document. One uncompressed forward pass, as in kvpress's own pipeline; our engine is fed
  it token by token. Ada-KV is, too: the key it masks with must point away from all queries of a step at
  once, which for a question's many queries may not exist, and kvpress then raises.
- Serving. transformers runs one request at a time, the prompt in one pass and attention by SDPA. In both,
  tokens keep their logical positions and the prompt itself is read with the full cache.

kvpress 0.5.5 asks for transformers < 5.3. Later versions no longer pass `cache_position` to the attention
layers, where kvpress reads it; here it is passed along with the prompt, so that 5.19 works too.
"""

import contextlib
import functools
import importlib.metadata
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.evaluation.quality.samples import Sample, opening
from vllm_kvcompress.plan import Plan
from vllm_kvcompress.policies import SnapKV

Mode = Literal["inside", "after"]
MODES = ("inside", "after")
METHODS = ("full", "streaming_llm", "snapkv", "adakv")
WINDOW = SnapKV().window
KERNEL_SIZE = SnapKV().kernel_size
SINK_TOKENS = 4
ALPHA = 0.2


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
        mode: "inside": the whole prompt is compressed; "after": the document is, before the question is read.
        method: one of `METHODS`.
        budget: fraction kept below the boundary, as the plugin counts it; 1 for "full".
    """

    mode: Mode
    method: str
    budget: float = 1.0


def matching_config(method: str, budget: float, kernel_size: int = KERNEL_SIZE) -> KVCompressionConfig:
    """The plugin's configuration that is nearest to what kvpress does.

    Raises:
        KVCompressionError: kvpress is not run with that method here.
    """
    if method == "full":
        return KVCompressionConfig(enabled=False)
    if method not in METHODS:
        raise KVCompressionError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    if method == "streaming_llm":
        return KVCompressionConfig(method, budget, sink_tokens=SINK_TOKENS, window=WINDOW, min_freed_tokens=1)
    options: dict[str, Any] = {"pooling": "avg", "kernel_size": kernel_size}
    if method == "adakv":
        options["alpha"] = ALPHA
    return KVCompressionConfig(
        method, budget, sink_tokens=0, window=WINDOW, min_freed_tokens=1, options=options
    )


def kept_tokens(num_tokens: int, method: str, budget: float, block_size: int) -> int:
    """Tokens of a prompt that each head keeps (with Ada-KV: the mean of a layer's heads), tail included."""
    plan = Plan.of(matching_config(method, budget), num_tokens, block_size)
    if plan is None:
        return num_tokens
    return plan.kept_blocks * block_size + num_tokens - plan.boundary


def compression_ratio(num_tokens: int, num_kept: int) -> float:
    """The ratio with which kvpress's `int(num_tokens * (1 - ratio))` is exactly `num_kept`."""
    return 0.0 if num_kept >= num_tokens else 1 - (num_kept + 0.5) / num_tokens


def make_press(method: str, ratio: float, kernel_size: int = KERNEL_SIZE) -> Any:
    """kvpress's press of that method; None for "full".

    Raises:
        ModuleNotFoundError: kvpress is not installed.
        KVCompressionError: kvpress is not run with that method here.
    """
    if method not in METHODS:
        raise KVCompressionError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    if method == "full":
        return None
    try:
        from kvpress import AdaKVPress, SnapKVPress, StreamingLLMPress
    except ImportError as error:
        raise ModuleNotFoundError(
            "the kvpress comparison needs kvpress: "
            "pip install --no-deps kvpress==0.5.5 and, for it, fire==0.6.* and datasets"
        ) from error
    if method == "streaming_llm":
        return StreamingLLMPress(compression_ratio=ratio, n_sink=SINK_TOKENS)
    press = SnapKVPress(compression_ratio=ratio, window_size=WINDOW, kernel_size=kernel_size)
    return AdaKVPress(press, alpha_safeguard=ALPHA) if method == "adakv" else press


def generate(
    model_dir: str | Path,
    samples: Sequence[Sample],
    mode: Mode,
    method: str,
    budget: float,
    block_size: int = 32,
    dtype: str | torch.dtype = "auto",
    kernel_size: int = KERNEL_SIZE,
) -> list[dict[str, Any]]:
    """Answer samples greedily with transformers, the cache compressed by kvpress.

    Args:
        model_dir: checkpoint folder.
        samples: what to ask.
        mode: whether the question is compressed too ("inside") or read after the document is ("after").
        method: one of `METHODS`.
        budget: fraction kept below the boundary.
        block_size: the plugin's tokens per block, of which both boundary and budget are multiples.
        dtype: the model's; "auto" for the checkpoint's own.
        kernel_size: pooling width of SnapKV and Ada-KV.

    Returns:
        Per sample: `prediction`; `prompt_tokens` that were compressed; `kept_fraction` of them that are still
        attended to; `kv_bytes` that the cache holds after compression and `kv_bytes_full` without;
        `prefill_seconds` with compression; `question_seconds` (None inside); `decode_seconds` per token after
        the first (None if there is none); `peak_rss_bytes` of the process, weights included (None where the
        system does not tell).

    Raises:
        ModuleNotFoundError: kvpress is not installed.
        KVCompressionError: an unknown mode or method; or kvpress's Ada-KV found no key to mask with.
    """
    if mode not in MODES:
        raise KVCompressionError(f"unknown mode {mode!r}; use one of {', '.join(MODES)}")
    make_press(method, 0.0, kernel_size)  # mistakes are told before the model is loaded
    model, tokenizer = _load(str(model_dir), str(dtype).removeprefix("torch."))
    rows = []
    for sample in samples:
        # Tokenized apart, as for the plugin, so that the question does not change the document's last token.
        prompt = opening(tokenizer, sample.document)
        question = tokenizer.encode(sample.question, add_special_tokens=False)
        if mode == "inside":
            prompt, question = prompt + question, []
        kept = kept_tokens(len(prompt), method, budget, block_size)
        press = make_press(method, compression_ratio(len(prompt), kept), kernel_size)
        rows.append(_answer(model, tokenizer, sample, prompt, question, press))
    return rows


def compare(
    model_dir: str | Path,
    samples: Sequence[Sample],
    variants: Sequence[Variant],
    block_size: int = 32,
    dtype: str | torch.dtype = "auto",
    kernel_size: int = KERNEL_SIZE,
) -> dict[str, Any]:
    """Quality, memory and speed of kvpress, as plain values for JSON, to be put next to the plugin's.

    Returns:
        The settings and, under `variants`, one entry each: `accuracy` with its `standard_error`, `by_task`,
        the means over samples of what `generate` measures, `masked_only` where nothing is freed although
        tokens are dropped, and the `samples` themselves with their `score`.

    Raises:
        ModuleNotFoundError: kvpress is not installed.
        KVCompressionError: there are no samples, or a variant is wrong.
    """
    if not samples:
        raise KVCompressionError("nothing to compare: samples is empty")
    results = []
    for variant in variants:
        rows = generate(
            model_dir,
            samples,
            variant.mode,
            variant.method,
            variant.budget,
            block_size,
            dtype,
            kernel_size,
        )
        tasks: dict[str, list[float]] = {}
        for sample, row in zip(samples, rows, strict=True):
            row["score"] = float(sample.metric(row["prediction"], sample.answers))
            row |= {"task": sample.task, "id": sample.id, "length": sample.length, "depth": sample.depth}
            tasks.setdefault(sample.task, []).append(row["score"])
        scores = [row["score"] for row in rows]
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
        results.append(
            {
                "mode": variant.mode,
                "method": variant.method,
                "budget": variant.budget,
                "accuracy": statistics.fmean(scores),
                "standard_error": error,
                "by_task": {task: statistics.fmean(values) for task, values in tasks.items()},
                **{name: _mean([row[name] for row in rows]) for name in _MEASURED},
                "masked_only": variant.method == "adakv",
                "samples": rows,
            }
        )
    return {
        "kvpress": _version("kvpress"),
        "transformers": _version("transformers"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": Path(model_dir).name,
        "dtype": str(_load(str(model_dir), str(dtype).removeprefix("torch."))[0].dtype),
        "block_size": block_size,
        "window": WINDOW,
        "kernel_size": kernel_size,
        "variants": results,
    }


def attended_tokens(model: Any, cache: Any) -> Tensor:
    """Tokens of each head that later queries will attend to, right after a prompt was compressed.

    Returns:
        `[L, H]` int64.
    """
    counts = []
    for layer, decoder in zip(cache.layers, model.model.layers, strict=True):
        _, heads, held, _ = layer.keys.shape
        count = torch.full((heads,), held)
        masked = getattr(decoder.self_attn, "masked_key_indices", None)  # (batch, head, token) of Ada-KV
        if masked is not None:
            count -= torch.bincount(masked[1].cpu(), minlength=heads)
        counts.append(count)
    return torch.stack(counts)


_MEASURED = (
    "prompt_tokens",
    "kept_fraction",
    "kv_bytes",
    "kv_bytes_full",
    "prefill_seconds",
    "question_seconds",
    "decode_seconds",
    "peak_rss_bytes",
)


@functools.lru_cache(maxsize=1)
def _load(model_dir: str, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Not "eager": kvpress's Ada-KV refuses it.
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(model_dir)


@torch.inference_mode()
def _answer(
    model: Any, tokenizer: Any, sample: Sample, prompt: list[int], question: list[int], press: Any
) -> dict[str, Any]:
    from transformers import DynamicCache

    cache = DynamicCache()
    _reset_peak_rss()
    begin = time.perf_counter()
    with contextlib.nullcontext() if press is None else press(model):
        token = _step(model, cache, prompt, 0)
    prefill_seconds = time.perf_counter() - begin

    attended = attended_tokens(model, cache)
    kv_bytes, token_bytes = 0, 0
    for layer in cache.layers:
        for held in (layer.keys, layer.values):
            kv_bytes += held.untyped_storage().nbytes()
            token_bytes += held[:, :, :1].numel() * held.element_size()

    # Not the cache's length but the logical position, which compression does not change.
    position = len(prompt)
    question_seconds = None
    if question:
        masked = any(getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers)
        size = 1 if masked else len(question)
        begin = time.perf_counter()
        for start in range(0, len(question), size):
            token = _step(model, cache, question[start : start + size], position + start)
        question_seconds = time.perf_counter() - begin
        position += len(question)

    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answer, text, steps, decode_seconds = [token], "", 0, 0.0
    while True:
        text, stopped = _cut(tokenizer.decode(answer, skip_special_tokens=True), sample.stop)
        if stopped or answer[-1] in ends or len(answer) >= sample.max_tokens:
            break
        begin = time.perf_counter()
        answer.append(_step(model, cache, answer[-1:], position))
        decode_seconds += time.perf_counter() - begin
        position += 1
        steps += 1
    return {
        "prediction": text,
        "prompt_tokens": len(prompt),
        "kept_fraction": float(attended.float().mean()) / len(prompt),
        "kv_bytes": kv_bytes,
        "kv_bytes_full": token_bytes * len(prompt),
        "prefill_seconds": prefill_seconds,
        "question_seconds": question_seconds,
        "decode_seconds": decode_seconds / steps if steps else None,
        "peak_rss_bytes": _peak_rss(),
    }


def _step(model: Any, cache: Any, tokens: list[int], position: int) -> int:
    """Run tokens from a logical position on, and return the greedy next one."""
    positions = torch.arange(position, position + len(tokens), device=model.device)
    # kvpress's hook knows the prompt by this argument, which transformers no longer passes by itself.
    prompt = {} if position else {"cache_position": positions}
    output = model(
        input_ids=torch.tensor([tokens], device=model.device),
        position_ids=positions[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **prompt,
    )
    return int(output.logits[0, -1].argmax())


def _cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    found = [at for end in stop if (at := text.find(end)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _reset_peak_rss() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # makes VmHWM start again from what is resident now


def _peak_rss() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
