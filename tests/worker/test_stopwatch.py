"""Shares of solves are timed where they are done, and nobody waits for that."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.job import CompressionStep, Job, Solve
from vllm_kvcompress.worker import stopwatch
from vllm_kvcompress.worker.stopwatch import DeviceStopwatch, HostStopwatch, Stopwatch
from vllm_kvcompress.worker.worker import CompressionWorker


class Device:
    """A queue of events, as of a stream: the host is ahead of it.

    Attributes:
        now: seconds on the device.
        queued: what is to be done, in order: seconds of work, or an event.
    """

    def __init__(self) -> None:
        self.now = 100.0
        self.queued: list = []

    def catch_up(self, pieces: int = 1 << 30) -> None:
        for piece in self.queued[:pieces]:
            if isinstance(piece, float):
                self.now += piece
            else:
                piece.done = self.now
        del self.queued[:pieces]


@pytest.fixture
def device(monkeypatch) -> Device:
    device = Device()

    class Event:
        """Whoever synchronises fails: there is no such method."""

        def __init__(self, enable_timing):
            assert enable_timing
            self.done = None

        def record(self):
            device.queued.append(self)

        def query(self):
            return self.done is not None

        def elapsed_time(self, end):
            assert self.done is not None and end.done is not None, "it would be an error"
            return 1000 * (end.done - self.done)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return device


def test_each_device_has_the_one_that_knows_when_its_work_is_done():
    assert type(Stopwatch.of(torch.device("cpu"))) is HostStopwatch
    assert type(Stopwatch.of(torch.device("cuda", 0))) is DeviceStopwatch


def test_on_a_cpu_work_is_done_when_it_returns(monkeypatch):
    times = iter([5.0, 5.5])
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    watch = HostStopwatch()
    assert watch.read() is None
    with watch.parts(2):
        pass
    assert watch.read() == 0.25 and watch.read() is None


def test_on_a_gpu_it_is_read_once_it_is_done_however_late(device):
    watch = DeviceStopwatch()
    for seconds, parts in ((0.4, 2), (0.9, 3)):
        device.queued.append(7.0)  # others' work before it
        with watch.parts(parts):
            device.queued.append(seconds)
        assert watch.read() is None, "it has not even begun"
    device.catch_up(3)
    assert watch.read() is None, "it has begun"
    device.catch_up(1)
    assert watch.read() == pytest.approx(0.2) and watch.read() is None
    device.catch_up()
    assert watch.read() == pytest.approx(0.3) and watch.read() is None


def test_all_that_is_done_is_added_up_once(device, monkeypatch):
    watch = DeviceStopwatch()
    for seconds in (0.4, 0.9, 0.2):
        with watch.parts(1):
            device.queued.append(seconds)
    device.catch_up(6)  # the first two, each between its events
    assert watch.total() == pytest.approx(1.3) and watch.total() == 0
    device.catch_up()
    assert watch.total() == pytest.approx(0.2)
    times = iter([5.0, 5.5])
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    host = HostStopwatch()
    with host.parts(1):
        pass
    assert host.total() == 0.5 and host.total() == 0


def test_a_step_reports_what_the_device_has_done_by_then_also_of_steps_before(device, monkeypatch):
    class Bare(CompressionWorker):
        def __init__(self):
            observer = SimpleNamespace(of=lambda name: None, recall=lambda name: None, num_drafts={})
            self.compression = SimpleNamespace(observer=observer, live=False)
            grid = SimpleNamespace(num_groups=1)
            solve = lambda solve, observed: device.queued.append(0.5)  # noqa: E731
            self.compactor = SimpleNamespace(solve=solve, grid=grid)
            self._stopwatch, self._compacting = DeviceStopwatch(), DeviceStopwatch()

        def make_cache(self, grid, layers, builder):
            raise AssertionError("not called")

    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    monkeypatch.setattr(Worker, "execute_model", lambda self, scheduled: output)
    worker, config = Bare(), KVCompressionConfig.parse("attention_matching")
    job = Job("a", config, 40, 32, 0, (), (1, 2), (3,), (), solved=True)

    def reported(*solves):
        step = CompressionStep(solves=list(solves))
        told = SimpleNamespace(kv_compression=step, finished_req_ids=set(), scheduled_spec_decode_tokens={})
        report = getattr(worker.execute_model(told), "kv_compression", None)
        return None if report is None else report.solving_seconds

    assert reported(Solve(job, 1, range(0, 2), 6), Solve(job, 1, range(2, 3), 6)) is None
    assert reported() is None
    device.catch_up()
    assert reported(Solve(job, 1, range(3, 4), 6)) == pytest.approx(1.0 / 3)
    device.catch_up()
    assert reported() == pytest.approx(0.5)
    assert reported() is None
