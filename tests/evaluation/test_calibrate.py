"""A head's sensitivity is what a separate masked run says; what is made of it is never worse than even."""

import argparse
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vllm_kvcompress import profiles
from vllm_kvcompress.allocation import Profile
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.evaluation import pictures
from vllm_kvcompress.evaluation.quality import calibrate, retrieval
from vllm_kvcompress.evaluation.quality.calibrate import (
    LEAST,
    RESOLUTION,
    Keeping,
    Text,
    compare,
    exchange,
    head_shares,
    loss_table,
    sensitivity,
)
from vllm_kvcompress.evaluation.quality.probe import Probe

LAYERS, HEADS, GROUP, WINDOW, SINKS = 2, 2, 2, 8, 4
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS * GROUP,
    "num_key_value_heads": HEADS,
    "head_dim": 8,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(config=LlamaConfig, model=LlamaForCausalLM, vocab_size=64, **options):
    """A random model whose heads attend to few tokens: its weights are large."""
    torch.manual_seed(0)
    settings = {"vocab_size": vocab_size, "initializer_range": 0.4, **SIZES, **options}
    return model(config(attn_implementation="eager", **settings)).eval()


SLIDING = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
HYBRID = (Gemma3TextConfig, Gemma3ForCausalLM, SLIDING | {"num_hidden_layers": 3})


def text(num_document=60, num_continuation=10) -> Text:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 64, (num_document + num_continuation,), generator=draw).tolist()
    return Text(tokens[:num_document], tokens[num_document:])


@torch.inference_mode()
def log_probabilities(model, sample: Text, hidden=None, layer=None) -> torch.Tensor:
    """`[K, V]` in one pass over document and continuation, with transformers' own eager attention.

    Args:
        model: untouched.
        sample: what it reads.
        hidden: `[Hq, C]` bool, tokens of the document that the continuation's queries do not see.
        layer: in which layer.
    """
    tokens = sample.document + sample.continuation
    begin = len(sample.document)
    causal = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)
    mask = causal.expand(1, HEADS * GROUP, -1, -1).clone()
    special = mask.clone()
    if hidden is not None:
        special[0, :, begin:, :begin].masked_fill_(hidden[:, None], -torch.inf)

    def replace(module, args, kwargs):
        own = special if module.layer_idx == layer else mask
        if (window := getattr(module, "sliding_window", None)) is not None:
            own = own + torch.full_like(causal, -torch.inf).tril(-window)
        return args, {**kwargs, "attention_mask": own}

    hooks = [
        block.self_attn.register_forward_pre_hook(replace, with_kwargs=True) for block in model.model.layers
    ]
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0, begin:]
    for hook in hooks:
        hook.remove()
    return logits.log_softmax(-1)


@torch.inference_mode()
def snapkv_order(model, document) -> list[list[list[int]]]:
    """Tokens of each layer and head, the best ones first: SnapKV in loops, behind the sinks."""
    weights = model(torch.tensor([document]), output_attentions=True, use_cache=False).attentions
    num_scored = len(document) - WINDOW
    order = []
    for layer in weights:
        order.append([])
        for head in range(HEADS):
            total = [0.0] * num_scored
            for query_head in range(head * GROUP, (head + 1) * GROUP):
                paid = layer[0, query_head, num_scored:, :num_scored].sum(0).tolist()
                for i in range(num_scored):
                    total[i] += max(paid[max(0, i - 3) : i + 4]) / GROUP
            rest = sorted(range(SINKS, num_scored), key=lambda i, total=total: (-round(total[i], 6), i))
            order[-1].append([*range(SINKS), *rest])
    return order


def test_sensitivity_is_that_of_a_separate_masked_run():
    model, sample, fractions = tiny(), text(), [0.1, 0.4]
    order = snapkv_order(model, sample.document)
    full = log_probabilities(model, sample)
    num_scored = len(sample.document) - WINDOW
    expected = torch.zeros(LAYERS, HEADS, len(fractions))
    for layer, head, index in itertools.product(range(LAYERS), range(HEADS), range(len(fractions))):
        kept = order[layer][head][: round(fractions[index] * num_scored)]
        hidden = torch.zeros(HEADS * GROUP, len(sample.document), dtype=torch.bool)
        for query_head in range(head * GROUP, (head + 1) * GROUP):
            hidden[query_head, [i for i in range(num_scored) if i not in kept]] = True
        masked = log_probabilities(model, sample, hidden, layer)
        expected[layer, head, index] = (full.exp() * (full - masked)).sum(-1).mean()
    assert expected.min() > 1e-3, "every head must matter, or the comparison shows nothing"
    calls = []
    keeping = Keeping.of(f"snapkv:window={WINDOW}")
    found = sensitivity(Probe(tiny()), sample, keeping, fractions, 3, lambda: calls.append(1))
    assert torch.allclose(found.float(), expected, rtol=1e-3, atol=1e-5)
    assert len(calls) == 3  # 8 variants, 3 at once


def test_of_a_model_that_slides_windows_the_layers_that_do_not_are_measured():
    config, model, options = HYBRID
    sample, probe = text(), Probe(tiny(config, model, **options))
    assert (probe.num_layers, probe.num_kv_heads) == (1, HEADS)
    reference = tiny(config, model, **options)
    full = log_probabilities(reference, sample)
    cost = sensitivity(probe, sample, Keeping.of(f"streaming_llm:window={WINDOW}"), [0.3])
    num_scored = len(sample.document) - WINDOW
    last = num_scored - (round(0.3 * num_scored) - SINKS)
    for head in range(HEADS):
        hidden = torch.zeros(HEADS * GROUP, len(sample.document), dtype=torch.bool)
        hidden[head * GROUP : (head + 1) * GROUP, SINKS:last] = True
        masked = log_probabilities(reference, sample, hidden, 1)
        expected = float((full.exp() * (full - masked)).sum(-1).mean())
        assert expected > 1e-4 and float(cost[0, head, 0]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "model", "options"),
    [
        (LlamaConfig, LlamaForCausalLM, {}),
        (Qwen3Config, Qwen3ForCausalLM, {}),
        (Gemma2Config, Gemma2ForCausalLM, {}),  # soft-capped logits, its own scale
        HYBRID,
    ],
)
def test_a_probe_that_keeps_everything_is_the_model(config, model, options):
    sample = text()
    with torch.inference_mode():
        tokens = torch.tensor([sample.document + sample.continuation])
        plain = tiny(config, model, **options)(tokens).logits[0, len(sample.document) :].log_softmax(-1)
    probe = Probe(tiny(config, model, **options))
    probe.read(sample.document)
    everything = torch.ones(2, probe.num_layers, HEADS, len(sample.document), dtype=torch.bool)
    for row in probe.continue_with(sample.continuation, everything):
        assert torch.allclose(row, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)), "Bloom"),
        (lambda: tiny(MistralConfig, MistralForCausalLM, sliding_window=1), "a sliding window"),
    ],
)
def test_a_model_that_cannot_be_measured_is_one_line(make, says):
    with pytest.raises(KVCompressionError, match="cannot measure the heads of") as caught:
        Probe(make())
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_sliding_window_that_the_text_outgrows_is_refused():
    probe = Probe(tiny(MistralConfig, MistralForCausalLM, sliding_window=40))
    probe.read(text(40).document)
    with pytest.raises(KVCompressionError, match="a sliding window"):
        probe.read(text(41).document)


@pytest.mark.parametrize("method", ["h2o", "kvzip", "expected_attention"])
def test_policies_that_need_more_than_a_probe_has_are_refused(method):
    with pytest.raises(KVCompressionError, match=f"cannot score with {method}; use"):
        Keeping.of(method)


def test_a_policy_without_queries_can_be_measured():
    cost = sensitivity(Probe(tiny()), text(), Keeping.of("streaming_llm"), [0.3])
    assert cost.shape == (LAYERS, HEADS, 1) and (cost > 0).all()


def test_a_document_of_which_nothing_may_go_is_refused():
    with pytest.raises(KVCompressionError, match="a document of 34 tokens has none that may go"):
        sensitivity(Probe(tiny()), text(34), Keeping.of("snapkv"), [0.3])


# ---------------------------------------------------------------------- from costs to shares

falling = st.lists(st.floats(0, 5), min_size=9, max_size=9).map(lambda xs: sorted(xs, reverse=True))
convex = st.lists(st.integers(0, 50), min_size=8, max_size=8).map(
    lambda steps: np.cumsum([0, *sorted(steps)])[::-1].tolist()
)


@given(curves=st.lists(falling, min_size=1, max_size=5), start=st.integers(1, 8))
def test_the_exchange_is_never_worse_than_even_shares(curves, start):
    losses = np.array(curves)
    counts = exchange(losses, start, 1)
    everyone = np.arange(len(losses))
    assert counts.sum() == start * len(losses)
    assert counts.min() >= 1 and counts.max() <= 8
    assert losses[everyone, counts].sum() <= losses[:, start].sum() + 1e-9


@given(curves=st.lists(convex, min_size=1, max_size=3), start=st.integers(2, 7), least=st.integers(1, 2))
def test_where_more_tokens_help_less_and_less_the_exchange_finds_the_best_split(curves, start, least):
    losses = np.array(curves, dtype=float)
    best = min(
        sum(curve[count] for curve, count in zip(curves, split, strict=True))
        for split in itertools.product(range(least, 9), repeat=len(curves))
        if sum(split) == start * len(curves)
    )
    counts = exchange(losses, start, least)
    assert counts.min() >= least
    assert losses[np.arange(len(losses)), counts].sum() == pytest.approx(best)


def test_losses_are_the_envelope_and_linear_in_the_logarithm():
    # The cost at 0.5 is above that at 0.25: noise.
    losses = loss_table(np.array([[0.8, 0.2, 0.4]]), [0.125, 0.25, 0.5], budget=0.25)[0]
    assert len(losses) == 4 * RESOLUTION + 1 and math.isinf(losses[0])

    def at(fraction):
        return losses[round(fraction * 4 * RESOLUTION)]

    assert [at(f) for f in (0.125, 0.25, 0.5, 1)] == pytest.approx([0.8, 0.4, 0.4, 0])
    assert at(0.0625) == pytest.approx(1.2)  # on below the lowest measured one
    assert at(2**-2.5) == pytest.approx(0.6, abs=0.02)
    assert (np.diff(losses) <= 1e-12).all()


def test_heads_that_lose_nothing_give_to_those_that_do():
    cost = torch.tensor([[[0.0, 0.0], [1.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]]])
    shares = head_shares(cost, [0.1, 0.4], 0.25)
    assert shares.shape == (2, 2) and float(shares.sum()) == pytest.approx(4)
    assert float(shares[0, 1]) == pytest.approx(4 - 3 * LEAST / RESOLUTION)
    assert torch.equal(head_shares(torch.zeros(2, 2, 2), [0.1, 0.4], 0.25), torch.ones(2, 2).double())


def test_a_profile_is_read_back_as_it_was_written(tmp_path):
    shares = torch.stack([head_shares(torch.rand(3, 2, 1), [0.1], budget) for budget in (0.125, 0.5)])
    path = tmp_path / "profile.json"
    profiles.write(path, "tiny", "snapkv", [0.125, 0.5], shares, [0.1], torch.rand(3, 2, 1), {"seed": 1})
    profile = Profile(str(path))
    profile.check_model(3, 2)
    assert profile.profile.model == "tiny" and profile.profile.budgets == (0.125, 0.5)
    assert torch.allclose(profile.profile.shares, shares, atol=5e-4)
    assert int(profile.allocate(torch.rand(3, 2, 64), 24, 4).sum()) == 24
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_the_comparison_is_of_even_shares_with_the_profile(tmp_path):
    path, sample, probe = tmp_path / "profile.json", text(), Probe(tiny())
    keeping = Keeping.of(f"snapkv:window={WINDOW}")

    def compared(shares):
        profiles.write(path, "tiny", "snapkv", [0.25], shares, [0.1], shares.view(2, 2, 1), {})
        ((_, even, own),) = compare(probe, [sample], keeping, [0.25], path)
        return even, own

    even, own = compared(torch.ones(1, LAYERS, HEADS))
    assert even == own > 0
    again, other = compared(torch.tensor([[[3.0, 0.2], [0.4, 0.4]]]))
    assert again == even != other


def test_the_picture_has_a_map_for_each_fraction(tmp_path):
    costs = [[[0.1, 0.01], [0.0, 0.001]], [[0.01, 0.001], [0.0, 0.0]]]
    figure = pictures.head_sensitivity(costs, [0.02, 0.3], tmp_path / "s.png", "title")
    first, second, bar = figure.axes
    assert [axis.get_title() for axis in (first, second)] == ["it keeps 2 %", "it keeps 30 %"]
    assert first.images[0].get_array()[0].tolist() == pytest.approx([-1, -2])
    assert first.images[0].get_clim() == second.images[0].get_clim() == pytest.approx((-3, -1))
    assert "KL divergence" in bar.get_ylabel()
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_facts_that_do_not_fit_their_document_are_refused(tokenizer):
    with pytest.raises(KVCompressionError, match="a document of 50 tokens has no room"):
        retrieval.documents(tokenizer, [50], 1, retrieval.default_prose())


# ---------------------------------------------------------------------- as a user runs it


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    """The tiny model, with the small real model's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_calibrate_leaves_a_profile_that_an_engine_can_use(checkpoint, tmp_path):
    options = ["--documents", "2", "--tokens", "500", "--continuation", "8", "--fractions", "0.1,0.4"]
    options += ["--budgets", "0.25,0.125", "--output", str(tmp_path)]
    line = [sys.executable, "-m", "vllm_kvcompress.cli", "calibrate", checkpoint, *options]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "measuring heads" in done.stderr
    assert f"--kv-compression METHOD:allocation=profile:{tmp_path / 'profile.json'}" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("0.")]
    assert [row[0] for row in rows] == ["0.125", "0.25"]
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["model"] == "tiny-llama" and content["policy"] == "snapkv"
    assert content["settings"]["documents"] == 2 and content["settings"]["data"] == "persuasion"
    cost = torch.tensor(content["sensitivity"])
    assert cost.shape == (LAYERS, HEADS, 2) and (cost > 0).all()
    profile = Profile(str(tmp_path / "profile.json")).profile
    assert profile.shape == (LAYERS, HEADS) and profile.budgets == (0.125, 0.25)
    assert profile.shares.sum((1, 2)).tolist() == pytest.approx([4, 4], abs=0.01)
    assert (tmp_path / "sensitivity.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--policy", "snapkw"], "did you mean 'snapkv'"),
        (["--fractions", "0.1,1.5"], "must lie between 0 and 1"),
        (["--budgets", "few"], "not a comma-separated list"),
        (["--tokens", "100"], "has no room for its facts"),
    ],
)
def test_mistakes_are_one_line(checkpoint, options, says):
    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    with pytest.raises(KVCompressionError) as caught:
        calibrate.run(parser.parse_args([checkpoint, *options]))
    assert says in str(caught.value) and "\n" not in str(caught.value)
