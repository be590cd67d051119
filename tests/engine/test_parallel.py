"""Tensor and pipeline parallelism: every rank compacts its own heads and layers as one process would."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from harness import NUM_BLOCKS, Compaction, Engine, external_id, first_difference, sampling, start, tokens

from vllm_kvcompress import load_prefix, save_prefix

NUM_TOKENS = 8
SIZES = {"tensor": 3, "pipeline": 2}

REQUESTS = {
    "snapkv": "snapkv:budget=0.25",
    "streaming_llm": "streaming_llm:budget=0.5",
    "snapkv, again": "snapkv:budget=0.4,recompact_every=4",
    "h2o": "h2o:budget=0.4",
    "criticalkv": "criticalkv:budget=0.4",  # reads the rank's part of the output projection
    "kvzip": "kvzip:budget=0.4,allocation=uniform,chunk=128",
    "adakv": "adakv:budget=0.4",
    "kv_compress": "kv_compress:budget=0.4",
    "off": "off",
    "expected_attention": "expected_attention:budget=0.4",  # needs the rotary embedding of the rank's layers
    "foresight": "foresight:budget=0.4,allocation=uniform",  # needs the networks of the rank's heads
    "kivi": "kivi:recompact_every=4",
    "snapkv+kivi8": "snapkv+kivi8:budget=0.1",
    "threshold": "foresight:budget=0.8,threshold=1e4",  # not on pipeline ranks, whose layers are not all
    "snapkv+auto": "snapkv+auto:budget=0.1,recompact_every=4",
    "snapkv+mixed_dim": "snapkv+mixed_dim:budget=0.3,recompact_every=4",
    "mixed_dim_kv": "mixed_dim_kv:budget=0.3,allocation=uniform",
    "matched": "attention_matching+kivi8:budget=0.1,allocation=uniform,chunk=128,references=64,waits=true",
}
COMPACTED = [name for name in REQUESTS if name not in ("off", "threshold")]
ENCODED = ["kivi", "snapkv+kivi8", "snapkv+auto", "snapkv+mixed_dim", "mixed_dim_kv", "matched"]
# What a head keeps depends on nothing outside the head, or outside its layer.
OF_HEADS = [name for name in COMPACTED if name not in ("adakv", "kv_compress")]
OF_LAYERS = [*OF_HEADS, "adakv"]
LOCAL = [("tensor", name) for name in OF_HEADS] + [("pipeline", name) for name in OF_LAYERS]


@pytest.fixture(scope="module", autouse=True)
def short_vectors_lose_little():
    """Ranks are processes of their own, and lose what they lose."""


@dataclass
class Rank:
    """What one worker did.

    Attributes:
        first_layer: of the model, among its own.
        first_head: KV head, likewise.
        compactions: in order.
        whole: of those that wrote to other blocks than they read, whether they wrote every page of them.
        left: requests it still knows of at the end.
    """

    first_layer: int
    first_head: int
    compactions: list[Compaction]
    whole: list[bool]
    left: int


@dataclass
class Parallel:
    """What an engine of several workers did.

    Attributes:
        sent: Jobs in the order in which the scheduler sent them.
        outputs: by name.
        ranks: by rank.
        free: blocks at the end.
        pinned: the answer of a request that left a compacted prefix, and of two that went on from it with a
            part of that answer: from what was in the cache, and from what was saved and loaded again.
    """

    sent: list
    outputs: dict
    ranks: list[Rank]
    free: int
    pinned: list[list[int]]


# ---------------------------------------------------------------------- in the workers, by `collective_rpc`


def watch(wrapper) -> None:
    """Keep a record of every compaction; its blocks hold NaN until it writes them."""
    from vllm.distributed import get_pp_group

    worker = wrapper.worker
    compactor, worker.compactions, worker.whole = worker.compactor, [], []
    if not get_pp_group().is_first_rank:
        # It needs a place for what the rank before sends. vLLM makes it when it warms up, which its CPU
        # worker leaves out without torch.compile.
        worker.model_runner._dummy_run(1)
    run = compactor.run

    def watched(works):
        jobs = [work.job for work in works]
        read = {block for job in jobs for block in (*job.previous, *job.source, *job.tail)}
        elsewhere = [
            index
            for index, job in enumerate(jobs)
            if read.isdisjoint(job.destination)
            and job.config.record_format is None  # whose bytes are no numbers
        ]
        pages = [compactor.grid.linear_pages(torch.tensor(job.destination)) for job in jobs]
        for index in elsewhere:
            compactor.cache.pages[pages[index]] = torch.nan
        tables = run(works)
        for index in elsewhere:
            filled = pages[index][: int(tables[index].counts.sum())]
            worker.whole.append(bool(compactor.cache.pages[filled].isfinite().all()))
        return tables

    compactor.run = watched
    compactor.listeners.append(
        lambda job, *kept: worker.compactions.append(Compaction(job, *kept, job.num_tokens))
    )


def report(wrapper) -> Rank:
    from vllm.distributed import get_tensor_model_parallel_rank

    worker = wrapper.worker
    state, heads = worker.compression, worker.compactor.grid.num_heads
    return Rank(
        first_layer=worker.model_runner.get_model().model.start_layer,
        first_head=get_tensor_model_parallel_rank() * heads,
        compactions=worker.compactions,
        whole=worker.whole,
        left=len(state.tables) + len(state.observer),
    )


# ---------------------------------------------------------------------- in a process of its own


def serve(folder: Path, model: str, kind: str) -> None:
    """All requests in one batch on several workers."""
    prompts = pickle.loads((folder / "prompts").read_bytes())
    size = {f"{kind}_parallel_size": SIZES[kind]}
    llm = start(Path(model), **size, additional_config={"kv_compression": "snapkv:budget=0.25"})
    core = llm.llm_engine.engine_core.engine_core
    scheduler, sent, outputs = core.scheduler, [], {}
    schedule = scheduler.schedule

    def recorded(*args, **kwargs):
        output = schedule(*args, **kwargs)
        sent.extend(output.kv_compression.jobs)
        return output

    def finish():
        while llm.llm_engine.has_unfinished_requests():
            outputs.update((out.request_id, out) for out in llm.llm_engine.step() if out.finished)

    scheduler.schedule = recorded
    llm.collective_rpc(watch)
    for name, prompt in prompts.items():
        if name == "threshold" and kind == "pipeline":
            continue
        params = sampling(NUM_TOKENS, REQUESTS[name])
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
    finish()
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    for name in ("tells the workers", "of those that ended"):
        llm.llm_engine.add_request(name, {"prompt_token_ids": [1, 2, 3]}, sampling(1, "off"))
        finish()
    assert not scheduler.requests and not scheduler.compacting_manager.compacted
    result = Parallel([*sent], outputs, llm.collective_rpc(report), free, [])

    def answer(prompt: list[int], method: str, max_tokens: int) -> list[int]:
        llm.llm_engine.add_request("pinned", {"prompt_token_ids": prompt}, sampling(max_tokens, method))
        finish()
        return tokens(outputs.pop("pinned"))

    # Of whole blocks: what is behind them is computed anew, on what was compacted.
    method, document = "snapkv+kivi8:budget=0.1", prompts["off"][:224]
    result.pinned.append(answer(document, f"{method},prefix=document", 80))
    for path in (str(folder / f"{kind}-document"), None):
        result.pinned.append(answer(document + result.pinned[0][:60], method, 20))
        (prefix,) = scheduler._prefixes
        assert prefix.hits == 1
        if path is not None:
            save_prefix(llm, "document", path)
            scheduler._prefixes.drop(prefix)
            assert len(list(folder.glob(f"{kind}-document.*"))) == SIZES[kind]
            load_prefix(llm, path)
    (folder / kind).write_bytes(pickle.dumps(result))
    core.shutdown()


def main(folder: str, model: str) -> None:
    from vllm.v1.executor import multiproc_executor

    # Importing vLLM takes every process ten seconds, which a fork has done. (vLLM's CPU platform insists on
    # new processes for the sake of thread binding, which is off here.)
    fork = multiprocessing.get_context("fork")
    multiproc_executor.get_mp_context = lambda: fork
    for kind in SIZES:
        process = fork.Process(target=serve, args=(Path(folder), model, kind))
        process.start()
        process.join()
        assert process.exitcode == 0, kind


# ---------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def prompts(long_ids) -> dict[str, list[int]]:
    return {name: long_ids(171 + 9 * index, seed=400 + index) for index, name in enumerate(REQUESTS)}


@pytest.fixture(scope="module")
def parallel(random_model, prompts, tmp_path_factory) -> dict[str, Parallel]:
    """Both kinds, one after the other, in a process whose threads are not bound to cores."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "prompts").write_bytes(pickle.dumps(prompts))
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # nothing compiled
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for functions sent to workers
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
    }
    # The module is imported rather than run, so that what it pickles has the names it has here.
    script = "import sys, test_parallel; test_parallel.main(*sys.argv[1:])"
    command = [sys.executable, "-c", script, str(folder), str(random_model)]
    run = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    return {kind: pickle.loads((folder / kind).read_bytes()) for kind in SIZES}


@pytest.fixture(scope="module")
def single(shared_engine: Engine, prompts) -> tuple[dict, dict]:
    """Outputs and compactions by name, of one process."""
    shared_engine.forget_prefixes()
    shared_engine.compactions.clear()
    for name, prompt in prompts.items():
        shared_engine.add(prompt, sampling(NUM_TOKENS, REQUESTS[name]), name)
    shared_engine.finish()
    outputs = {name: shared_engine.outputs.pop(name) for name in REQUESTS}
    return outputs, {name: of(shared_engine.compactions, name) for name in REQUESTS}


def of(compactions: list[Compaction], name: str) -> list[Compaction]:
    return [compaction for compaction in compactions if compaction.request == name]


@pytest.fixture(params=SIZES)
def kind(request) -> str:
    return request.param


def test_each_rank_holds_its_part(parallel):
    parts = {
        kind: [(r.first_layer, r.first_head, *r.compactions[0].counts.shape) for r in parallel[kind].ranks]
        for kind in SIZES
    }
    assert parts["tensor"] == [(0, 0, 4, 1), (0, 1, 4, 1), (0, 2, 4, 1)]
    assert parts["pipeline"] == [(0, 0, 2, 3), (2, 0, 2, 3)]


def test_every_rank_runs_every_job_once_in_order(parallel, kind):
    sent = parallel[kind].sent
    assert {external_id(job.request_id) for job in sent} - {"threshold"} == {*COMPACTED}
    assert any(job.previous for job in sent)
    for rank in parallel[kind].ranks:
        assert [compaction.job for compaction in rank.compactions] == sent


def test_every_rank_fills_exactly_its_pages(parallel, kind):
    for rank in parallel[kind].ranks:
        for compaction in rank.compactions:
            if compaction.job.config.record_format is not None:
                assert int(compaction.counts.sum()) == len(compaction.kept)
                continue
            pages = len(compaction.job.destination) * compaction.counts.numel()
            if compaction.request == "threshold":
                pages = int(compaction.counts.sum())
                assert pages % compaction.counts.numel() == 0
            assert int(compaction.counts.sum()) == len(compaction.kept) == pages
            assert int(compaction.counts.min()) >= 1
        assert len(rank.whole) >= len(COMPACTED) - len(ENCODED) and all(rank.whole)


@pytest.mark.parametrize(("kind", "name"), LOCAL)
def test_what_is_local_to_a_rank_is_kept_as_in_one_process(parallel, single, kind, name):
    exchanged = total = 0
    for rank in parallel[kind].ranks:
        pairs = zip(of(rank.compactions, name), single[1][name], strict=True)
        for part, whole in pairs:
            assert (part.job.num_tokens, part.job.boundary) == (whole.job.num_tokens, whole.job.boundary)
            expected = whole.positions()
            for layer, of_heads in enumerate(part.positions()):
                for head, kept in enumerate(of_heads):
                    other = expected[rank.first_layer + layer][rank.first_head + head]
                    assert len(kept) == len(other)
                    exchanged, total = exchanged + len({*kept} - {*other}), total + len(kept)
    # Ranks add their shares in an order of their own, which may exchange tokens that all but tie.
    assert exchanged <= total / 1000


def test_who_goes_on_from_a_compacted_prefix_answers_as_who_left_it(parallel, kind):
    said, *gone_on = parallel[kind].pinned
    assert gone_on == [said[60:]] * 2


def test_heads_and_layers_differ_in_what_they_keep(single):
    # Otherwise ranks could have each other's part and nobody would see it.
    for name in OF_LAYERS:
        if name not in ("streaming_llm", "kivi"):
            kept = [tuple(head) for layer in single[1][name][0].positions() for head in layer]
            assert len(set(kept)) == 12, name


@pytest.mark.parametrize(("kind", "name"), [*LOCAL, ("tensor", "off"), ("pipeline", "off")])
def test_answers_are_those_of_one_process(parallel, single, kind, name):
    assert first_difference(parallel[kind].outputs[name], single[0][name]) is None


def test_heads_of_one_layer_on_several_ranks_get_the_same_number_of_pages(parallel, single):
    # The documented limit: what pools heads, or layers, pools those of a rank.
    for rank in parallel["tensor"].ranks:
        for compaction in of(rank.compactions, "adakv"):
            assert compaction.counts.unique().tolist() == [len(compaction.job.destination)]
    assert len(single[1]["adakv"][0].counts.unique()) > 1
    for rank in parallel["pipeline"].ranks:
        assert len(of(rank.compactions, "kv_compress")[0].counts.unique()) > 1


def test_all_ranks_keep_what_the_one_that_needs_most_needs(parallel, single):
    (alone,) = single[1]["threshold"]
    (on_each,) = zip(*(of(rank.compactions, "threshold") for rank in parallel["tensor"].ranks), strict=True)
    blocks = {int(compaction.counts.sum()) // compaction.counts.numel() for compaction in on_each}
    most = len(alone.job.destination)
    # Alone, heads that need little leave their pages to the others.
    assert len(blocks) == 1 and int(alone.counts.sum()) // alone.counts.numel() < min(blocks) < most


def test_every_block_comes_back_and_no_rank_remembers_anything(parallel, kind):
    assert parallel[kind].free == NUM_BLOCKS - 1
    assert [rank.left for rank in parallel[kind].ranks] == [0] * SIZES[kind]


def test_compaction_shows_in_the_tokens(parallel, shared_engine, prompts):
    # Otherwise equal answers would not show that the ranks read their pages right.
    requests = [(prompts[name], sampling(NUM_TOKENS, "off")) for name in OF_HEADS]
    plain = shared_engine.run_all(requests)
    for kind in SIZES:
        answers = [parallel[kind].outputs[name] for name in OF_HEADS]
        assert sum(tokens(one) != tokens(two) for one, two in zip(answers, plain, strict=True)) >= 3
