"""What a worker knows of the requests it has compacted or is about to."""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvcompress.paging.job import Loaded
from vllm_kvcompress.requests.beside import Beside
from vllm_kvcompress.requests.observer import Observer
from vllm_kvcompress.requests.runs import RunArrays
from vllm_kvcompress.requests.saved import Saved, places
from vllm_kvcompress.requests.tables import BatchTables, RequestTable


class Rows(Protocol):
    """Which request each row of the current batch belongs to; one implementation per model runner."""

    def request_ids(self, metadata: CommonAttentionMetadata) -> Sequence[str | None]:
        """One id per row; None for the padding rows of a captured graph."""


class RunnerV1Rows:
    """Rows of Model Runner V1: the persistent batch is in row order."""

    def __init__(self, model_runner) -> None:
        self._runner = model_runner

    def request_ids(self, metadata: CommonAttentionMetadata) -> Sequence[str | None]:
        ids = self._runner.input_batch.req_ids[: metadata.num_reqs]
        return [*ids, *[None] * (metadata.num_reqs - len(ids))]


class RunnerV2Rows:
    """Rows of Model Runner V2, which tells each row's place in its request states.

    With models that keep states it does not, so there it is noted as the batch is made ready.
    """

    def __init__(self, model_runner) -> None:
        self._ids: dict[int, str] = model_runner.req_states.index_to_req_id
        self._noted: np.ndarray | None = None
        if model_runner.model_config.is_hybrid:
            state = model_runner.model_state
            state.prepare_attn = self._noting(state.prepare_attn)

    def _noting(self, prepare_attn):
        @functools.wraps(prepare_attn)
        def wrapped(input_batch, *args, **kwargs):
            self._noted = input_batch.idx_mapping_np
            return prepare_attn(input_batch, *args, **kwargs)

        return wrapped

    def request_ids(self, metadata: CommonAttentionMetadata) -> Sequence[str | None]:
        places = self._noted if metadata.req_idx is None else metadata.req_idx
        assert places is not None
        ids = [self._ids.get(index) for index in places.tolist()]
        return [*ids, *[None] * (metadata.num_reqs - len(ids))]


class CompressionState:
    """Shared by the worker, which changes it between steps, and the attention builder, which reads it.

    Attributes:
        tables: request id to the pages of each compacted request.
        prefixes: likewise of each compacted prefix that requests may attach to.
        beside: the groups that are not compacted.
        batch: the tables of the current batch; for vLLM's CPU kernel.
        runs: the tables of all requests on the GPU; for our own kernel, None elsewhere.
        observer: what is kept of the queries of requests to be compacted.
        rows: the row adapter.
        live: False while vLLM computes batches of its own making, whose rows only look like requests.
    """

    def __init__(
        self,
        rows: Rows,
        observer: Observer,
        runs: RunArrays | None = None,
        beside: Sequence[Beside] = (),
    ) -> None:
        self.rows = rows
        self.observer = observer
        self.runs = runs
        self.beside = beside
        self.tables: dict[str, RequestTable] = observer.tables
        self.prefixes: dict[str, RequestTable] = {}
        self.read: dict[str, Saved] = {}  # prefixes that are to be loaded
        self.batch = BatchTables()
        self.live = False

    @property
    def active(self) -> bool:
        """Whether any row of a batch could need more than vLLM's own path."""
        return self.live and (bool(self.tables) or bool(len(self.observer)))

    def put(self, request_id: str, table: RequestTable) -> None:
        """Note what a request is compacted to."""
        if (before := self.tables.get(request_id)) is not None:
            before.let_go()
        self.tables[request_id] = table
        if self.runs is not None:
            self.runs.put(request_id, table)

    def forget(self, request_id: str) -> None:
        """Drop everything known of a request."""
        self._let_go(self.tables.pop(request_id, None))
        self.observer.forget(request_id)
        if self.runs is not None:
            self.runs.drop(request_id)

    def keep(self, prefix_id: str, request_id: str) -> None:
        """Keep what a request is compacted to for others."""
        self.prefixes[prefix_id] = self.tables[request_id].shared()

    def load(self, loaded: Loaded) -> Callable[[], None]:
        """Have a prefix that was read; what then writes its blocks, unless they are nobody's by then."""
        saved, cache = self.read.pop(loaded.prefix_id), self.observer.cache
        destination = cache.on_device(loaded.destination[: saved.num_blocks(cache)])
        tails = cache.on_device(loaded.tails)
        table = self.prefixes[loaded.prefix_id] = saved.table(cache, destination)

        def written() -> None:
            if table.is_held:
                saved.put(places(cache, destination, tails, self.beside, loaded.beside))

        return written

    def attach(self, request_id: str, prefix_id: str) -> None:
        """Have a request go on from a compacted prefix."""
        self.put(request_id, self.prefixes[prefix_id].shared())

    def drop(self, prefix_id: str) -> None:
        """Forget a compacted prefix; who is attached to it is not concerned."""
        self._let_go(self.prefixes.pop(prefix_id))

    def _let_go(self, table: RequestTable | None) -> None:
        if table is not None and table.let_go() and table.format is not None:
            self.observer.cache.clear(table.destination)
