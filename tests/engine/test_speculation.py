"""ngram speculation changes neither a token nor what a head keeps, however drafts and compactions fall."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from harness import NUM_BLOCKS, ROTATES, Engine, external_id, first_difference, sampling, tokens

NGRAM = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1)
NUM_TOKENS = 44
EVERY = 6  # so that most compaction points lie within reach of a step's drafts

REQUESTS = {
    "snapkv": "snapkv:budget=0.25",
    "snapkv, again": f"snapkv:budget=0.25,recompact_every={EVERY}",
    "snapkv, streaming": f"snapkv:budget=0.25,when=streaming,recompact_every={4 * EVERY}",
    "adakv, again": f"adakv:budget=0.3,recompact_every={EVERY}",
    "kv_compress, again": f"kv_compress:budget=0.25,recompact_every={EVERY}",
    "streaming_llm, again": f"streaming_llm:budget=0.25,recompact_every={EVERY}",
    # What these sum up must hold the queries of accepted drafts, and of no rejected one.
    "expected_attention, again": f"expected_attention:budget=0.3,recompact_every={EVERY}",
    "h2o, again": f"h2o:budget=0.3,recompact_every={EVERY}",
    "kivi, again": f"kivi:recompact_every={EVERY}",
    "snapkv+kivi8, again": f"snapkv+kivi8:budget=0.3,recompact_every={EVERY}",
    "snapkv+auto, again": f"snapkv+auto:budget=0.2,recompact_every={EVERY}",
    "mixed_dim_kv, again": f"mixed_dim_kv:budget=0.2,recompact_every={EVERY}",
    "off": "off",
    # What repeats a prompt reads none of its drafts.
    "matched": "attention_matching+kivi8:budget=0.1,chunk=128,references=64,waits=true",
    "matched by itself": "attention_matching+kivi8:budget=0.1,queries=prompt,references=64,waits=true",
}
AGAIN = [name for name in REQUESTS if "recompact_every" in REQUESTS[name]]
ALONE = [f"{method}, again" for method in ("snapkv", "adakv", "kv_compress", "streaming_llm", "h2o", "kivi")]


@dataclass
class Drafts:
    """What became of drafts, counted by request.

    Attributes:
        accepted: that were right.
        rejected: that ran and were wrong.
        cut: that the scheduler left out.
    """

    accepted: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)
    cut: Counter = field(default_factory=Counter)


@dataclass
class Run:
    """What came of some requests, by name."""

    outputs: dict
    compactions: dict[str, list]


def prompt_of(name: str, long_ids) -> list[int]:
    """A passage that comes again and again, a word of it changed each time, so that drafts are half right."""
    index = list(REQUESTS).index(name)
    passage = long_ids(50, seed=800 + index)
    ids = []
    for turn in range(6):
        again = list(passage)
        again[7 * turn + 3] = 1000 + turn
        ids += again
    return ids[: 230 + 7 * index]


def params_of(name: str):
    return sampling(NUM_TOKENS, REQUESTS[name])


def serve(engine: Engine, names, long_ids) -> Run:
    """Some of the requests in one batch, on an empty prefix cache."""
    engine.forget_prefixes()
    engine.compactions.clear()
    for name in names:
        engine.add(prompt_of(name, long_ids), params_of(name), name)
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        engine.check_accounts()
    run = Run({name: engine.outputs.pop(name) for name in names}, {name: [] for name in names})
    for compaction in engine.compactions:
        run.compactions[compaction.request].append(compaction)
    return run


@pytest.fixture(scope="module")
def repetitive_model(random_model, tokenizer, tmp_path_factory) -> Path:
    """The random model, made to say little else than six words, so that drafts are right now and then."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    model.model.embed_tokens.weight.data *= 7  # the last word decides what comes next more than the others
    model.lm_head.weight.data[6:] *= 0.1
    folder = tmp_path_factory.mktemp("models") / "repetitive-llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unspeculative(engines, repetitive_model) -> Engine:
    return engines(repetitive_model, "snapkv:budget=0.25")


@pytest.fixture(scope="module")
def speculative(engines, repetitive_model, unspeculative) -> Engine:
    """Its twin that speculates."""
    # Only now, because vLLM cannot start an engine where numba is imported: it looks for kernels in what
    # every module holds, and numba's compiler holds an object that claims to have any attribute.
    import numba
    from llvmlite.binding import ffi

    ffi._lib_fn_wrapper.get = lambda *_: None  # for the engines that are started after this one
    numba.config.THREADING_LAYER = "workqueue"  # its OpenMP layer changes the threads of vLLM's kernels
    return engines(repetitive_model, "snapkv:budget=0.25", speculative_config=NGRAM)


@pytest.fixture(scope="module")
def drafts(speculative) -> Drafts:
    """Counts from now on."""
    seen, scheduler = Drafts(), speculative.scheduler
    schedule, update = scheduler.schedule, scheduler.update_from_output

    def scheduled(*args, **kwargs):
        offered = {id: len(request.spec_token_ids) for id, request in scheduler.requests.items()}
        output = schedule(*args, **kwargs)
        for id in output.num_scheduled_tokens:
            used = len(output.scheduled_spec_decode_tokens.get(id, ()))
            seen.cut[external_id(id)] += offered.get(id, used) - used  # repetitions come while it schedules
        return output

    def updated(scheduler_output, model_output):
        for id, drafts in scheduler_output.scheduled_spec_decode_tokens.items():
            sampled = model_output.sampled_token_ids[model_output.req_id_to_index[id]]
            seen.accepted[external_id(id)] += len(sampled) - 1
            seen.rejected[external_id(id)] += len(drafts) - len(sampled) + 1
        return update(scheduler_output, model_output)

    scheduler.schedule, scheduler.update_from_output = scheduled, updated
    return seen


@pytest.fixture(scope="module")
def plain(unspeculative, long_ids) -> Run:
    """All requests in one batch, without speculation."""
    return serve(unspeculative, REQUESTS, long_ids)


@pytest.fixture(scope="module")
def batch(speculative, drafts, long_ids) -> Run:
    """All requests in one batch, with speculation."""
    return serve(speculative, REQUESTS, long_ids)


def check_same(run: Run, other: Run, name: str, long_ids) -> None:
    """Both runs gave a request the same tokens and kept the same of it, up to a near-tie between tokens."""
    index = first_difference(run.outputs[name], other.outputs[name])
    last = len(prompt_of(name, long_ids)) + (NUM_TOKENS if index is None else index)
    pairs = zip(run.compactions[name], other.compactions[name], strict=index is None)
    for one, two in ((one, two) for one, two in pairs if two.job.num_tokens <= last):
        assert one.num_computed == one.job.num_tokens == two.job.num_tokens, "it was compacted when due"
        assert one.job.boundary == two.job.boundary
        assert one.counts.tolist() == two.counts.tolist()
        # Drafts are computed several at a time: another order of sums may exchange tokens that all but tie.
        exchanged = total = 0
        for mine, its in zip(one.positions(), two.positions(), strict=True):
            for kept, expected in zip(mine, its, strict=True):
                exchanged, total = exchanged + len(set(kept) - set(expected)), total + len(kept)
        assert exchanged <= total / 1000


def test_of_every_request_drafts_are_accepted_rejected_and_cut_at_compaction_points(batch, drafts):
    for name in REQUESTS:
        assert drafts.accepted[name] > 0 and drafts.rejected[name] > 0, name
        assert drafts.cut[name] > 0 or name not in AGAIN, name


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_in_a_batch_is_the_same_as_without_speculation(plain, batch, long_ids, name):
    check_same(batch, plain, name, long_ids)
    assert bool(batch.compactions[name]) == (name != "off")
    assert any(compaction.job.previous for compaction in batch.compactions[name]) == (name in AGAIN)


@pytest.mark.parametrize("name", ALONE)
def test_a_request_alone_is_the_same_as_without_speculation(plain, speculative, drafts, long_ids, name):
    before = drafts.accepted[name]
    check_same(serve(speculative, [name], long_ids), plain, name, long_ids)
    assert drafts.accepted[name] > before


@pytest.mark.parametrize("name", ["snapkv, again", "h2o, again"])
def test_a_request_preempted_with_drafts_in_hand_is_the_same(plain, speculative, drafts, long_ids, name):
    speculative.forget_prefixes()
    speculative.compactions.clear()
    speculative.add(prompt_of(name, long_ids), params_of(name), name)
    request = speculative.live(name)
    while len(speculative.compactions) < 2 or not request.spec_token_ids:
        assert not request.is_finished()
        speculative.step()
    speculative.scheduler.running.remove(request)
    speculative.scheduler._preempt_request(request, 0.0)
    speculative.compactions.clear()
    speculative.finish()
    again = Run({name: speculative.outputs.pop(name)}, {name: list(speculative.compactions)})
    check_same(again, plain, name, long_ids)


def test_every_block_comes_back(speculative, batch):
    speculative.check_nothing_left()
    assert speculative.free == NUM_BLOCKS - 1


def test_compaction_shows_in_the_tokens(speculative, batch, long_ids):
    # Otherwise equality would not show that pages are read right.
    requests = [(prompt_of(name, long_ids), sampling(NUM_TOKENS, "off")) for name in ALONE]
    uncompressed = speculative.run_all(requests)
    differ = [
        tokens(out) != tokens(batch.outputs[name]) for name, out in zip(ALONE, uncompressed, strict=True)
    ]
    assert sum(differ) >= 3


OTHERS = {"deepseek": ROTATES, "gemma3": {}, "llama4": {}}  # latents; beside windows; beside chunks


@pytest.fixture(scope="module", params=OTHERS)
def twins(request, engines, deepseek, hybrids, speculative) -> tuple[Engine, Engine]:
    """An engine of another kind of model, and its twin that speculates."""
    model = (hybrids | {"deepseek": deepseek})[request.param]
    options = OTHERS[request.param]
    plain = engines(model, "snapkv:budget=0.25", **options)
    return plain, engines(model, "snapkv:budget=0.25", **options, speculative_config=NGRAM)


@pytest.mark.parametrize("method", ["snapkv", "h2o"])
def test_drafts_change_neither_a_token_nor_what_is_kept_of_other_kinds_of_models(twins, long_ids, method):
    # Of latents vLLM computes drafts as it computes prompts: over context that is gathered by tables. Windows
    # move on, and a chunk ends at 384 tokens, while some drafts turn out wrong.
    prompt = prompt_of("off", long_ids)
    few_words = dict(allowed_token_ids=[prompt[0], prompt[20], prompt[40]])  # so that some are right
    params = sampling(90, f"{method}:budget=0.3,recompact_every={EVERY}", **few_words)
    plain, drafting = twins
    accepted, rejected, update = 0, 0, drafting.scheduler.update_from_output

    def counted(scheduled, output, *args):
        nonlocal accepted, rejected
        for name, drafts in scheduled.scheduled_spec_decode_tokens.items():
            right = len(output.sampled_token_ids[output.req_id_to_index[name]]) - 1
            accepted, rejected = accepted + right, rejected + len(drafts) - right
        return update(scheduled, output, *args)

    for engine in twins:
        engine.forget_prefixes(), engine.compactions.clear()
    free = drafting.free
    drafting.scheduler.update_from_output = counted
    try:
        expected, got = plain.run(prompt, params), drafting.run(prompt, params)
    finally:
        drafting.scheduler.update_from_output = update
    print(f"{accepted} drafts accepted, {rejected} rejected")
    assert accepted > 3 and rejected > 3
    assert len(plain.compactions) > 2
    assert first_difference(got, expected) is None
    for one, other in zip(drafting.compactions, plain.compactions, strict=True):
        assert one.job.num_tokens == other.job.num_tokens and torch.equal(one.kept, other.kept)
    drafting.check_accounts(), drafting.check_nothing_left()
    assert drafting.free == free
