"""What a worker knows of the requests it has compacted or is about to."""

from typing import Protocol

from vllm_kvcompress.attention.tables import BatchTables, RequestTable
from vllm_kvcompress.worker.observer import Observer


class Rows(Protocol):
    """Which request each row of the current batch belongs to; one implementation per model runner."""

    def request_ids(self, num_rows: int) -> list[str]: ...


class RunnerV1Rows:
    """Rows of Model Runner V1: the persistent batch is in row order."""

    def __init__(self, model_runner) -> None:
        self._runner = model_runner

    def request_ids(self, num_rows: int) -> list[str]:
        return self._runner.input_batch.req_ids[:num_rows]


class CompressionState:
    """Shared by the worker, which changes it between steps, and the attention builder, which reads it.

    Attributes:
        tables: request id to the pages of each compacted request.
        batch: the tables of the current batch.
        observer: what is kept of the queries of requests to be compacted.
        rows: the row adapter.
    """

    def __init__(self, rows: Rows, observer: Observer) -> None:
        self.rows = rows
        self.observer = observer
        self.tables: dict[str, RequestTable] = observer.tables
        self.batch = BatchTables()

    @property
    def active(self) -> bool:
        """Whether any row of a batch could need more than vLLM's own path."""
        return bool(self.tables) or bool(len(self.observer))

    def forget(self, request_id: str) -> None:
        """Drop everything known of a request."""
        self.tables.pop(request_id, None)
        self.observer.forget(request_id)
