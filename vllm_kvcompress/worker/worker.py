"""vLLM's workers, extended: they compact before they compute."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention, MLAAttention, chunked_local_attention
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import AttentionGroup

from vllm_kvcompress import attention
from vllm_kvcompress.attention.unsupported import OwnLayer, slides
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.formats.base import NEEDS_HEAD_SIZE
from vllm_kvcompress.paging.job import CompressionReport, CompressionStep, Job, Solve, parts_of
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.paging.spec import CompactableSpec, compactable_groups
from vllm_kvcompress.requests import saved
from vllm_kvcompress.requests.beside import Beside
from vllm_kvcompress.requests.cache import PagedCache
from vllm_kvcompress.requests.latents import latent_layers
from vllm_kvcompress.requests.layers import ProbedLayers, draft_layers, probe_layers
from vllm_kvcompress.requests.observer import Observer
from vllm_kvcompress.requests.state import CompressionState, RunnerV1Rows, RunnerV2Rows
from vllm_kvcompress.requests.tables import RequestTable
from vllm_kvcompress.worker.compactor import Compactor
from vllm_kvcompress.worker.saving import Saver
from vllm_kvcompress.worker.stopwatch import Stopwatch
from vllm_kvcompress.worker.work import Work


class CompressionWorker(Worker):
    """Put before a stock worker.

    Attributes:
        backends: what to choose where vLLM would choose a backend, as `module.Class`.
        compression: what is known of requests, shared with the attention builder.
        compactor: runs Jobs.
        builders: make the attention metadata, one for the layers of each cache group that is compacted.
        lacks: what policies may need and this model has not, see `ProbedLayers`.
    """

    backends: ClassVar[Mapping[AttentionBackendEnum, str]]
    compression: CompressionState
    compactor: Compactor
    builders: list[Any]
    lacks: dict[str, str]
    _block_size: int  # that the user or vLLM has chosen, before blocks are enlarged for the sake of states
    _num_parts = 1  # of each block of the scheduler's, as attention kernels see them
    _serving = False
    _counting: Mapping[str, RequestTable] = MappingProxyType({})  # of this step's Jobs with a threshold
    _stopwatch: Stopwatch  # of shares of solves
    _compacting: Stopwatch  # of a step's compactions
    _failure: Exception | None = None

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        self._block_size = self.cache_config.block_size
        with backend_overrides(self.backends), stock_within_chunks():
            super().load_model(load_dummy_weights=load_dummy_weights)
        for layer in self._attention_layers():
            if not slides(layer.sliding_window, self.model_config.max_model_len):
                layer.sliding_window = None
            elif layer.attn_backend.__module__.startswith(attention.__name__):  # of which the rest is stock's
                layer.attn_backend = layer.attn_backend.stock

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs = super().get_kv_cache_spec()
        if not self.model_config.is_hybrid:
            return specs
        context = self.compilation_config.static_forward_context
        return {
            name: self._with_small_pages(spec, context[name].attn_backend)
            if isinstance(spec, CompactableSpec)
            else spec
            for name, spec in specs.items()
        }

    def _with_small_pages(self, spec: CompactableSpec, backend: type[AttentionBackend]) -> CompactableSpec:
        """Blocks are as large as a state; pages stay what they would be in a model without states."""
        size = math.gcd(spec.block_size, self._block_size)
        fixed = backend.get_supported_kernel_block_sizes(spec)
        if all(isinstance(each, int) for each in fixed):
            size = max(each for each in fixed if spec.block_size % each == 0)
        return spec if size == spec.block_size else replace(spec, kernel_block_size=size)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        indices = compactable_groups(kv_cache_config)
        super().initialize_from_config(kv_cache_config)
        # Reads its files.
        config = KVCompressionConfig.parse(self.vllm_config.additional_config["kv_compression"])
        groups = [self.model_runner.kv_cache_config.kv_cache_groups[index] for index in indices]
        number_of = {name: number for number, group in enumerate(groups) for name in group.layer_names}
        context = self.compilation_config.static_forward_context
        all_layers: list[Attention] = [layer for name, layer in context.items() if name in number_of]
        # Others read what these write.
        layers = [layer for layer in all_layers if owner_of(layer) is None]
        if not layers:
            raise KVCompressionError(
                "kv-compression needs layers of full attention on every pipeline rank; "
                "use fewer, or run this model without --kv-compression"
            )
        if len(groups) == 1:
            layers.sort(key=lambda layer: layer.kv_cache.data_ptr())
        num_drafting = self._num_drafting(layers)
        attn_groups = [self.model_runner.attn_groups[index] for index in indices]
        num_blocks, num_heads, block_size, _ = cache_of(layers[0]).shape
        if max(map(len, attn_groups)) > 1 or block_size != groups[0].kv_cache_spec.tokens_of_page:
            raise KVCompressionError(
                "kv-compression needs one attention backend whose blocks are the scheduler's; "
                "use a smaller --block-size, or run this model without --kv-compression"
            )
        self._num_parts = num_blocks // kv_cache_config.num_blocks
        grid = PageGrid(len(layers), num_blocks, num_heads, block_size)
        if len(groups) > 1:
            places = sorted({layer.kv_cache.data_ptr() for layer in layers})
            grid = replace(
                grid,
                num_groups=len(groups),
                groups=tuple(number_of[layer.layer_name] for layer in layers),
                slots=tuple(places.index(layer.kv_cache.data_ptr()) for layer in layers),
            )
        # One of each group of which there are layers here.
        builders = {number: own[0].get_metadata_builder(0) for number, own in enumerate(attn_groups) if own}
        self.builders = list(builders.values())
        cache = self.make_cache(grid, layers, self.builders[0])
        for layer in all_layers:
            if (owner := owner_of(layer)) is not None:
                layer.impl.share(context[owner].impl)
        format = config.record_format
        page_bytes = cache.content.shape[1]
        if format is not None and not format.holds_more(page_bytes, cache.head_size, block_size):
            raise KVCompressionError(
                f"kv-compression: a page has no room for more tokens in {format.name} than raw at "
                f"--block-size {block_size}; use a larger one"
            )
        model, impl = self.model_runner.get_model(), layers[0].impl
        if self.model_config.use_mla:  # what methods may not ask of latents is known without a look at them
            probed = ProbedLayers(latent_layers(layers), {})
        else:
            probed = probe_layers(
                model,
                layers[: len(layers) - num_drafting],
                self._attention_layers(),
                self.vllm_config,
                self._without_adapters,
            )
            drafting = draft_layers(layers[len(layers) - num_drafting :], self.vllm_config)
            probed = ProbedLayers(probed.layers + drafting.layers, probed.lacks | drafting.lacks)
        self.lacks = probed.lacks | lacks_of_shape(num_heads, cache.head_size, self.vllm_config)
        dtype = self.model_config.dtype
        observer = Observer(cache, probed.layers, impl.num_heads, impl.head_size, dtype, tables={})
        rows = (RunnerV2Rows if self.use_v2_model_runner else RunnerV1Rows)(self.model_runner)
        self.compression = CompressionState(rows, observer, beside=self._beside(indices))
        self._saver = Saver()
        # Latents are on every rank, query heads on one each.
        agree = agreed_by_ranks if self.model_config.use_mla else None
        self.compactor = Compactor(cache, probed.layers, largest_of_ranks, agree, num_drafting)
        own = list(builders.items())
        own += [
            (indices.index(group.kv_cache_group_id), group.get_metadata_builder())
            for group in self._draft_groups()
        ]
        has_sinks = getattr(self.builders[0], "has_sinks", False)
        for number, builder in own:
            builder.state, builder.group, builder.has_sinks = self.compression, number, has_sinks
        self._stopwatch, self._compacting = Stopwatch.of(cache.device), Stopwatch.of(cache.device)

    def _draft_groups(self) -> list[AttentionGroup]:
        """vLLM's groups of a draft model's layers; none without one."""
        return getattr(getattr(self.model_runner, "drafter", None), "draft_attn_groups", [])

    def _beside(self, compacted: Sequence[int]) -> list[Beside]:
        """The groups that are not among those which are compacted."""
        config, context = self.model_runner.kv_cache_config, self.compilation_config.static_forward_context
        found = []
        for index, group in enumerate(config.kv_cache_groups):
            layers = {name: context[name] for name in group.layer_names if owner_of(context[name]) is None}
            if index not in compacted:
                found.append(Beside.of(group, layers, config.num_blocks))
        return found

    def _num_drafting(self, layers: Sequence[Attention]) -> int:
        """How many layers of a draft model there are: behind the model's, and alike.

        Raises:
            KVCompressionError: they are not alike, or the model runner is not one that tells them apart.
        """
        speculative = self.vllm_config.speculative_config
        drafts = speculative is not None and (speculative.use_eagle() or speculative.uses_draft_model())
        if drafts and self.use_v2_model_runner:
            raise KVCompressionError(
                "kv-compression does not support draft models with Model Runner V2; "
                "use ngram speculation or none"
            )
        names = {name for group in self._draft_groups() for name in group.layer_names}
        drafting = [layer for layer in layers if layer.layer_name in names]
        alike = all(layer.impl.num_heads == layers[0].impl.num_heads for layer in drafting)
        if len(drafting) != len(names) or not alike:
            raise KVCompressionError(
                "kv-compression needs a draft model with as many heads as the model and caches of its own; "
                "use another --speculative-config, or run this model without --kv-compression"
            )
        assert layers[len(layers) - len(drafting) :] == drafting
        return len(drafting)

    def _attention_layers(self) -> list[Attention]:
        """All of this rank's, also those that are not compacted."""
        context = self.compilation_config.static_forward_context
        return [layer for layer in context.values() if isinstance(layer, Attention | MLAAttention)]

    def compacted_layers(self) -> list[Attention]:
        """Those that are compacted, and have a cache of their own."""
        own = (layer for layer in self._attention_layers() if isinstance(layer.impl, OwnLayer))
        return [layer for layer in own if owner_of(layer) is None]

    def _without_adapters(self, num_tokens: int) -> AbstractContextManager:
        """Prepare the model for a batch of so many tokens of one request that uses no adapter."""
        batch = np.array([num_tokens], dtype=np.int32)
        return self.model_runner.maybe_select_dummy_loras(self.lora_config, batch)

    def kv_compression_lacks(self) -> dict[str, str]:
        """What policies may need and this model has not; asked by the engine."""
        return self.lacks

    def kv_compression_heads(self, request_id: str) -> dict[str, Any] | None:
        """Pages that each head keeps of a compacted request; asked by the engine, at an operator's wish.

        Returns:
            `layers`, the numbers of this rank's compacted layers; `pages` `[L][H]`; `raw_pages`, those that a
            head would have below the boundary. None if it is not compacted, and on all tensor-parallel ranks
            but the first.
        """
        table = self.compression.tables.get(request_id)
        if table is None or get_tp_group().rank_in_group:
            return None
        return {
            "layers": [layer.index for layer in self.compactor.layers],
            "pages": table.counts.tolist(),
            "raw_pages": table.boundary // table.grid.block_size,
        }

    def kv_compression_save(
        self,
        path: str,
        names: Sequence[str],
        tails: Sequence[Sequence[int]],
        seen: Sequence[Sequence[int]],
        tokens: Sequence[int],
        about: dict,
    ) -> None:
        """Begin to write a prefix to a file; asked by the engine, while none is being written.

        Its bytes are copied at once, and written beside the steps.

        Args:
            path: the file; of several workers each has one of its own.
            names: of the prefix, and of the request that it is of if this worker has not been told yet.
            tails: of each group that is compacted, block ids of its raw tail.
            seen: of each group that is not compacted, block ids of what its layers see behind the end.
            tokens: of which it is.
            about: what the scheduler knows of it.
        """
        state = self.compression
        known = state.prefixes | state.tables
        table = next((known[name] for name in names if name in known), None)
        if table is None:
            return self._saver.refuse("it is being loaded; try again")
        cache, own = state.observer.cache, saved.path_of(path, self.rank, self.parallel_config.world_size)
        about = about | {"fingerprint": self._fingerprint()}
        # With a threshold a GPU's tables have room for all that the budget allows.
        destination = table.destination[: about["kept_blocks"] * self._parts_of_groups]
        raw = cache.on_device([parts_of(tail, self._num_parts) for tail in tails])
        places = saved.places(cache, destination, raw, state.beside, seen)
        self._saver.begin(own, saved.copied(table, places, torch.tensor(tokens)), about)

    def kv_compression_saved(self) -> tuple[bool, str | None]:
        """Whether what was begun to be written has ended, and what was in its way; asked by the engine."""
        return self._saver.outcome()

    def kv_compression_unsave(self, path: str) -> None:
        """Have a file not appear that is being written; asked by the engine."""
        self._saver.forget(saved.path_of(path, self.rank, self.parallel_config.world_size))

    def kv_compression_read(
        self, path: str, prefix_id: str, about: dict, tokens: Sequence[int], num_seen: Sequence[int]
    ) -> str | None:
        """Read a prefix into the host's memory, to be loaded in a step; asked by the engine.

        Args:
            path: as of `kv_compression_save`.
            prefix_id: its name.
            about: what the first worker's file says.
            tokens: of which it is, likewise.
            num_seen: of each group that is not compacted, blocks that its layers see behind the end.

        Returns:
            What is in the way; None if nothing is.
        """
        own, state = saved.path_of(path, self.rank, self.parallel_config.world_size), self.compression
        try:
            found = saved.read(own)
            shape = state.observer.cache, self._parts_of_groups, state.beside, num_seen
            saved.check(found, *shape, self._fingerprint(), own)
            saved.check_same(found, about, tokens, own)
        except ValueError as error:
            return str(error)
        state.read[prefix_id] = found
        return None

    def kv_compression_unread(self, prefix_id: str) -> None:
        """Forget a prefix that was read; asked by the engine."""
        self.compression.read.pop(prefix_id, None)

    def _fingerprint(self) -> str:
        state = self.compression
        return saved.fingerprint(self.model_runner.get_model(), state.observer.cache, state.beside)

    @abstractmethod
    def make_cache(self, grid: PageGrid, layers: Sequence[Attention], builder: Any) -> PagedCache:
        """The whole cache, which every layer's implementation is given too.

        Args:
            grid: its geometry.
            layers: in the order of the grid's.
            builder: makes the metadata of the first group's.
        """

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput):
        # The scheduler believes what it was not told otherwise, and would wait for the rest for ever.
        if self._failure is not None:
            raise RuntimeError(
                f"kv-compression: an earlier step failed ({self._failure}); start the engine again"
            ) from self._failure
        try:
            return self._reported(self._execute(scheduler_output))
        except Exception as error:
            self._failure = error
            raise

    def sample_tokens(self, grammar_output):
        self.compression.live = bool(self._draft_groups())  # drafts are computed now
        try:
            return self._reported(super().sample_tokens(grammar_output))
        finally:
            self.compression.live = False

    def _reported(self, output):
        """The step's output, with the word of what its thresholds keep and how long solves and Jobs took."""
        if not isinstance(output, ModelRunnerOutput | AsyncModelRunnerOutput):
            return output
        seconds, compacting = self._stopwatch.read(), self._compacting.total()
        if not self._counting and seconds is None and not compacting:
            return output
        tables, self._counting = self._counting, MappingProxyType({})
        if isinstance(output, AsyncModelRunnerOutput):
            return _ReportedLater(output, tables, self._parts_of_groups, seconds, compacting)
        return _with_report(output, tables, self._parts_of_groups, seconds, compacting)

    def _execute(self, scheduler_output: SchedulerOutput):
        step: CompressionStep | None = getattr(scheduler_output, "kv_compression", None)
        if step is None and self._serving:
            raise RuntimeError("kv-compression: a step came without word from the compression scheduler")
        if step is not None:  # else vLLM warms its kernels up, with requests of its own
            self._serving = True
            self._compact(step, scheduler_output.finished_req_ids)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        self.compression.observer.num_drafts = {name: len(tokens) for name, tokens in drafts.items()}
        self.compression.live = True
        try:
            return super().execute_model(scheduler_output)
        finally:
            self.compression.live = False

    def _compact(self, step: CompressionStep, finished: set[str]) -> None:
        state = self.compression
        for prefix_id, request_id in step.kept.items():
            state.keep(prefix_id, request_id)
        for request_id in (*step.released, *finished):
            state.forget(request_id)
            self.compactor.forget(request_id)
        loaded = [state.load(each.split(self._num_parts)) for each in step.loaded]
        for request_id, prefix_id in step.attached.items():
            state.attach(request_id, prefix_id)
        for prefix_id in step.dropped:
            state.drop(prefix_id)
        for write in loaded:  # now that nothing is cleared any more
            write()
        for request_id in step.unsolved:
            state.observer.drop_states(request_id)
            state.observer.resume(request_id)
            self.compactor.forget(request_id)
        if step.solves:
            self._solve(step.solves)
        if step.jobs:
            self._run_jobs(step.jobs)
        for request_id in step.late:
            state.observer.pause(request_id)
        # After the Jobs, which have used up the records of other requests.
        for observation in step.observations:
            state.observer.watch(observation.request_id, observation.config.build_policy())
        for repetition in step.repetitions:
            state.observer.watch_repetition(repetition)

    def _solve(self, solves: Sequence[Solve]) -> None:
        observer = self.compression.observer
        with self._stopwatch.parts(sum(len(solve.shares) for solve in solves)):
            for solve in solves:
                name, num_blocks = solve.job.request_id, solve.num_blocks * self._parts_of_groups
                own = replace(solve, job=self._split(solve.job), num_blocks=num_blocks)
                self.compactor.solve(own, observer.of(name))
                if solve.shares.stop == solve.num_shares:
                    observer.recall(name)

    @property
    def _parts_of_groups(self) -> int:
        """Blocks of attention kernels in a block of each group."""
        return self._num_parts * self.compactor.grid.num_groups

    def _split(self, job: Job) -> Job:
        """A Job in blocks as attention kernels see them."""
        return job if self._num_parts == 1 else job.split(self._num_parts, self.compactor.grid.block_size)

    def _run_jobs(self, jobs: Sequence[Job]) -> None:
        state, works = self.compression, []
        for job in map(self._split, jobs):
            observed = state.observer.of(job.request_id)
            assert (observed is None) == (not job.config.observes)
            state.observer.settle(job)
            works.append(Work(job, state.tables.get(job.request_id), observed))
        with self._compacting.parts(1):
            tables = self.compactor.run(works)
        for work, table in zip(works, tables, strict=True):
            state.put(work.job.request_id, table)
            if not work.job.config.compacts_again:
                state.observer.forget(work.job.request_id)
            elif work.observed is not None:
                state.observer.resume(work.job.request_id)
        counting = (job.request_id for job in jobs if job.config.threshold is not None)
        self._counting = {name: state.tables[name] for name in counting}


class _ReportedLater(AsyncModelRunnerOutput):
    """An output that is on its way, and what goes with it."""

    def __init__(self, output: AsyncModelRunnerOutput, *report: Any) -> None:
        self._output, self._report = output, report

    def get_output(self) -> ModelRunnerOutput:
        return _with_report(self._output.get_output(), *self._report)


def _with_report(
    output: ModelRunnerOutput,
    tables: Mapping[str, RequestTable],
    num_parts: int,
    solving_seconds: float | None,
    compaction_seconds: float,
) -> ModelRunnerOutput:
    output = copy(output)  # an empty one is everybody's
    kept = {name: -(-table.num_blocks // num_parts) for name, table in tables.items()}
    output.kv_compression = CompressionReport(kept, solving_seconds, compaction_seconds)
    return output


def largest_of_ranks(own: Tensor) -> Tensor:
    """The largest of the tensor-parallel ranks' numbers, `[1]` int64; the host does not wait for it."""
    # By the communicator that vLLM itself uses and has set memory aside for; on a CPU it knows floats alone.
    return get_tp_group().all_gather(own.float(), 0).amax(0, keepdim=True).long()


def agreed_by_ranks(scores: Tensor, how: Literal["mean", "max"]) -> Tensor:
    """What all tensor-parallel ranks say together, the same to the last bit on each of them.

    Args:
        scores: `[X, T]` float32, what this rank's query heads say.
        how: see `Policy.of_ranks`.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return scores
    every = group.all_gather(scores.contiguous(), 0).unflatten(0, (group.world_size, -1))
    return every.amax(0) if how == "max" else every.mean(0)


@contextmanager
def backend_overrides(backends: Mapping[AttentionBackendEnum, str]) -> Iterator[None]:
    """Let the layers built inside choose these backends where they would choose the keys.

    Undone afterwards, so that another engine in this process still gets vLLM's own.
    """
    for backend, path in backends.items():
        register_backend(backend, path)
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        for backend in backends:
            backend.clear_override()
        _cached_get_attn_backend.cache_clear()


@contextmanager
def stock_within_chunks() -> Iterator[None]:
    """Let the layers built inside that attend within chunks of a context be vLLM's own, builder and all."""
    choose = chunked_local_attention.get_attn_backend

    def stock(*args, **kwargs) -> type[AttentionBackend]:
        chosen = choose(*args, **kwargs)
        return getattr(chosen, "stock", chosen)

    chunked_local_attention.get_attn_backend = stock
    try:
        yield
    finally:
        chunked_local_attention.get_attn_backend = choose


def lacks_of_shape(num_heads: int, head_size: int, vllm_config: VllmConfig) -> dict[str, str]:
    """What methods may not ask of layers that are not of the shape which the configuration says.

    Args:
        num_heads: H, of this rank.
        head_size: D.
        vllm_config: the engine's.

    Returns:
        As `ProbedLayers.lacks`.
    """
    model = vllm_config.model_config
    said = model.get_num_kv_heads(vllm_config.parallel_config), model.get_head_size()
    if said == (num_heads, head_size):
        return {}
    differs = (
        f"its layers have {num_heads} KV heads of {head_size} channels, "
        "and its configuration says {} of {}".format(*said)
    )
    return {"needs_known_shape": differs} | ({NEEDS_HEAD_SIZE: differs} if said[1] != head_size else {})


def owner_of(layer: Attention | MLAAttention) -> str | None:
    """The layer whose cache a layer reads, if it has none of its own; latents are not shared among layers."""
    return layer.kv_sharing_target_layer_name if isinstance(layer, Attention) else None


def cache_of(layer: Attention) -> Tensor:
    """A layer's cache, `[B, H, N, C]`; vLLM has latents without H."""
    cache = layer.kv_cache
    return cache if cache.ndim == 4 else cache[:, None]


def every_page(layers: Sequence[Attention]) -> torch.Tensor:
    """One tensor `[S·B·H, N·C]` over the caches `[B, H, N, C]` of layers, in address order; see `PageGrid`.

    Raises:
        KVCompressionError: they are not one array.
    """
    by_place = {layer.kv_cache.data_ptr(): cache_of(layer) for layer in layers}
    caches = [by_place[place] for place in sorted(by_place)]
    first = caches[0]
    stride = first.numel() * first.element_size()
    contiguous = all(
        cache.is_contiguous() and cache.data_ptr() == first.data_ptr() + index * stride
        for index, cache in enumerate(caches)
    )
    if not contiguous:
        raise KVCompressionError(
            "kv-compression: the KV cache of this model is not one [layer, block, head] array; "
            "run it without --kv-compression"
        )
    num_blocks, num_heads, block_size, content = first.shape
    num_pages = len(caches) * num_blocks * num_heads
    return first.as_strided((num_pages, block_size * content), (block_size * content, 1))
