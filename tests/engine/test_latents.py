"""Multi-head latent attention (MLA): one latent per token and layer, and stock's own kernels over page runs.

The reference is Hugging Face's model, which keeps latents too but attends over the keys and values of every
query head, in float32, with a mask of what a layer dropped. So neither absorbed queries nor pages are in it.
"""

import math
import random
from dataclasses import dataclass
from fractions import Fraction

import pytest
import test_oracle as oracle
import torch
from crowd import Member, compacted, compare_with_alone, finished, in_time, serve, tolerate
from harness import ROTATES, exact, first_difference, same_kept, sampling, tokens
from test_pressure import options as under_pressure
from test_pressure import points_of, replayed
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import MLAAttentionSpec

BLOCK_SIZE = 16  # of vLLM's CPU kernel for latents
WINDOW, SINKS = 32, 4
LENGTH, NUM_TOKENS = 650, 24
POOL = 110

# scores, allocation, budget, options
CASES = {
    "streaming_llm": ("uniform", 0.5, "streaming_llm:budget=0.5"),
    "snapkv": ("uniform", 0.25, "snapkv:budget=0.25"),
    "snapkv, global": ("global", 0.25, "snapkv:budget=0.25,allocation=global"),
    "pyramidkv": ("pyramid", 0.5, "pyramidkv:budget=0.5"),
    "kv_compress": ("global", 0.125, "kv_compress:budget=0.125"),
    "kv_compress, uniform": ("uniform", 0.25, "kv_compress:budget=0.25,allocation=uniform"),
    "kv_compress_full": ("global", 0.25, "kv_compress_full:budget=0.25"),
    "h2o": ("uniform", 0.25, "h2o:budget=0.25"),
    "tova": ("uniform", 0.5, "tova:budget=0.5,window=32"),
    "keydiff": ("uniform", 0.25, "keydiff:budget=0.25"),
    "kvzip": ("global", 0.25, f"kvzip:budget=0.25,chunk={oracle.CHUNK}"),
}


@pytest.fixture(autouse=True)
def pages_of_latents(monkeypatch):
    """The oracle's allocations count in blocks of this size."""
    monkeypatch.setattr(oracle, "BLOCK_SIZE", BLOCK_SIZE)


@pytest.fixture
def engine(engines, deepseek):
    found = engines(deepseek, "snapkv:budget=0.25", **ROTATES)
    found.sent.clear(), found.compactions.clear(), found.outputs.clear()
    free = found.free
    yield found
    found.check_accounts(), found.check_nothing_left()
    assert found.free == free


@pytest.fixture
def stock(engines, deepseek, engine):
    return engines(deepseek, **ROTATES)


@pytest.fixture(scope="module")
def reference(deepseek):
    AttentionInterface.register("latent oracle", attention_with_masks)
    options = dict(dtype=torch.float32, attn_implementation="latent oracle")
    return oracle.Model(deepseek, AutoModelForCausalLM.from_pretrained(deepseek, **options).eval())


def attention_with_masks(module, query, key, value, attention_mask, scaling, **_):
    """`oracle.eager_attention`, where all of a layer's query heads `[1, Hq, q, D]` have the same bias."""
    if oracle.ATTENTION.bias is None:
        return oracle.eager_attention(module, query, key, value, attention_mask, scaling)
    whole = oracle.ATTENTION.bias
    oracle.ATTENTION.bias = whole.expand(-1, query.shape[1], -1)
    try:
        return oracle.eager_attention(module, query, key, value, attention_mask, scaling)
    finally:
        oracle.ATTENTION.bias = whole


# ---------------------------------------------------------------------- idle


def test_latents_are_compactable_and_stocks_in_every_other_respect(engine, stock):
    (group,) = engine.scheduler.kv_cache_config.kv_cache_groups
    (plain,) = stock.scheduler.kv_cache_config.kv_cache_groups
    ours, theirs = group.kv_cache_spec, plain.kv_cache_spec
    assert type(theirs) is MLAAttentionSpec and isinstance(ours, MLAAttentionSpec)
    assert vars(ours) == vars(theirs) | {"kernel_block_size": None}  # blocks are not split
    assert ours.page_size_bytes == theirs.page_size_bytes
    assert engine.pool.num_gpu_blocks == stock.pool.num_gpu_blocks
    grid = engine.worker.compactor.grid
    assert (grid.num_layers, grid.num_heads, grid.block_size) == (3, 1, BLOCK_SIZE)


@pytest.mark.parametrize("lengths", [[5, 64, 90], [200, 333, 900]], ids=str)
def test_with_nothing_due_outputs_are_stocks_to_the_last_bit(engine, stock, long_ids, lengths):
    prompts = [long_ids(length, seed=20 + length) for length in lengths]
    compression = "off" if max(lengths) > 90 else "streaming_llm:budget=1.0"
    expected = stock.run_all((prompt, sampling(40)) for prompt in prompts)
    got = engine.run_all((prompt, sampling(40, compression)) for prompt in prompts)
    assert not engine.sent
    assert [exact(output) for output in got] == [exact(output) for output in expected]


def test_the_first_token_is_stocks_to_the_last_bit(engine, stock, long_ids):
    prompt = long_ids(600, seed=30)
    expected, got = exact(stock.run(prompt, sampling(3))), exact(engine.run(prompt, sampling(3)))
    assert len(engine.compactions) == 1
    assert got[0] == expected[0] and got[1] != expected[1]


def test_rows_beside_compacted_ones_are_answered_as_by_stock(engine, stock, long_ids):
    # Their tables, too, are of pages of the whole pool then, in decodes and in prompts that come later.
    others = [(long_ids(length, seed=length), sampling(30, "off")) for length in (150, 310)]
    ours = engine.add(long_ids(500, seed=31), sampling(60))
    engine.step_until_compacted(ours)
    names = []
    for prompt, params in others:
        names.append(engine.add(prompt, params))
        engine.step()
    engine.finish()
    for name, (prompt, _) in zip(names, others, strict=True):
        assert first_difference(engine.outputs[name], stock.run(prompt, sampling(30))) is None
    engine.outputs.clear()


# ---------------------------------------------------------------------- the oracle


@dataclass(frozen=True)
class Case:
    """What the engine did with a prompt, and the scores `[L, 1, T]` that split pages and choose tokens."""

    prompt: oracle.Prompt
    scores: Tensor
    chosen: Tensor
    allocation: str
    blocks: int
    compaction: object
    output: object


def latent_scores(method: str, prompt: oracle.Prompt, boundary: int, reference, tokenizer) -> Tensor:
    """What all query heads of a layer say of its latents, `[L, 1, T]`, from the keys of each query head."""
    if method == "keydiff":
        layers = []
        for layer in prompt.cache.layers:  # a latent, and the rotated part of its key
            keys = torch.cat([layer.keys, layer.values], -1)[0, 0, : len(prompt.ids)].double()
            keys = keys / keys.norm(dim=-1, keepdim=True)
            mean = keys.mean(0)
            layers.append(-(keys @ mean / mean.norm())[None, :boundary])
        scores = torch.stack(layers)
    else:
        of_heads = oracle.scores_of(method, prompt, boundary, reference.reference, tokenizer)
        scores = of_heads.amax(1, keepdim=True) if method == "kvzip" else of_heads.sum(1, keepdim=True)
    scores[..., :SINKS] = torch.inf
    return scores


@pytest.fixture(scope="module", params=CASES)
def case(request, engines, deepseek, reference, long_ids, tokenizer) -> Case:
    allocation, budget, options = CASES[request.param]
    prompt = reference.prompt(long_ids(LENGTH, seed=7))
    engine = engines(deepseek, "snapkv:budget=0.25", **ROTATES)
    name = engine.add(prompt.ids, sampling(NUM_TOKENS, options, logprobs=5))
    engine.finish()
    boundary = (LENGTH - WINDOW) // BLOCK_SIZE * BLOCK_SIZE
    method = request.param.partition(",")[0].replace("pyramidkv", "snapkv")
    scores = latent_scores(method, prompt, boundary, reference, tokenizer)
    chosen, blocks = scores.clone(), math.ceil(Fraction(str(budget)) * (boundary // BLOCK_SIZE))
    if method == "h2o":
        chosen[..., boundary - blocks * BLOCK_SIZE // 2 :] = torch.inf
    compaction = engine.compaction_of(name)
    return Case(prompt, scores, chosen, allocation, blocks, compaction, engine.outputs.pop(name))


def test_pages_are_shared_by_layers_as_the_allocation_says(case):
    assert len(case.compaction.job.destination) == case.blocks
    assert case.compaction.job.boundary == case.scores.shape[2]
    expected = oracle.COUNTS[case.allocation](case.scores, case.blocks)
    assert case.compaction.counts.tolist() == expected
    if case.allocation in ("global", "pyramid"):
        assert len({tuple(layer) for layer in expected}) > 1, "layers differ, or nothing shows"


def test_each_layer_keeps_what_all_its_query_heads_say(case):
    exchanged = total = 0
    for layer, (kept,) in enumerate(case.compaction.positions()):
        assert kept == sorted(set(kept)) and kept[:SINKS] == list(range(SINKS))
        score = case.chosen[layer, 0]
        best = set(score.sort(descending=True, stable=True).indices[: len(kept)].tolist())
        missing, surplus = sorted(best - set(kept)), sorted(set(kept) - best)
        if missing:
            best_missing, worst_kept = float(score[missing].max()), float(score[surplus].min())
            assert best_missing <= worst_kept + oracle.NEAR_TIE * abs(worst_kept), layer
        exchanged, total = exchanged + len(missing), total + len(kept)
    assert exchanged <= total / 1000


@torch.inference_mode()
def replay(model, ids: list[int], num_prompt: int, compactions: list) -> Tensor:
    """Log-probabilities `[answer, V]` of a request whose layers lose tokens as its compactions say.

    Each stretch of tokens between two of them is computed over what is left.
    """
    cache, logits, bias, begin = DynamicCache(config=model.config), [], None, 0
    layers = model.config.num_hidden_layers
    for point, compaction in [*((c.job.num_tokens, c) for c in compactions), (len(ids), None)]:
        oracle.ATTENTION.bias = bias
        logits.append(model(torch.tensor([ids[begin:point]]), past_key_values=cache).logits[0])
        oracle.ATTENTION.bias = None
        begin = point
        if compaction is not None:
            bias = torch.full((layers, 1, compaction.job.boundary), -torch.inf)
            for layer, (kept,) in enumerate(compaction.positions()):
                bias[layer, 0, kept] = 0.0
    return torch.cat(logits)[num_prompt - 1 :].log_softmax(-1)


def check_answer(reference, ids: list[int], compactions: list, output) -> float:
    """Compare an answer with the reference's; how far it is from that over the whole context."""
    answer, off = tokens(output), 0.0
    expected = replay(reference.reference, ids + answer[:-1], len(ids), compactions)
    full = replay(reference.reference, ids + answer[:-1], len(ids), [])
    for index, top in enumerate(output.outputs[0].logprobs):
        assert float(expected[index, answer[index]]) >= float(expected[index].max()) - oracle.NEAR_TIE, index
        for token, logprob in top.items():
            assert logprob.logprob == pytest.approx(float(expected[index, token]), abs=1e-2), index
            off = max(off, abs(logprob.logprob - float(full[index, token])))
    return off


def test_answers_are_those_of_dense_attention_over_the_kept_tokens(case, reference):
    off = check_answer(reference, case.prompt.ids, [case.compaction], case.output)
    assert off > 3e-2, "a plugin that drops nothing would pass"


@pytest.mark.parametrize(
    "options",
    [
        "streaming_llm:budget=0.5,when=streaming,recompact_every=96",
        "kv_compress:budget=0.25,when=streaming,recompact_every=160",
        "h2o:budget=0.4,when=streaming,recompact_every=128",
        "snapkv:budget=0.3,recompact_every=16",
        "kv_compress:budget=0.25,recompact_every=16",
    ],
)
def test_what_is_computed_on_compacted_context_is_dense_attention_over_it(
    engine, reference, long_ids, options
):
    # Streaming computes a prompt's chunks over compacted context, of which vLLM makes keys and values again.
    prompt = long_ids(500, seed=40)
    name = engine.add(prompt, sampling(70, options, logprobs=5))
    engine.finish()
    compactions = engine.compactions
    assert len(compactions) >= 3 and compactions[-1].job.previous
    if "streaming" in options:
        assert [c.job.num_tokens for c in compactions if c.num_computed < len(prompt)][1:]
    assert check_answer(reference, prompt, compactions, engine.outputs.pop(name)) > 3e-2


def test_chunks_on_compacted_context_beside_prompts_and_decodes(engine, reference, long_ids):
    requests = {
        "streaming_llm:budget=0.5,when=streaming,recompact_every=96": 420,
        "kv_compress:budget=0.25,when=streaming,recompact_every=64": 300,
        "snapkv:budget=0.3": 260,
        "off": 333,
    }
    names = {}
    for seed, (options, length) in enumerate(requests.items()):
        prompt = long_ids(length, seed=50 + seed)
        names[engine.add(prompt, sampling(20, options, logprobs=5))] = prompt
        engine.step()
    engine.finish()
    for name, prompt in names.items():
        own = [compaction for compaction in engine.compactions if compaction.request == name]
        check_answer(reference, prompt, own, engine.outputs.pop(name))


# ---------------------------------------------------------------------- blocks


@pytest.mark.parametrize("when", ["when due", "after its compaction", "after its second"])
@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_blocks_come_back_and_what_is_kept_is_the_same_again(engine, long_ids, when, end):
    prompt, params, free = (
        long_ids(450, seed=6),
        sampling(80, "h2o:budget=0.3,recompact_every=16"),
        engine.free,
    )
    alone = engine.run(prompt, params)
    kept = {c.job.num_tokens: c for c in engine.compactions}
    assert len(kept) >= 3
    engine.compactions.clear()
    request = engine.add(prompt, params)
    engine.step_until_due(request)
    while len(engine.compactions) < {"when due": 0, "after its compaction": 1, "after its second": 2}[when]:
        engine.step()
    if end == "abort":
        engine.llm.llm_engine.abort_request([request])
        engine.step()
    else:
        live = engine.live(request)
        engine.scheduler.running.remove(live)
        engine.scheduler._preempt_request(live, 0.0)
        assert engine.free == free
        engine.compactions.clear()
        engine.finish()
        # The output is computed again as a prompt, on compacted context.
        assert first_difference(engine.outputs.pop(request), alone) is None
        assert {c.job.num_tokens for c in engine.compactions} == set(kept)
        assert all(same_kept(c, kept[c.job.num_tokens]) for c in engine.compactions)
    assert engine.free == free


@pytest.mark.parametrize("method", ["auto", "kv_compress"])
def test_under_pressure_a_request_answers_as_alone_compacted_at_the_same_points(engine, long_ids, method):
    # Prompts of 38 and 32 blocks; what they put out does not fit beside them.
    members = {
        f"full{length}": (long_ids(length, seed=length), sampling(most, under_pressure(method)))
        for length, most in ((600, 90), (500, 60))
    }
    with engine.squeezed(74):
        names = [engine.add(prompt, params, name) for name, (prompt, params) in members.items()]
        engine.finish()
    outputs, compactions = {name: engine.outputs.pop(name) for name in names}, list(engine.compactions)
    assert compactions and engine.sent == [each.job for each in compactions]
    for name, (prompt, params) in members.items():
        own = [each for each in compactions if each.request == name]
        alone, again = replayed(engine, prompt, params, points_of(own))
        assert all(same_kept(*pair) for pair in zip(own, again, strict=True))
        assert first_difference(outputs[name], alone) is None


OPTIONS = [
    None,
    "snapkv:budget=0.1",
    "kv_compress:budget=0.25",
    "pyramidkv:budget=0.4",
    "kvzip:budget=0.9,threshold=0.02",
    "snapkv:budget=0.3,recompact_every=6",
    "h2o:budget=0.4,recompact_every=8",
    "kv_compress:budget=0.25,when=streaming,recompact_every=96",
    "kvzip:budget=0.3,chunk=128",
    "off",
]


def test_a_crowd_in_a_small_pool_leaves_nothing_and_nobody_disturbs_another(engine, long_ids):
    random_, members = random.Random(7), {}
    for index in range(40):
        members[f"crowd{index}"] = Member(
            prompt=long_ids(int(random_.triangular(40, 700, 100)), seed=200 + index),
            max_tokens=random_.randint(8, 24),
            samples=2 if random_.random() < 0.1 else 1,
            compression=random_.choice(OPTIONS),
            steps_to_live=random_.randint(0, 30) if random_.random() < 0.15 else None,
        )
    run = serve(engine, members, POOL, random.Random(8))
    assert run.free_after == run.free_before
    assert run.sent == [compaction.job for compaction in run.compactions]
    assert run.preemptions > 0 and len(run.compactions) > 20 and run.most_running > 3
    assert sum(not finished(run, name) for name in run.members) >= 3, "some are aborted"
    assert any(c.job.previous for c in run.compactions), "some are compacted again as they grow"
    of_request, differences = in_time(compacted(run), engine), []
    chosen = sorted(of_request, key=lambda name: len(of_request[name]), reverse=True)[:15]
    compare_with_alone(run, engine, chosen, differences)
    tolerate(differences, len(chosen))


# ---------------------------------------------------------------------- other engines


@pytest.fixture
def with_prefixes(engines, deepseek, monkeypatch):
    """With what vLLM's backend can do and its CPU platform turns off: chunks, and cached prefixes."""
    check = type(current_platform).check_and_update_config.__func__

    def left_on(cls, vllm_config):
        check(cls, vllm_config)
        vllm_config.scheduler_config.enable_chunked_prefill = True
        vllm_config.cache_config.enable_prefix_caching = True
        vllm_config.scheduler_config.max_num_batched_tokens = 128

    monkeypatch.setattr(type(current_platform), "check_and_update_config", classmethod(left_on))
    found = engines(deepseek, "snapkv:budget=0.25", **ROTATES, max_num_batched_tokens=128)
    found.forget_prefixes(), found.compactions.clear()
    yield found
    found.check_accounts(), found.check_nothing_left()


def test_chunks_leave_what_one_prefill_leaves(with_prefixes, engine, long_ids):
    prompt = long_ids(420, seed=70)
    for options in ("snapkv:budget=0.25", "h2o:budget=0.25", "kvzip:budget=0.25,chunk=128"):
        whole, chunked = (
            engine.run(prompt, sampling(20, options)),
            with_prefixes.run_fresh(prompt, sampling(20, options)),
        )
        assert same_kept(with_prefixes.compactions[-1], engine.compactions[-1]), options
        assert first_difference(chunked, whole) is None


def test_nothing_computed_on_compacted_context_is_offered_to_the_prefix_cache(with_prefixes, long_ids):
    prompt = long_ids(400, seed=71)
    point, end = len(prompt) // BLOCK_SIZE, (len(prompt) + 99) // BLOCK_SIZE
    offered = {}
    for options in ("snapkv:budget=0.25", "off"):
        with_prefixes.forget_prefixes()
        live = with_prefixes.live(with_prefixes.add(prompt, sampling(100, options)))
        with_prefixes.finish()
        hashes = enumerate(live.block_hashes)
        offered[options] = [i for i, hash in hashes if with_prefixes.pool.get_cached_block(hash, [0])]
    assert offered == {"snapkv:budget=0.25": list(range(point)), "off": list(range(end))}
    with_prefixes.outputs.clear()


def test_a_cached_prefix_gives_way_to_the_observation_window(with_prefixes, long_ids):
    prompt, params = long_ids(400, seed=72), sampling(12, "snapkv:budget=0.25")
    first = with_prefixes.run_fresh(prompt, params)
    again = with_prefixes.run(prompt, params)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 368)
    assert same_kept(*with_prefixes.compactions[-2:]) and tokens(again) == tokens(first)
