"""ngram speculation on Runner V2: drafts are made and judged while the next step is scheduled."""

import inspect
from collections import Counter

import pytest
import torch
from harness import external_id, first_difference, sampling

NGRAM = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1)
NUM_TOKENS = 16
EVERY = 4
ALLOWED = [20, 21, 22]  # the model is random: of few tokens a guess is right now and then
OPTIONS = dict(
    skip_tokenizer_init=True,
    max_model_len=256,
    max_num_batched_tokens=160,
    max_num_seqs=8,
    num_gpu_blocks_override=60,
    additional_config={"kv_compression": "snapkv:budget=0.4,window=8"},
)
REQUESTS = {
    "snapkv": "snapkv:budget=0.4,window=8",
    "snapkv, again": f"snapkv:budget=0.3,window=8,recompact_every={EVERY}",
    "adakv, again": f"adakv:budget=0.3,window=8,recompact_every={EVERY}",
    # These sum up the queries of accepted drafts, and of no rejected one.
    "h2o, again": f"h2o:budget=0.3,window=8,recompact_every={EVERY}",
    "expected_attention, again": f"expected_attention:budget=0.3,window=8,recompact_every={EVERY}",
    "off": "off",
}


def prompt_of(name: str) -> list[int]:
    """So long that of the first tokens of the output one block more is compacted."""
    index = list(REQUESTS).index(name)
    generator = torch.Generator().manual_seed(index)
    return torch.randint(3, 300, (100 + index % 3,), generator=generator).tolist()


def serve(engine) -> tuple[dict, dict]:
    for name, option in REQUESTS.items():
        params = sampling(NUM_TOKENS, option, detokenize=False, allowed_token_ids=ALLOWED)
        engine.add(prompt_of(name), params, name)
    engine.finish()
    compactions: dict[str, list] = {name: [] for name in REQUESTS}
    for compaction in engine.compactions:
        compactions[compaction.request].append(compaction)
    return {name: engine.outputs.pop(name) for name in REQUESTS}, compactions


@pytest.fixture(scope="module")
def speculative(tiny, start_engine):
    from triton.runtime.interpreter import InterpreterBuilder

    # vLLM's kernel of drafts joins conditions to masks of integers, which Triton's compiler takes and its
    # interpreter does not.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_masked_load", "create_masked_store"):
            patch.setattr(InterpreterBuilder, name, _with_boolean_mask(getattr(InterpreterBuilder, name)))
        yield _start(tiny, start_engine)


def _with_boolean_mask(access):
    mask_at = list(inspect.signature(access).parameters).index("mask")

    def wrapped(*args):
        args[mask_at].data = args[mask_at].data.astype(bool)
        return access(*args)

    return wrapped


def _start(tiny, start_engine):
    return start_engine(tiny, "v2", "gpu", asynchronous=True, speculative_config=NGRAM, **OPTIONS)


def test_drafts_change_neither_a_token_nor_what_is_kept(tiny, start_engine, speculative):
    accepted, rejected = Counter(), Counter()
    update = speculative.scheduler.update_from_output

    def counted(scheduler_output, model_output):
        for id, drafts in scheduler_output.scheduled_spec_decode_tokens.items():
            sampled = model_output.sampled_token_ids[model_output.req_id_to_index[id]]
            accepted[external_id(id)] += max(len(sampled) - 1, 0)
            rejected[external_id(id)] += len(drafts) - max(len(sampled) - 1, 0)
        return update(scheduler_output, model_output)

    speculative.scheduler.update_from_output = counted
    outputs, compactions = serve(speculative)
    assert all(accepted[name] > 0 and rejected[name] > 0 for name in REQUESTS), (accepted, rejected)
    speculative.check_accounts(), speculative.check_nothing_left()

    plain_outputs, plain_compactions = serve(start_engine(tiny, "v1", "cpu", **OPTIONS))
    for name in REQUESTS:
        assert first_difference(outputs[name], plain_outputs[name]) is None, name
        pairs = list(zip(compactions[name], plain_compactions[name], strict=True))
        assert len(pairs) > 1 if "again" in name else len(pairs) == (name != "off"), name
        for one, two in pairs:
            assert one.job.num_tokens == two.job.num_tokens and one.job.boundary == two.job.boundary
            assert one.counts.tolist() == two.counts.tolist()
            assert one.kept.tolist() == two.kept.tolist(), (name, one.job.num_tokens)
