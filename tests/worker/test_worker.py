"""What a worker does before a step: forget, compact, then watch; and only when the scheduler has spoken."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.paging.job import CompressionStep, Job, Observation, Repetition, Solve
from vllm_kvcompress.worker.stopwatch import HostStopwatch
from vllm_kvcompress.worker.worker import CompressionWorker, backend_overrides, every_page

SNAPKV = KVCompressionConfig.parse("snapkv:window=4")
AGAIN = KVCompressionConfig.parse("snapkv:window=4,recompact_every=8")
STREAMING = KVCompressionConfig.parse("streaming_llm")


class Record(str):
    """Stands in for what is kept of a request's queries."""

    paused = False


class Log:
    """Stands in for the state, its observer and the compactor, and notes what they are asked to do."""

    def __init__(self) -> None:
        self.done: list[tuple] = []
        self.tables: dict[str, str] = {}
        self.records: dict[str, Record] = {}
        self.num_drafts: dict[str, int] = {}
        self.live = False
        self.observer = self

    def of(self, request_id):
        return self.records.get(request_id)

    def settle(self, job):
        self.done.append(("settle", job.request_id))

    def run(self, works):
        for work in works:
            self.done.append(("run", work.job.request_id, work.job.num_tokens, work.table, work.observed))
        return [f"{work.job.request_id} at {work.job.num_tokens}" for work in works]

    def put(self, request_id, table):
        self.done.append(("put", request_id, table))
        self.tables[request_id] = table

    def pause(self, request_id):
        self.done.append(("pause", request_id))

    def resume(self, request_id):
        self.records[request_id].paused = False

    def drop_states(self, request_id):
        self.done.append(("drop states", request_id))

    def recall(self, request_id):
        self.done.append(("recall", request_id))

    def watch(self, request_id, policy):
        self.done.append(("watch", request_id, policy))
        self.records[request_id] = Record(f"record of {request_id}")

    def watch_repetition(self, repetition):
        self.done.append(("repeat", repetition.request_id))


class State(Log):
    """The state's `forget` takes all, the observer's the record alone."""

    def __init__(self) -> None:
        super().__init__()
        self.observer = Log()
        self.observer.done, self.observer.forget = self.done, self._forget_record

    def _forget_record(self, request_id):
        self.done.append(("forget record", request_id))
        self.observer.records.pop(request_id, None)

    def forget(self, request_id):
        self.done.append(("forget", request_id))
        self.tables.pop(request_id, None)
        self.observer.records.pop(request_id, None)


class Solver:
    """The compactor: what runs the Jobs, and what solves before them."""

    grid = SimpleNamespace(num_groups=1)

    def __init__(self, state: State) -> None:
        self.run, self.done = state.run, state.done

    def solve(self, solve, observed):
        self.done.append(("solve", solve.job.request_id, observed))

    def forget(self, request_id):
        self.done.append(("forget what is solved", request_id))


@pytest.fixture
def worker(monkeypatch):
    class Bare(CompressionWorker):
        def __init__(self):
            self.compression = State()
            self.compactor = Solver(self.compression)
            self._stopwatch, self._compacting = HostStopwatch(), HostStopwatch()
            self.seen = []
            self.fails = False

        def make_cache(self, grid, layers, builder):
            raise AssertionError("not called")

    def execute(self, scheduler_output):
        self.seen.append((self.compression.live, dict(self.compression.observer.num_drafts)))
        if self.fails:
            raise RuntimeError("the model's own")
        return "output"

    monkeypatch.setattr(Worker, "execute_model", execute)
    return Bare()


def job(name: str, config=SNAPKV, num_tokens: int = 40) -> Job:
    return Job(name, config, num_tokens, 32, 0, (), (1, 2), (3,), (4,))


def step(compression: CompressionStep | None, finished=(), drafts=None) -> SimpleNamespace:
    output = SimpleNamespace(finished_req_ids=set(finished), scheduled_spec_decode_tokens=drafts or {})
    if compression is not None:
        output.kv_compression = compression
    return output


def test_what_is_gone_is_forgotten_then_jobs_run_and_only_then_new_requests_are_watched(worker):
    state = worker.compression
    state.observer.records = {name: Record(f"record of {name}") for name in ("a", "b", "f", "old")}
    state.tables = {"old": "old's", "gone": "gone's"}
    # `a` is preempted, and starts again in this step; `b` is compacted and ends its record with it.
    started = CompressionStep(
        released=["old"],
        solves=[Solve(job("f"), 1, range(0, 2), 4)],
        jobs=[job("b"), job("c", STREAMING)],
        late=["d", "e"],
        observations=[Observation("a", SNAPKV), Observation("b", AGAIN)],
        repetitions=[Repetition("r", "a", 0, 4, 8)],
    )
    assert worker.execute_model(step(started, finished=["gone"])) == "output"
    assert state.done == [
        ("forget", "old"),
        ("forget what is solved", "old"),
        ("forget", "gone"),
        ("forget what is solved", "gone"),
        ("solve", "f", "record of f"),
        ("settle", "b"),
        ("settle", "c"),
        ("run", "b", 40, None, "record of b"),
        ("run", "c", 40, None, None),
        ("put", "b", "b at 40"),
        ("forget record", "b"),
        ("put", "c", "c at 40"),
        ("forget record", "c"),
        ("pause", "d"),
        ("pause", "e"),
        ("watch", "a", SNAPKV.build_policy()),
        ("watch", "b", AGAIN.build_policy()),
        ("repeat", "r"),
    ]
    assert set(state.tables) == {"b", "c"}


def test_a_request_that_is_compacted_again_keeps_its_record_and_hands_over_its_table(worker):
    state = worker.compression
    state.observer.records = {"a": Record("record of a")}
    for num_tokens in (40, 48):
        jobs = [replace(job("a", AGAIN), num_tokens=num_tokens)]
        worker.execute_model(step(CompressionStep(jobs=jobs)))
    assert [done for done in state.done if done[0] == "run"] == [
        ("run", "a", 40, None, "record of a"),
        ("run", "a", 48, "a at 40", "record of a"),
    ]
    assert state.observer.records == {"a": "record of a"}


def test_the_record_of_a_late_request_goes_on_with_its_compaction(worker):
    state = worker.compression
    state.observer.records = {"a": Record("record of a"), "b": Record("record of b")}
    for record in state.observer.records.values():
        record.paused = True
    worker.execute_model(step(CompressionStep(jobs=[job("a", AGAIN)])))
    assert not state.observer.records["a"].paused and state.observer.records["b"].paused


def test_what_was_noted_is_dropped_once_all_is_solved_or_nothing_will_be(worker):
    state = worker.compression
    state.observer.records = {name: Record(f"record of {name}") for name in ("a", "b", "c")}
    state.observer.records["b"].paused = True
    told = CompressionStep(
        unsolved=["b", "c"],
        late=["c"],
        solves=[Solve(job("a"), 1, range(0, 3), 4), Solve(job("a"), 1, range(3, 4), 4)],
    )
    worker.execute_model(step(told))
    assert state.done == [
        ("drop states", "b"),
        ("forget what is solved", "b"),
        ("drop states", "c"),
        ("forget what is solved", "c"),
        ("solve", "a", "record of a"),
        ("solve", "a", "record of a"),
        ("recall", "a"),
        ("pause", "c"),
    ]
    assert not state.observer.records["b"].paused, "its output may be compacted yet"


def test_after_a_step_that_failed_every_other_is_refused_and_names_it(worker):
    worker.fails = True
    with pytest.raises(RuntimeError, match="^the model's own$"):
        worker.execute_model(step(CompressionStep()))
    worker.fails = False
    with pytest.raises(RuntimeError, match="an earlier step failed .the model.s own.; start"):
        worker.execute_model(step(CompressionStep()))
    assert len(worker.seen) == 1


@pytest.mark.parametrize("config", [SNAPKV, STREAMING])
def test_a_job_without_the_record_it_needs_or_with_one_it_does_not_is_an_error(worker, config):
    if config is STREAMING:
        worker.compression.observer.records = {"a": Record("record of a")}
    with pytest.raises(AssertionError):
        worker.execute_model(step(CompressionStep(jobs=[job("a", config)])))


def test_a_step_without_word_from_the_scheduler_is_an_error_once_it_has_spoken(worker):
    worker.execute_model(step(None))  # vLLM's own, as it warms up
    worker.execute_model(step(CompressionStep()))
    with pytest.raises(RuntimeError, match="without word from the compression scheduler"):
        worker.execute_model(step(None))
    assert len(worker.seen) == 2


def test_rows_are_requests_only_while_a_step_is_computed(worker):
    state = worker.compression
    drafts = {"a": [5, 6, 7], "b": [8]}
    worker.execute_model(step(CompressionStep(), drafts=drafts))
    worker.execute_model(step(CompressionStep()))
    assert worker.seen == [(True, {"a": 3, "b": 1}), (True, {})]
    assert state.live is False
    worker.fails = True
    with pytest.raises(RuntimeError, match="the model's own"):
        worker.execute_model(step(CompressionStep()))
    assert state.live is False


# ---------------------------------------------------------------------- binding


def caches(num_layers: int, gap: int = 0) -> list[SimpleNamespace]:
    """Layers whose caches `[B, H, N, 2D]` follow each other."""
    shape, size = (5, 2, 4, 6), 5 * 2 * 4 * 6
    whole = torch.arange(float(num_layers * (size + gap)))
    views = [whole[index * (size + gap) :][:size].view(shape) for index in range(num_layers)]
    return [SimpleNamespace(kv_cache=view) for view in views]


def test_every_page_of_every_layer_is_a_row_of_one_tensor():
    layers = caches(3)
    pages = every_page(layers)
    assert pages.shape == (3 * 5 * 2, 4 * 6)
    for layer in range(3):
        for block in range(5):
            for head in range(2):
                row = pages[(layer * 5 + block) * 2 + head]
                assert torch.equal(row, layers[layer].kv_cache[block, head].flatten())
    pages[0, 0] = -1
    assert layers[0].kv_cache.flatten()[0] == -1, "it is the cache itself"


def test_pages_are_in_the_order_of_their_addresses_whatever_that_of_the_layers():
    layers = caches(3)
    in_order = every_page(layers)
    assert torch.equal(every_page(layers[::-1]), in_order)
    assert torch.equal(every_page([*layers, layers[1]]), in_order), "layers of other groups share a slot"


@pytest.mark.parametrize("kind", ["a gap", "not contiguous"])
def test_caches_that_are_not_one_array_are_refused_in_one_line(kind):
    layers = caches(3, gap=8 if kind == "a gap" else 0)
    if kind == "not contiguous":
        layers[1].kv_cache = layers[1].kv_cache.transpose(2, 3)
    with pytest.raises(KVCompressionError, match=r"not one \[layer, block, head\] array") as error:
        every_page(layers)
    assert "\n" not in str(error.value)


def test_backends_are_ours_while_layers_are_built_and_vllms_before_and_after():
    backend = AttentionBackendEnum.CPU_ATTN
    stock = backend.get_path()
    ours = "vllm_kvcompress.attention.cpu.CompressedCPUAttentionBackend"
    with backend_overrides({backend: ours}):
        assert backend.get_path() == ours
    assert backend.get_path() == stock
    with pytest.raises(RuntimeError, match="a layer"), backend_overrides({backend: ours}):
        raise RuntimeError("a layer that cannot be built")
    assert backend.get_path() == stock
