"""Latents under tensor and pipeline parallelism: ranks with other query heads keep the same tokens."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import NUM_BLOCKS, ROTATES, Compaction, external_id, first_difference, sampling, start
from test_hybrids_parallel import warm_up

NUM_TOKENS = 40
METHODS = {
    "snapkv": "snapkv:budget=0.25",
    "snapkv, again": "snapkv:budget=0.4,recompact_every=8",
    "kv_compress": "kv_compress:budget=0.25",
    "h2o, again": "h2o:budget=0.4,recompact_every=16",
    "tova": "tova:budget=0.4",
    "kvzip": "kvzip:budget=0.4,chunk=128",
    "keydiff": "keydiff:budget=0.4",
    "streaming_llm": "streaming_llm:budget=0.4",
    "off": "off",
}
OF_LAYERS = [name for name in METHODS if name not in ("off", "kv_compress", "kvzip")]  # each by itself


def serve(folder: Path, model: str, kind: str) -> None:
    """All requests in one batch on two workers."""
    prompts = pickle.loads((folder / "prompts").read_bytes())
    size = {f"{kind}_parallel_size": 2}
    llm = start(Path(model), **size, **ROTATES, additional_config={"kv_compression": "snapkv:budget=0.25"})
    core = llm.llm_engine.engine_core.engine_core
    outputs = {}
    llm.collective_rpc(watch)
    if kind == "pipeline":
        llm.collective_rpc(warm_up)
    for name, prompt in prompts.items():
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling(NUM_TOKENS, METHODS[name]))
    while llm.llm_engine.has_unfinished_requests():
        outputs.update((out.request_id, out) for out in llm.llm_engine.step() if out.finished)
    free = core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    (folder / kind).write_bytes(pickle.dumps((outputs, llm.collective_rpc(report), free)))
    core.shutdown()


def watch(wrapper) -> None:
    """Keep a record of every compaction, and of what this rank would have kept by its own query heads."""
    worker = wrapper.worker
    worker.compactions, worker.alone = [], []
    compactor = worker.compactor
    scoring = compactor._scoring
    agree = scoring._agree

    def watched(scores, how):
        agreed = agree(scores, how)
        worker.alone.append(torch.equal(scores.argsort(), agreed.argsort()))
        return agreed

    scoring._agree = watched
    compactor.listeners.append(
        lambda job, *kept: worker.compactions.append(Compaction(job, *kept, job.num_tokens))
    )


def report(wrapper) -> tuple:
    worker = wrapper.worker
    first_layer = worker.model_runner.get_model().model.start_layer
    return first_layer, worker.compactions, worker.alone, worker.compactor.grid.num_layers


def main(folder: str, model: str) -> None:
    from vllm.v1.executor import multiproc_executor

    fork = multiprocessing.get_context("fork")  # see `test_parallel`
    multiproc_executor.get_mp_context = lambda: fork
    for kind in ("tensor", "pipeline"):
        process = fork.Process(target=serve, args=(Path(folder), model, kind))
        process.start()
        process.join()
        assert process.exitcode == 0, kind


@pytest.fixture(scope="module")
def prompts(long_ids) -> dict[str, list[int]]:
    return {name: long_ids(301 + 9 * index, seed=500 + index) for index, name in enumerate(METHODS)}


@pytest.fixture(scope="module")
def parallel(deepseek, prompts, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "prompts").write_bytes(pickle.dumps(prompts))
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
    }
    script = "import sys, test_latents_parallel; test_latents_parallel.main(*sys.argv[1:])"
    command = [sys.executable, "-c", script, str(folder), str(deepseek)]
    run = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    return {kind: pickle.loads((folder / kind).read_bytes()) for kind in ("tensor", "pipeline")}


@pytest.fixture(scope="module")
def single(engines, deepseek, prompts) -> tuple[dict, dict]:
    """Outputs and compactions by name, of one process."""
    engine = engines(deepseek, "snapkv:budget=0.25", **ROTATES)
    engine.compactions.clear()
    for name, prompt in prompts.items():
        engine.add(prompt, sampling(NUM_TOKENS, METHODS[name]), name)
    engine.finish()
    outputs = {name: engine.outputs.pop(name) for name in METHODS}
    return outputs, {name: of(engine.compactions, name) for name in METHODS}


def of(compactions: list[Compaction], name: str) -> list[Compaction]:
    return [compaction for compaction in compactions if external_id(compaction.job.request_id) == name]


def exchanged(one: Compaction, other: Compaction, first_layer: int = 0) -> tuple[int, int]:
    """Tokens that one kept and the other did not, of how many; `one` has some of the other's layers."""
    assert one.job.num_tokens == other.job.num_tokens
    differ = total = 0
    whole = other.positions()
    for layer, (kept,) in enumerate(one.positions()):
        differ, total = differ + len({*kept} - {*whole[first_layer + layer][0]}), total + len(kept)
    return differ, total


def test_ranks_with_other_query_heads_keep_the_same_tokens_as_one_process(parallel, single):
    _, ((_, one, alone, _), (_, other, _, _)), _ = parallel["tensor"]
    assert not all(alone), "of their own accord ranks rank tokens otherwise, or nothing was to be agreed on"
    assert len(one) == len(other) > len(METHODS)
    for mine, yours in zip(one, other, strict=True):
        assert torch.equal(mine.counts, yours.counts) and torch.equal(mine.kept, yours.kept)
    for name in METHODS:
        for mine, whole in zip(of(one, name), single[1][name], strict=True):
            # A token that all but ties may be another one, and so may its page's layer.
            differ, total = exchanged(mine, whole)
            assert differ <= total / 200, name


def test_pipeline_ranks_compact_their_layers_as_one_process(parallel, single):
    _, ranks, _ = parallel["pipeline"]
    assert sorted(layers for _, _, _, layers in ranks) == [1, 2]
    for first_layer, compactions, _, layers in ranks:
        for name in METHODS:
            own = of(compactions, name)
            assert len(own) == len(single[1][name])
            for mine, whole in zip(own, single[1][name], strict=True):
                assert mine.counts.shape == (layers, 1)
                if name in OF_LAYERS:
                    differ, total = exchanged(mine, whole, first_layer)
                    assert differ <= total / 200, name


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_answers_are_those_of_one_process_and_every_block_comes_back(parallel, single, kind):
    outputs, _, free = parallel[kind]
    for name in METHODS if kind == "tensor" else [*OF_LAYERS, "off"]:
        assert first_difference(outputs[name], single[0][name]) is None, name
    assert free == NUM_BLOCKS - 1
