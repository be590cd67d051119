"""The script that measures a GPU: who comes when, what is told of it, and that an engine serves it."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "measure_gpu.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("measure_gpu", SCRIPT)
    module = sys.modules["measure_gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["measure_gpu"]


class Engine:
    """Each step takes a second and gives one token to every request, or to the oldest two of them.

    Attributes:
        now: seconds.
        added: of each request, when it was handed over.
    """

    def __init__(self, tokens: int, most: int = 2) -> None:
        self.now, self.tokens, self.most = 100.0, tokens, most
        self.added: list[float] = []
        self.running: dict[str, list[int]] = {}
        self.llm_engine = self

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert not self.running and seconds > 0
        self.now += seconds

    def add_request(self, name, prompt, sampling) -> None:
        assert name not in self.running
        self.added.append(self.now - 100)
        self.running[name] = []

    def step(self):
        self.now += 1
        for name in list(self.running)[: self.most]:
            own = self.running[name]
            own.append(7)
            if finished := len(own) == self.tokens:
                del self.running[name]
            yield SimpleNamespace(
                request_id=name, outputs=[SimpleNamespace(token_ids=list(own))], finished=finished
            )


@pytest.fixture(autouse=True)
def without_sampling(script, monkeypatch):
    monkeypatch.setattr(script, "_sampling", lambda tokens, extra: None)


def test_requests_come_at_their_moments_and_wait_from_then_on(script):
    engine = Engine(tokens=3)
    served = script.serve(engine, ["p"] * 4, 3, moments=[0.0, 0.5, 0.6, 20.0], clock=engine)
    # The third has come while a step was computed, and is served when the first is done.
    assert engine.added == [0, 1, 1, 20]
    assert served.came == [0.0, 0.5, 0.6, 20.0]
    assert served.seen == [[1, 2, 3], [2, 3, 4], [4, 5, 6], [21, 22, 23]]
    summary = served.summary()
    assert served.seconds == 23 and summary["output_tokens_per_second"] == pytest.approx(12 / 23)
    assert summary["p50_seconds_to_first_token"] == pytest.approx(np.median([1, 1.5, 3.4, 1]))
    assert summary["p99_seconds_to_first_token"] == pytest.approx(np.percentile([1, 1.5, 3.4, 1], 99))
    assert summary["p99_seconds_between_tokens"] == summary["mean_seconds_between_tokens"] == 1


def test_a_closed_loop_keeps_so_many_in_flight_and_who_is_sent_later_has_not_waited(script):
    engine = Engine(tokens=3)
    served = script.serve(engine, ["p"] * 4, 3, at_once=2, clock=engine)
    assert engine.added == served.came == [0, 0, 3, 3] and served.seconds == 6


def test_arrivals_are_poissons_at_any_rate_the_same_but_for_the_scale(script):
    moments = np.array(script.arrivals(2.0, 4000))
    gaps = np.diff(moments)
    assert moments[0] == 0 and (gaps > 0).all()
    assert gaps.mean() == pytest.approx(0.5, rel=0.06) and gaps.std() == pytest.approx(0.5, rel=0.06)
    assert script.arrivals(8.0, 4000) == pytest.approx(moments / 4)
    assert script.arrivals(math.inf, 5) == [0.0] * 5


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], list(range(101)), [5.0, 1.0, 4.0]])
@pytest.mark.parametrize("percent", [0, 50, 99, 100])
def test_percentiles_are_numpys(script, values, percent):
    assert script.percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_a_table_has_every_variant_of_a_load_in_one_row(script):
    cells = {name: [{"prompt": 256, "rate": "inf", "a_b": at}] for at, name in enumerate(("stock", "1/4"))}
    assert script.table(cells, "rate", ["a_b"]) == [
        "| prompt | rate | stock: a b | 1/4: a b |",
        "| --- | --- | --- | --- |",
        "| 256 | inf | 0 | 1 |",
    ]


@pytest.mark.parametrize(
    ("option", "reason"),
    [("--parts=kernels,all", "kernels"), ("--rates=0,1", "above 0"), ("--rates=some", "number")],
)
def test_wrong_options_are_refused_before_anything_is_started(
    script, monkeypatch, capsys, option, reason, tmp_path
):
    monkeypatch.setattr(sys, "argv", ["measure_gpu.py", "--output", str(tmp_path / "never"), option])
    with pytest.raises(SystemExit):
        script.main()
    assert option.split("=")[0] in (said := capsys.readouterr().err) and reason in said
    assert not (tmp_path / "never").exists()


def test_a_small_engine_serves_requests_that_come_when_they_come(tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--output",
        tmp_path,
        "--engine",
        "1/4:rates",
        "--tiny",
        "--rates",
        "4",
    ]
    environment = {"MEASURED_MODELS": str(tmp_path), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    light, heavy = json.loads((tmp_path / "1-of-4-rates.json").read_text())
    assert (light["rate"], heavy["rate"]) == ("4", "inf")
    for cell in (light, heavy):
        assert cell["output_tokens_per_second"] == pytest.approx(16 * cell["requests_per_second"])
        assert 0 < cell["p50_seconds_between_tokens"] <= cell["p99_seconds_between_tokens"]
        assert 0 < cell["p50_seconds_to_first_token"] <= cell["p99_seconds_to_first_token"]
