"""vLLM's engine core for a model, its worker and its block managers, but neither weights nor a cache.

It tells what is compacted and what a pool holds.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from pydantic import ValidationError
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.utils import extract_layer_index
from vllm.plugins import load_general_plugins
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from vllm_kvcompress.config import METHODS, KVCompressionConfig, KVCompressionError
from vllm_kvcompress.evaluation.findings import Finding, Held, LayerGroup
from vllm_kvcompress.paging.spec import CompactableLatentSpec, CompactableSpec, compactable_groups
from vllm_kvcompress.plan import Plan, is_ever_compacted, next_point
from vllm_kvcompress.requests.layers import DRAFTS_LACK
from vllm_kvcompress.support import check_method
from vllm_kvcompress.worker.worker import CompressionWorker, lacks_of_shape, owner_of

WITHOUT_WEIGHTS = "kv_compression_without_weights"
OF_WEIGHTS = {  # what policies may need and only the loaded model tells
    "needs_rotary": "its rotary position embedding",
    "needs_output_projection": "its output projection",
}


class _Parser(FlexibleArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise KVCompressionError(f"{message} (of `vllm serve`)")


@register_model_loader(WITHOUT_WEIGHTS)
class _LoaderOfNothing(BaseModelLoader):
    """Makes a model whose parameters have a shape and no content."""

    def download_model(self, model_config: ModelConfig) -> None:
        raise NotImplementedError

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        raise NotImplementedError

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> torch.nn.Module:
        with set_default_torch_dtype(model_config.dtype), torch.device("meta"):
            return self.create_model(vllm_config, model_config, prefix)


class _Executor(UniProcExecutor):
    """Runs the worker until it has said what its layers cache."""

    def determine_available_memory(self) -> list[int]:
        return [self.vllm_config.cache_config.kv_cache_memory_bytes]

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        config = kv_cache_configs[0]
        spec = config.kv_cache_groups[compactable_groups(config)[0]].kv_cache_spec
        found = lacks_of_shape(spec.num_kv_heads, spec.head_size, self.vllm_config)
        worker = self.driver_worker.worker
        worker.lacks = found | (
            DRAFTS_LACK if _drafting(worker) else {}
        )  # what hangs on weights is not known

    def compile_or_warm_up_model(self) -> None:
        pass


class EngineWithoutWeights:
    """vLLM's engine core for a model, as it would serve it.

    Args:
        arguments: of `vllm serve`.
        memory_bytes: of the pool.

    Raises:
        KVCompressionError: compression does not serve it, or vLLM does not.
    """

    def __init__(self, arguments: Sequence[str], memory_bytes: int) -> None:
        load_general_plugins()  # which add the flag
        parser = EngineArgs.add_cli_args(_Parser())
        engine_args = EngineArgs.from_cli_args(parser.parse_args(arguments))
        engine_args.load_format = WITHOUT_WEIGHTS
        try:
            self.vllm_config = engine_args.create_engine_config()
            # On a CPU vLLM takes it out of the environment instead.
            self.vllm_config.cache_config.kv_cache_memory_bytes = memory_bytes
            if self.vllm_config.parallel_config.world_size > 1:
                raise KVCompressionError("check looks at one worker; leave -tp and -pp out")
            core = EngineCore(self.vllm_config, _Executor, log_stats=False)
        except KVCompressionError:
            raise
        except Exception as error:  # whatever vLLM has against a model
            raise KVCompressionError(f"vLLM does not start so: {_reason(error)}") from None
        self.hasher = core.request_block_hasher
        self.scheduler = core.scheduler
        self.worker = core.model_executor.driver_worker.worker
        self.config: KVCompressionConfig = self.scheduler.compression

    def look(self, num_prompt: int, num_output: int) -> Finding:
        """All that is to be said, for requests of so many tokens.

        Raises:
            KVCompressionError: they are longer than the model's context.
        """
        model, longest = self.vllm_config.model_config, self.vllm_config.model_config.max_model_len
        if num_prompt + num_output > longest:
            raise KVCompressionError(
                f"{num_prompt} + {num_output} tokens exceed --max-model-len {longest}; "
                "lower --prompt-tokens or --output-tokens"
            )
        refused, untold = self._methods()
        return Finding(
            model=Path(model.model).name,
            architecture=model.architectures[0],
            groups=list(self._groups()),
            refused=refused,
            untold=untold,
            blocks=self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            memory_bytes=self.vllm_config.cache_config.kv_cache_memory_bytes,
            prompt_tokens=num_prompt,
            output_tokens=num_output,
            raw=self.held(KVCompressionConfig.parse("off"), num_prompt, num_output),
            compressed=self.held(self.config, num_prompt, num_output),
        )

    # ------------------------------------------------------------------ layers and methods

    def _groups(self) -> Iterator[LayerGroup]:
        # Several groups of vLLM's may be alike, and layers of one differ in what they are a page of.
        found: dict[tuple[str, str, str], list[int]] = {}
        drafting = _drafting(self.worker)
        for name, spec in self.worker.get_kv_cache_spec().items():
            what, *becomes = _described(spec)
            kind = f"of the draft model, {what}" if name in drafting else what, *becomes
            found.setdefault(kind, []).append(extract_layer_index(name))
        for (what, becomes, reason), layers in found.items():
            yield LayerGroup(sorted(layers), what, becomes, reason)
        sharing = [layer.layer_name for layer in self.worker._attention_layers() if owner_of(layer)]
        if sharing:
            layers = sorted(map(extract_layer_index, sharing))
            yield LayerGroup(layers, "no cache of their own", "shared", "they read what other layers keep")

    def _methods(self) -> tuple[dict[str, str], dict[str, str]]:
        """Methods that are refused, and those of which only the weights tell."""
        refused, untold = {}, {}
        for method in METHODS:
            try:
                config = self.config.for_request(method)
                check_method(config, self.vllm_config)
            except KVCompressionError as error:
                refused[method] = str(error)
                continue
            policy = config.build_policy()
            needs = [what for need, what in OF_WEIGHTS.items() if getattr(policy, need)]
            if needs:
                untold[method] = " and ".join(needs)
        return refused, untold

    # ------------------------------------------------------------------ what the pool holds

    def held(self, config: KVCompressionConfig, num_prompt: int, num_output: int) -> Held:
        """What the pool holds of requests that come one after the other and are there to their ends."""
        manager, requests = self.scheduler.kv_cache_manager, []
        total, blocks = manager.block_pool.get_num_free_blocks(), 0
        while True:
            request = self._request(len(requests), num_prompt, num_output)
            requests.append(request)
            if not self._grows(request, config, num_output):
                break
            if len(requests) == 1:
                blocks = total - manager.block_pool.get_num_free_blocks()
        for request in requests:
            manager.free(request)
        assert manager.block_pool.get_num_free_blocks() == total
        whole = len(requests) - 1
        return Held(blocks, whole, whole * (num_prompt + num_output))

    def _request(self, index: int, num_prompt: int, num_output: int) -> Request:
        params = SamplingParams(max_tokens=num_output)
        # Of tokens of its own, so that none reads another one's blocks.
        return Request(f"check-{index}", [index] * num_prompt, params, None, block_hasher=self.hasher)

    def _grows(self, request: Request, config: KVCompressionConfig, num_output: int) -> bool:
        """Have a request computed and compacted to its end; False where the pool ends before."""
        manager, compacting = self.scheduler.kv_cache_manager, self.scheduler.compacting_manager
        block_size, in_page = compacting.block_size, self.scheduler._compactions.page_tokens(config)
        num_prompt, held, point = request.num_prompt_tokens, None, None
        end = num_prompt + num_output - 1  # the last token is never computed
        if is_ever_compacted(config, num_prompt, end + 1, block_size, in_page):
            point = next_point(config, num_prompt) or num_prompt  # under pressure it could be any
        at_once = self.vllm_config.scheduler_config.max_num_batched_tokens
        # Windows give back as a request goes on: by single tokens at the end, else by fewer steps.
        stops = [num_prompt, end - 1, end]
        while (computed := request.num_computed_tokens) < end:
            if computed == point:
                held = self._compacted(request, Plan.of(config, point, block_size, held, in_page), held)
                point = next_point(config, num_prompt, point)
            if computed == num_prompt:
                request.append_output_token_ids([0] * num_output)
            at_most = computed + (at_once if computed < num_prompt else block_size)
            goal = min(at_most, *(stop for stop in (*stops, point) if stop is not None and stop > computed))
            fits = manager.allocate_slots(
                request,
                goal - computed,
                num_lookahead_tokens=self.scheduler.num_lookahead_tokens,
                full_sequence_must_fit=not computed and config.when != "streaming",
            )
            if fits is None:
                return False
            request.num_computed_tokens = goal
        return True

    def _compacted(self, request: Request, plan: Plan | None, held: Plan | None) -> Plan | None:
        """Swap a request's blocks as its scheduler does; its last compaction then."""
        if plan is None:
            return held
        manager = self.scheduler.compacting_manager
        begin = held.boundary // manager.block_size if held else 0
        swapped = manager.compact(
            request.request_id,
            begin,
            plan.boundary // manager.block_size,
            plan.kept_blocks,
            self.scheduler._compactions.in_place(plan),
        )
        return held if swapped is None else plan


def _drafting(worker: CompressionWorker) -> Collection[str]:
    """Names of a draft model's layers."""
    return getattr(getattr(worker.model_runner, "drafter", None), "_draft_attn_layer_names", ())


def _reason(error: Exception) -> str:
    """What is wrong, in one line."""
    said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return said.strip().partition("\n")[0] or type(error).__name__


def _described(spec: KVCacheSpec) -> tuple[str, str, str]:
    """What a layer caches, what becomes of it, and why that."""
    size = f"blocks of {spec.block_size} tokens"
    if isinstance(spec, CompactableLatentSpec):
        return f"latents of {spec.head_size} channels, {size}", "compacted", ""
    heads = ""
    if isinstance(spec, AttentionSpec):
        heads = f"{spec.num_kv_heads} KV heads of {spec.head_size} channels, {size}"
    if isinstance(spec, CompactableSpec):
        return f"full attention, {heads}", "compacted", ""
    if isinstance(spec, SlidingWindowSpec):
        what = f"a window of {spec.sliding_window} tokens, {heads}"
        return what, "left", "vLLM frees what slides out of a window"
    if isinstance(spec, ChunkedLocalAttentionSpec):
        what = f"chunks of {spec.attention_chunk_size} tokens, {heads}"
        return what, "left", "vLLM frees a chunk once it is past"
    if isinstance(spec, MambaSpec):
        return f"a state ({spec.mamba_type}), {size}", "left", "a state does not grow"
    return f"{type(spec).__name__}, {heads or size}", "left", "it is not full attention"
