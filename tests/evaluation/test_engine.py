"""The evaluation's engine on the small model, against plain transformers."""

import math
from collections import Counter

import pytest
import torch

from vllm_kvcompress import KVCompressionConfig
from vllm_kvcompress.plan import Plan

LENGTH, CONTINUED = 400, 12
SNAPKV = "snapkv:budget=0.25"


@pytest.fixture(scope="module")
def engine(smollm2):
    from vllm_kvcompress.evaluation.engine import Engine

    with torch.compiler.set_stance("force_eager"):
        yield Engine(smollm2, 2048, num_gpu_blocks_override=400)


@pytest.fixture(scope="module")
def tokens(engine):
    from vllm_kvcompress.evaluation.quality.retrieval import default_prose

    return engine.tokenizer.encode(default_prose()[:8000])[: LENGTH + CONTINUED]


@pytest.fixture(scope="module")
def oracle(smollm2, tokens):
    """Log-probabilities of transformers at each forced position, all in one pass."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    return logits[LENGTH - 1 : -1].log_softmax(-1)


def test_teacher_forcing_equals_transformers(engine, tokens, oracle):
    from vllm_kvcompress.evaluation.engine import Ask, Divergence, Reference
    from vllm_kvcompress.evaluation.variants import FULL

    prompt, forced = tokens[:LENGTH], tokens[LENGTH:]
    reference = Reference()
    engine.run([Ask(prompt, FULL, forced, reference)])
    assert sorted(reference.rows) == list(range(CONTINUED))
    recorder = Divergence(reference, forced)
    compressed = Divergence(reference, forced)
    engine.run([Ask(prompt, FULL, forced, recorder), Ask(prompt, SNAPKV, forced, compressed)])
    for position, token in enumerate(forced):
        expected = float(oracle[position][token])
        # The model's bfloat16 rounding is in this where the engine runs in bfloat16.
        assert -recorder.surprise[position] == pytest.approx(expected, abs=0.15)
        assert recorder.kl[position] == pytest.approx(0.0, abs=1e-2)
    # The first token is sampled before compaction; the others feel it.
    assert compressed.kl[0] == pytest.approx(0.0, abs=1e-2)
    assert max(compressed.kl.values()) > 0.02
    assert all(math.isfinite(value) for value in compressed.kl.values())


def test_variants_side_by_side_hold_what_their_plans_say(engine, tokens):
    from vllm_kvcompress.evaluation.engine import Ask
    from vllm_kvcompress.evaluation.variants import EVERY_PROMPT, FULL

    specs = [FULL, SNAPKV, "kv_compress:budget=0.5", "streaming_llm:budget=0.125"]
    # More than a server would compact in one step: who is late would answer from raw context.
    specs *= -(-engine.scheduler.max_num_scheduled_tokens // LENGTH // 3) + 1
    assert len(specs) <= 64
    outcomes = engine.run([Ask(tokens[:LENGTH], spec, max_tokens=4, ignore_eos=True) for spec in specs])
    raw = -(-(LENGTH + 1) // engine.block_size)
    for spec, outcome in zip(specs, outcomes, strict=True):
        plan = None if spec == FULL else Plan.of(EVERY_PROMPT.for_request(spec), LENGTH, engine.block_size)
        held = raw if plan is None else raw - plan.source_blocks + plan.kept_blocks
        assert outcome.kept_fraction == held / raw, spec
        assert (outcome.compaction_seconds > 0) == (plan is not None), spec


def test_a_question_after_the_document_is_read_on_top_of_it(engine):
    from vllm_kvcompress.evaluation.engine import Ask
    from vllm_kvcompress.evaluation.variants import FULL

    document = engine.tokenizer.encode("The pass key of the mill is 48213. " * 12)
    question = engine.tokenizer.encode("The pass key of the mill is", add_special_tokens=False)
    (outcome,) = engine.run([Ask(document, FULL, question, max_tokens=7, stop=(".",))])
    assert outcome.text.strip() == "48213"


def test_kept_tokens_of_a_prompt(engine, tokens):
    kept = engine.compactions(tokens[:LENGTH], "adakv:budget=0.25")
    layers, heads = kept.shape
    assert (layers, heads) == (30, 3)
    assert torch.allclose(kept.sum(1), kept.sum(1)[0])  # Ada-KV shares out each layer's budget
    assert len(kept.unique()) > 1
    assert bool((engine.compactions(tokens[:LENGTH], "kivi:budget=none") == 1).all())


def computed(engine, prompt, specs) -> tuple[dict, Counter]:
    """What requests of one prompt keep and answer, by method and budget; tokens computed of each method,
    those of its repetitions apart."""
    from vllm_kvcompress.evaluation.engine import Ask

    found, tokens = {}, Counter()
    schedule, scheduler = engine.scheduler.schedule, engine.scheduler

    def counting(*args):
        step = schedule(*args)
        for name, count in step.num_scheduled_tokens.items():
            repetition = scheduler._repetitions.of(name)
            own = scheduler.requests[name if repetition is None else repetition.owner_id]
            method = scheduler._tracked[own.request_id].config.method
            tokens[method if repetition is None else f"{method} again"] += count
        return step

    def listener(job, counts, kept):
        found[job.config.method, job.config.budget] = counts, kept

    engine.compactor.listeners.append(listener)
    scheduler.schedule = counting
    try:
        outcomes = engine.run([Ask(prompt, spec, max_tokens=6, ignore_eos=True) for spec in specs])
    finally:
        engine.compactor.listeners.remove(listener)
        del scheduler.schedule
    assert len(found) == len(specs)
    for spec, outcome in zip(specs, outcomes, strict=True):
        method, budget = spec.partition(",")[0].split(":budget=")
        found[method, float(budget)] += (outcome.text,)
    return found, tokens


def test_what_is_noted_of_a_prompt_is_noted_once_and_nothing_is_kept_otherwise(engine, tokens):
    methods = "kvzip", "expected_attention", "h2o", "attention_matching"
    specs = [f"{method}:budget={budget}" for budget in (0.5, 0.25) for method in methods]
    noted, prompt = engine._noted._noted, tokens[:LENGTH]
    alone, of_one = {}, {}
    for spec in specs:
        noted.clear()
        own, of_one[spec] = computed(engine, prompt, [spec])
        alone |= own
    noted.clear()
    shared, counted = computed(engine, prompt, specs)
    assert len(noted) == len(methods)
    for name, (counts, kept, text) in alone.items():
        assert torch.equal(shared[name][0], counts) and torch.equal(shared[name][1], kept), name
        assert shared[name][2] == text, name
    for method in methods:
        first = of_one[f"{method}:budget=0.5"]
        repeats = method in ("kvzip", "attention_matching")
        assert (
            counted[f"{method} again"] == first[f"{method} again"]
            and (first[f"{method} again"] > 0) == repeats
        )
        if not repeats:  # and reads no cached block but for those that come after it
            assert LENGTH <= first[method] and counted[method] < 1.5 * LENGTH
    # Nothing is handed on to another prompt, nor to a policy that notes something else.
    other, counted = computed(engine, prompt[:-40], specs[:1])
    assert counted["kvzip again"] > 0 and not torch.equal(other["kvzip", 0.5][1], alone["kvzip", 0.5][1])
    counted = computed(engine, prompt, ["kvzip:budget=0.3,chunk=200"])[1]
    assert counted["kvzip again"] > 0


def test_decode_step_is_timed(engine, tokens, monkeypatch):
    assert 0 < engine.step_seconds(tokens[:LENGTH], SNAPKV, 2, 3) < 60
    # One is solved for after the other, and the first would end before the last one decodes.
    from vllm_kvcompress.evaluation import engine as module

    assert engine.step_seconds(tokens[:LENGTH], "attention_matching:budget=0.25", 3, 3) > 0
    params = module.SamplingParams
    monkeypatch.setattr(module, "SamplingParams", lambda **given: params(**given | {"max_tokens": 12}))
    assert engine.step_seconds(tokens[:LENGTH], "attention_matching:budget=0.25", 3, 3) is None
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_what_the_model_cannot_be_served_with_is_one_line(engine, tokens):
    from vllm_kvcompress.config import KVCompressionError
    from vllm_kvcompress.evaluation.engine import Ask

    with pytest.raises(
        KVCompressionError, match=r"^foresight:scorer=x: a request may use the server's"
    ) as error:
        engine.run([Ask(tokens, "foresight:scorer=x", max_tokens=2)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variant", "asked"),
    [
        ("attention_matching", "attention_matching:waits=true"),
        ("attention_matching:budget=0.1", "attention_matching:budget=0.1,waits=true"),
        ("attention_matching:waits=true,budget=0.1", "attention_matching:waits=true,budget=0.1"),
        (SNAPKV, SNAPKV),
    ],
)
def test_what_is_evaluated_waits_for_its_solution(engine, variant, asked):
    assert engine._compression(variant) == {"kv_compression": asked}
    KVCompressionConfig.parse(asked)
