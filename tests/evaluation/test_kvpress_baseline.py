"""kvpress is asked for exactly the tokens that the plugin keeps, and its answers are those of that cache."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vllm_kvcompress.allocation import Uniform, select
from vllm_kvcompress.evaluation.quality import kvpress_baseline as baseline
from vllm_kvcompress.evaluation.quality.samples import Sample, starts_with
from vllm_kvcompress.plan import Plan
from vllm_kvcompress.policies import LayerObservation

BLOCK = 16
WORDS = 120


@pytest.mark.parametrize("method", ["snapkv", "adakv", "streaming_llm"])
@pytest.mark.parametrize("budget", [0.1, 0.125, 0.25, 0.5, 0.9])
def test_kept_tokens_follow_the_plan(method: str, budget: float) -> None:
    for num_tokens in range(1, 700, 7):
        source = max(0, num_tokens - 32) // BLOCK
        kept_blocks = math.ceil(round(budget * source, 9))
        expected = num_tokens - (source - kept_blocks) * BLOCK
        assert baseline.kept_tokens(num_tokens, method, budget, BLOCK) == expected


def test_full_keeps_everything() -> None:
    assert baseline.kept_tokens(1000, "full", 0.25, BLOCK) == 1000
    assert baseline.make_press("full", 0.0) is None


def test_ratio_gives_the_exact_count() -> None:
    for num_tokens in [*range(1, 200), 1023, 4096, 32_001, 131_072]:
        for kept in {1, 2, num_tokens // 3, num_tokens // 2, num_tokens - 1, num_tokens} - {0}:
            ratio = baseline.compression_ratio(num_tokens, kept)
            assert 0 <= ratio < 1
            assert int(num_tokens * (1 - ratio)) == min(kept, num_tokens)


def test_without_kvpress_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ModuleNotFoundError) as error:
        baseline.generate(tmp_path, [], "inside", "snapkv", 0.25)
    assert str(error.value) == (
        "the kvpress comparison needs kvpress: "
        "pip install --no-deps kvpress==0.5.5 and, for it, fire==0.6.* and datasets"
    )


def test_unknown_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown method 'h2o'; use one of full"):
        baseline.generate(tmp_path, [], "inside", "h2o", 0.25)
    with pytest.raises(ValueError, match="unknown method 'h2o'; use one of full"):
        baseline.kept_tokens(1000, "h2o", 0.25, BLOCK)
    with pytest.raises(ValueError, match="unknown mode 'before'"):
        baseline.generate(tmp_path, [], "before", "snapkv", 0.25)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples is empty"):
        baseline.compare(tmp_path, [], [])


# ---------------------------------------------------------------- with kvpress, on a tiny random model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random Llama of 2 layers, 6 query heads over 3 KV heads, whose tokens are words `w0` to `w119`."""
    pytest.importorskip("kvpress")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    yield folder
    baseline._load.cache_clear()


def text(num_tokens: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(WORDS, (num_tokens,), generator=generator).tolist())


def sample(document: int, question: int = 9, seed: int = 0, max_tokens: int = 6) -> Sample:
    return Sample(
        task="tiny",
        id=f"tiny/{seed}",
        document=text(document, seed),
        question=" " + text(question, seed + 1000),
        answers=("w1",),
        metric=starts_with,
        max_tokens=max_tokens,
        length=document,
    )


def prefill(folder: Path, num_tokens: int, method: str, budget: float):
    """A prompt's token ids, its full cache, its compressed cache and what later queries attend to."""
    from transformers import DynamicCache

    model, tokenizer = baseline._load(str(folder), "float32")
    tokens = tokenizer.encode(text(num_tokens, 5))
    kept = baseline.kept_tokens(num_tokens, method, budget, BLOCK)
    press = baseline.make_press(method, baseline.compression_ratio(num_tokens, kept))
    full, pressed = DynamicCache(), DynamicCache()
    with torch.inference_mode():
        baseline._step(model, full, tokens, 0)
        with press(model):
            baseline._step(model, pressed, tokens, 0)
    return tokens, full, pressed, baseline.attended_tokens(model, pressed)


def held_positions(full, pressed) -> list[list[list[int]]]:
    """Positions of the tokens that a compressed cache holds, by layer and head."""
    found = []
    for whole, part in zip(full.layers, pressed.layers, strict=True):
        equal = (part.keys[0, :, :, None] == whole.keys[0, :, None]).all(-1)  # [H, kept, P]
        assert (equal.sum(-1) == 1).all()
        found.append(equal.int().argmax(-1).sort(-1).values.tolist())
    return found


@pytest.mark.parametrize("num_tokens", [33, 64, 175, 176, 200, 321])
@pytest.mark.parametrize("budget", [0.125, 0.5])
@pytest.mark.parametrize("method", ["snapkv", "adakv", "streaming_llm"])
def test_kept_counts_equal_ours(tiny: Path, method: str, budget: float, num_tokens: int) -> None:
    plan = Plan.of(baseline.matching_config(method, budget), num_tokens, BLOCK)
    ours = num_tokens if plan is None else plan.kept_blocks * BLOCK + num_tokens - plan.boundary
    _, _, pressed, attended = prefill(tiny, num_tokens, method, budget)
    if method == "adakv":  # heads differ, a layer's sum does not; and nothing is freed
        assert attended.sum(1).tolist() == [3 * ours] * 2
        assert all(layer.keys.shape[2] == num_tokens for layer in pressed.layers)
    else:
        assert attended.tolist() == [[ours] * 3] * 2
        assert all(layer.keys.shape[2] == layer.values.shape[2] == ours for layer in pressed.layers)


@pytest.mark.parametrize("num_tokens", [175, 176, 321])
def test_streaming_llm_keeps_our_very_tokens(tiny: Path, num_tokens: int) -> None:
    plan = Plan.of(baseline.matching_config("streaming_llm", 0.25), num_tokens, BLOCK)
    assert plan is not None
    recent = plan.kept_blocks * BLOCK - baseline.SINK_TOKENS
    ours = [*range(4), *range(plan.boundary - recent, num_tokens)]
    _, full, pressed, _ = prefill(tiny, num_tokens, "streaming_llm", 0.25)
    assert held_positions(full, pressed) == [[ours] * 3] * 2


def test_snapkv_keeps_our_very_tokens(tiny: Path) -> None:
    """In float32 and where no raw token lies between boundary and window, both select the same ones."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    num_tokens, budget = 32 + 12 * BLOCK, 0.25
    config = baseline.matching_config("snapkv", budget)
    plan, policy = Plan.of(config, num_tokens, BLOCK), config.build_policy()
    assert plan is not None and plan.boundary == num_tokens - 32
    model, _ = baseline._load(str(tiny), "float32")
    queries = []

    def observe(module, _, kwargs):
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        query = module.q_proj(hidden).view(1, num_tokens, 6, -1).transpose(1, 2)
        queries.append(apply_rotary_pos_emb(query, query, cos, sin)[0][0, :, -32:].transpose(0, 1))

    hooks = [
        layer.self_attn.register_forward_pre_hook(observe, with_kwargs=True) for layer in model.model.layers
    ]
    tokens, full, pressed, _ = prefill(tiny, num_tokens, "snapkv", budget)
    for hook in hooks:
        hook.remove()

    scores = torch.stack(
        [
            policy.score(
                LayerObservation(
                    keys=layer.keys[0],
                    values=layer.values[0],
                    queries=query.unflatten(1, (3, 2)),
                    scale=model.model.layers[0].self_attn.scaling,
                    num_scored=plan.boundary,
                )
            )
            for layer, query in zip(full.layers, queries[:2], strict=True)
        ]
    )
    counts = Uniform().allocate(scores, plan.kept_blocks * 6, BLOCK)
    kept = select(scores, counts, BLOCK).view(2, 3, -1)
    tail = torch.arange(plan.boundary, num_tokens).expand(2, 3, -1)
    assert held_positions(full, pressed) == torch.cat([kept, tail], -1).tolist()


@pytest.mark.parametrize("mode", ["inside", "after"])
@pytest.mark.parametrize("method", ["full", "streaming_llm"])
def test_answers_are_those_of_the_masked_full_cache(tiny: Path, mode: baseline.Mode, method: str) -> None:
    """Logical positions and causal order are right: recomputing all with a mask gives the same answer."""
    asked = sample(200, seed=3)
    (row,) = baseline.generate(tiny, [asked], mode, method, 0.25, BLOCK, torch.float32)

    model, tokenizer = baseline._load(str(tiny), "float32")
    tokens = tokenizer.encode(asked.document) + tokenizer.encode(asked.question)
    compressed = len(tokens) if mode == "inside" else 200
    kept = baseline.kept_tokens(compressed, method, 0.25, BLOCK)
    answer: list[int] = []
    for _ in range(asked.max_tokens):
        length = len(tokens) + len(answer)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask[compressed:, 4 : 4 + compressed - kept] = False
        with torch.inference_mode():
            logits = model(torch.tensor([tokens + answer]), attention_mask=mask[None, None]).logits
        answer.append(int(logits[0, -1].argmax()))
    assert row["prediction"] == tokenizer.decode(answer)
    assert len(set(answer)) > 1
    assert row["prompt_tokens"] == compressed
    assert row["kept_fraction"] == pytest.approx(kept / compressed)
    assert row["kv_bytes"] == kept * 2 * 2 * 3 * 8 * 4  # layers, keys and values, heads, size, float32
    assert row["kv_bytes_full"] == compressed * 2 * 2 * 3 * 8 * 4
    assert (row["question_seconds"] is None) == (mode == "inside")


def test_stop_and_length_end_an_answer(tiny: Path) -> None:
    asked = sample(60, max_tokens=1)
    (row,) = baseline.generate(tiny, [asked], "inside", "full", 1.0, BLOCK, "float32")
    assert len(row["prediction"].split()) == 1 and row["decode_seconds"] is None
    stopping = Sample(**{**vars(asked), "stop": (row["prediction"][1:],), "max_tokens": 50})
    (row,) = baseline.generate(tiny, [stopping], "inside", "full", 1.0, BLOCK, "float32")
    assert row["prediction"] == "w"


def test_compare_gives_plain_values(tiny: Path) -> None:
    samples = [sample(200, seed=1), sample(240, seed=2)]
    variants = [
        baseline.Variant("inside", "adakv", 0.25),
        baseline.Variant("after", "adakv", 0.25),
        baseline.Variant("after", "snapkv", 0.25),
        baseline.Variant("inside", "full"),  # after Ada-KV: none of its masks may linger
    ]
    result = json.loads(json.dumps(baseline.compare(tiny, samples, variants, BLOCK, "float32")))
    masked, masked_after, snapkv, full = result["variants"]
    assert result["dtype"] == "torch.float32" and result["model"] == tiny.name
    assert [len(v["samples"]) for v in result["variants"]] == [2] * 4
    assert all(0 <= v["accuracy"] <= 1 and v["by_task"] == {"tiny": v["accuracy"]} for v in (masked, full))
    assert masked["masked_only"] and masked["kept_fraction"] < 0.5
    assert masked["kv_bytes"] == masked["kv_bytes_full"]
    assert snapkv["kv_bytes"] / snapkv["kv_bytes_full"] == pytest.approx(snapkv["kept_fraction"], rel=0.02)
    assert masked_after["kept_fraction"] == pytest.approx(snapkv["kept_fraction"])
    assert full["kept_fraction"] == 1 and full["kv_bytes"] == full["kv_bytes_full"]


def test_adakv_that_keeps_all_answers_like_the_full_cache(tiny: Path) -> None:
    """Where nothing can be freed no token is masked, even right after a prompt in which some were."""
    long, short = sample(200, seed=4), sample(40, seed=4)
    baseline.generate(tiny, [long], "after", "adakv", 0.25, BLOCK, "float32")
    (row,) = baseline.generate(tiny, [short], "after", "adakv", 0.25, BLOCK, "float32")
    (full,) = baseline.generate(tiny, [short], "after", "full", 1.0, BLOCK, "float32")
    assert row["kept_fraction"] == 1 and row["prediction"] == full["prediction"]
