"""On a real model the policies keep the tokens that NVIDIA kvpress keeps, or differ as their docstrings say.

The model runs once in eager attention; both sides score what that pass left behind. Where a press protects
its window by force, so does the comparison: both sides keep the same number of tokens of each head.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_kvcompress.allocation import ALLOCATIONS
from vllm_kvcompress.policies import POLICIES, LayerObservation
from vllm_kvcompress.policies.rotary import Rotary

kvpress = pytest.importorskip("kvpress")

NUM_TOKENS = 600
WINDOW = 32
KERNEL = 7
KEPT = [60, 150, 300]  # of each head's 600


@dataclass(frozen=True)
class Layer:
    """What one layer computed, as both sides want it.

    Attributes:
        module: the model's attention module.
        hidden: `[1, P, hidden]` that went in.
        queries: `[1, Hq, P, D]` after RoPE.
        keys: `[1, H, P, D]`.
        values: `[1, H, P, D]`.
        kwargs: of the module's forward pass.
        rotary: its position embedding.
    """

    module: Any
    hidden: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    kwargs: dict[str, Any]
    rotary: Rotary

    def attention(self) -> Tensor:
        """`[1, Hq, P, P]` as eager attention returns it."""
        keys = self.keys.repeat_interleave(self.module.num_key_value_groups, 1)
        logits = self.queries @ keys.transpose(2, 3) * self.module.scaling
        return logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)

    def press(self, press, attention: bool = False) -> Tensor:
        """kvpress's scores `[H, P]`."""
        weights = self.attention() if attention else None
        return press.score(self.module, self.hidden, self.keys, self.values, weights, self.kwargs)[0]

    def observation(self, num_queries: int, num_scored: int) -> LayerObservation:
        """What a policy sees that wants the last queries."""
        heads, group = self.keys.shape[1], self.module.num_key_value_groups
        num_tokens = self.keys.shape[2]
        queries = self.queries[0, :, num_tokens - num_queries :].unflatten(0, (heads, group))
        return LayerObservation(
            self.keys[0],
            self.values[0],
            queries.permute(2, 0, 1, 3),
            self.module.scaling,
            num_scored,
            num_tokens=num_tokens,
            rotary=self.rotary,
            output_projection=self.output_projection,
        )

    def output_projection(self) -> Tensor:
        heads, size = self.keys.shape[1], self.keys.shape[3]
        return self.module.o_proj.weight.T.reshape(heads, -1, size, self.hidden.shape[2])

    def score(self, policy, num_scored: int, steps=(256, 1, 343)) -> Tensor:
        """Our scores `[H, T]`."""
        observation = self.observation(policy.window, num_scored)
        if policy.accumulates:
            every, state, begin = self.observation(self.keys.shape[2], 0), None, 0
            for size in steps:
                end = begin + size
                step = replace(
                    every,
                    keys=every.keys[:, :end],
                    values=every.values[:, :end, :0],
                    queries=every.queries[begin:end],
                    num_tokens=end,
                    state=state,
                )
                state, begin = policy.observe(step), end
            observation = replace(observation, state=state)
        return policy.score(observation)


def run(model, ids: list[int]) -> list[Layer]:
    """The layers of one pass over the tokens."""
    passed: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    given: dict[int, dict[str, Any]] = {}

    def attention(module, query, key, value, mask, scaling, **_):
        passed[module.layer_idx] = query, key, value
        group = module.num_key_value_groups
        logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
        logits.masked_fill_(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
        return (logits.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("observed", attention)
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, _, kwargs: given.__setitem__(module.layer_idx, kwargs), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()

    size = model.model.layers[0].self_attn.head_dim
    positions = torch.arange(model.config.max_position_embeddings)[None]
    cos, sin = (t[0, :, : size // 2] for t in model.model.rotary_emb(torch.zeros(1, 1, size), positions))
    rotary = Rotary(torch.cat([cos, sin], 1), True)
    layers = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.rotary_emb = model.model.rotary_emb  # as kvpress's own hook does
        layers.append(
            Layer(layer.self_attn, given[index]["hidden_states"], *passed[index], given[index], rotary)
        )
    return layers


@pytest.fixture(scope="module")
def model(smollm2):
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("observed", lambda *_, **__: None)  # `run` puts its own in this place
    return AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32, attn_implementation="observed"
    ).eval()


@pytest.fixture(scope="module")
def layers(model, long_ids) -> list[Layer]:
    return run(model, long_ids(NUM_TOKENS, seed=7))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def best(scores: Tensor, count: int) -> list[set[int]]:
    """The tokens of each head with the highest scores."""
    return [set(row.tolist()) for row in scores.topk(count, dim=-1).indices]


def shared(one: list[set[int]], other: list[set[int]]) -> float:
    """The fraction of kept tokens that are the same."""
    pairs = zip(one, other, strict=True)
    return sum(len(a & b) for a, b in pairs) / sum(map(len, one))


def agreement(layers: list[Layer], kept: int, ours, theirs, forced: int = 0) -> float:
    """The fraction of kept tokens below the window that are the same in all layers and heads.

    Args:
        layers: of the model.
        kept: tokens of each head, the last `forced` ones among them.
        ours: gives a layer's scores `[H, P - forced]`.
        theirs: gives a layer's scores `[H, P]`.
        forced: last tokens that the press must keep.
    """
    fractions = []
    for layer in layers:
        pressed = best(theirs(layer), kept)
        window = set(range(NUM_TOKENS - forced, NUM_TOKENS))
        assert all(window <= own for own in pressed), "kvpress's window competes"
        fractions.append(shared(best(ours(layer), kept - forced), [own - window for own in pressed]))
    return sum(fractions) / len(fractions)


SAME = {
    "snapkv": (
        POLICIES["snapkv"](window=WINDOW, kernel_size=KERNEL, pooling="avg"),
        lambda: kvpress.SnapKVPress(window_size=WINDOW, kernel_size=KERNEL),
        WINDOW,
    ),
    "snapkv, kvpress's defaults": (
        POLICIES["snapkv"](window=64, kernel_size=5, pooling="avg"),
        lambda: kvpress.SnapKVPress(),
        64,
    ),
    "tova": (POLICIES["tova"](), lambda: kvpress.TOVAPress(), 1),
    "knorm": (POLICIES["knorm"](), lambda: kvpress.KnormPress(), 0),
    "keydiff": (POLICIES["keydiff"](), lambda: kvpress.KeyDiffPress(), 0),
    "expected_attention": (
        POLICIES["expected_attention"](),
        lambda: kvpress.ExpectedAttentionPress(),
        0,
    ),
    "expected_attention, epsilon": (
        POLICIES["expected_attention"](future=64, skip=2, epsilon=0.02),
        lambda: kvpress.ExpectedAttentionPress(n_future_positions=64, n_sink=2, epsilon=0.02),
        0,
    ),
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("case", SAME)
def test_the_same_tokens_are_kept(layers, case, kept):
    policy, make, forced = SAME[case]
    if kept <= forced:
        pytest.skip("the window alone is more")
    press = make()
    assert (
        agreement(
            layers,
            kept,
            lambda layer: layer.score(policy, NUM_TOKENS - forced),
            lambda layer: layer.press(press),
            forced,
        )
        == 1.0
    )


@pytest.mark.parametrize("case", ["snapkv", "tova"])
def test_the_same_tokens_are_kept_from_attention_weights(layers, case):
    # The other way in which these presses get their attention: from the layer's eager output.
    policy, make, forced = SAME[case]
    press = make()
    same = agreement(
        layers[::6],
        150,
        lambda layer: layer.score(policy, NUM_TOKENS - forced),
        lambda layer: layer.press(press, attention=True),
        forced,
    )
    assert same == 1.0


@pytest.mark.parametrize("kept", KEPT)
def test_streaming_llm_keeps_the_same_tokens_and_its_sinks(layers, kept):
    press = kvpress.StreamingLLMPress(compression_ratio=1 - (kept + 0.5) / NUM_TOKENS, n_sink=4)

    def ours(layer):
        scores = layer.score(POLICIES["streaming_llm"](), NUM_TOKENS).clone()
        scores[:, :4] = torch.inf  # every method's sinks, which the configuration protects
        return scores

    assert agreement(layers, kept, ours, lambda layer: layer.press(press)) == 1.0


def test_snapkv_differs_by_its_max_pooling_and_a_sum_instead_of_a_mean_alone(layers):
    layer = layers[len(layers) // 2]
    theirs = layer.press(kvpress.SnapKVPress(window_size=WINDOW, kernel_size=KERNEL))[:, :-WINDOW]
    average = POLICIES["snapkv"](window=WINDOW, kernel_size=KERNEL, pooling="avg")
    ours = layer.score(average, NUM_TOKENS - WINDOW)
    torch.testing.assert_close(ours, theirs * WINDOW, atol=1e-5, rtol=1e-3)
    pooled = layer.score(POLICIES["snapkv"](), NUM_TOKENS - WINDOW)
    assert not torch.allclose(pooled, ours, rtol=0.1)
    assert 0.5 < shared(best(pooled, 118), best(theirs, 118)) < 1


def test_h2o_is_observed_attention_without_its_division_and_with_recent_tokens(layers):
    policy, press = POLICIES["h2o"](), kvpress.ObservedAttentionPress()
    queries = torch.arange(NUM_TOKENS, 0, -1)  # that see each token
    plain = total = 0.0
    for layer in layers:
        theirs = layer.press(press, attention=True)
        group = layer.module.num_key_value_groups
        ours = layer.score(policy, NUM_TOKENS)
        wanted = theirs * queries * group
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
        assert best(ours, 150) == best(wanted, 150)
        plain, total = plain + shared(best(ours, 150), best(theirs, 150)), total + 1
        refined = policy.refine(ours, torch.full((len(ours),), 150), layer.observation(0, NUM_TOKENS))
        recent = set(range(NUM_TOKENS - 75, NUM_TOKENS))
        hitters = best(wanted[:, : NUM_TOKENS - 75], 75)
        assert best(refined, 150) == [own | recent for own in hitters]
    assert plain / total < 0.9, "the press favours recent tokens by its division"


@pytest.mark.parametrize("kept", [90, 150, 300])
def test_criticalkv_takes_the_same_tokens_in_both_stages(layers, kept):
    # The press counts the window among its first stage, and its SnapKV averages where ours sums: with the
    # same first stage and the same weight of epsilon nothing else differs.
    press = kvpress.CriticalKVPress(kvpress.SnapKVPress(window_size=WINDOW, kernel_size=KERNEL))
    press.compression_ratio = 1 - (kept + 0.5) / NUM_TOKENS
    below = kept - WINDOW
    first = kept // 2 - WINDOW
    base = POLICIES["snapkv"](window=WINDOW, kernel_size=KERNEL, pooling="avg")
    policy = POLICIES["criticalkv"](
        base=base, first_stage=(first + 0.5) / below, epsilon=press.epsilon * WINDOW
    )

    def ours(layer):
        scores = layer.score(policy, NUM_TOKENS - WINDOW)
        number = torch.full((len(scores),), below)
        return policy.refine(scores, number, layer.observation(WINDOW, NUM_TOKENS - WINDOW))

    assert agreement(layers, kept, ours, lambda layer: layer.press(press), WINDOW) == 1.0


def test_criticalkvs_lengths_are_the_presses(layers):
    # With scores of zero and epsilon 1 what remains is the length.
    policy = POLICIES["criticalkv"](first_stage=0.0, epsilon=1.0)
    for layer in layers[::6]:
        observation = layer.observation(WINDOW, NUM_TOKENS)
        heads = layer.keys.shape[1]
        ours = policy.refine(torch.zeros(heads, NUM_TOKENS), torch.full((heads,), 10), observation)
        theirs = kvpress.CriticalKVPress.vwl1norm(layer.values, layer.module)[0]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("num_tokens", [600, 4000])
@pytest.mark.parametrize("beta", [2, 20])
def test_pyramid_budgets_are_the_presses_but_for_rounding(layers, ratio, num_tokens, beta):
    # kvpress leaves the pyramid when its thinnest layer would get less than a window: here of one token.
    press = kvpress.PyramidKVPress(compression_ratio=ratio, window_size=1, beta=beta)
    mean = round(num_tokens * (1 - ratio))
    below = num_tokens - 1
    theirs = [press.get_layer_budget(layer.module, num_tokens) for layer in layers]
    assert beta == 20 or len(set(theirs)) > 2, "a pyramid"
    heads = layers[0].keys.shape[1]
    scores = torch.zeros(len(layers), heads, below)
    counts = ALLOCATIONS["pyramid"](beta=beta).allocate(scores, mean * len(layers) * heads, 1)
    assert int(counts.sum()) == mean * len(layers) * heads
    # Both round; ours also rounds the thinnest layer down, as the authors' code does.
    for own, budget in zip(counts.tolist(), theirs, strict=True):
        assert all(abs(count - budget) <= 2 for count in own)
    assert abs(sum(theirs) - mean * len(layers)) <= len(layers)


def test_kvzip_pays_each_token_the_same_while_the_context_is_repeated(model, long_ids, tokenizer):
    chunk = 400  # two parts, the second one short
    ids = long_ids(NUM_TOKENS, seed=7)
    press = kvpress.KVzipPress(compression_ratio=0.5, chunk_size=chunk)
    press.context_length, press.prefix_length = NUM_TOKENS, 0
    press._context_ids = torch.tensor([ids])
    press._suffix_ids = torch.empty(1, 0, dtype=torch.int64)  # the chat template's, which ours does without
    parts = press.prepare(model, tokenizer)
    assert sum(part.shape[1] for part, _ in parts) == NUM_TOKENS
    policy = POLICIES["kvzip"](chunk=chunk)
    ours = torch.zeros(len(model.model.layers), model.config.num_key_value_heads, NUM_TOKENS)
    begin = 0
    for part, repetition in parts:
        end, size = begin + part.shape[1], repetition.shape[1]
        press.start_idx, press.end_idx = begin, end
        sinks = min(policy.sinks, begin)
        for index, layer in enumerate(run(model, ids + repetition[0].tolist())):
            cos, sin = (t[:, -size:] for t in layer.kwargs["position_embeddings"])
            press.score_kvzip(
                layer.module,
                layer.hidden[:, -size:],
                layer.keys,
                layer.values,
                None,
                {"position_embeddings": (cos, sin)},
            )
            whole = layer.observation(size, 0)
            chosen = [*range(sinks), *range(begin, end), *range(NUM_TOKENS, NUM_TOKENS + size)]
            keys = whole.keys[:, chosen]
            importance = policy.observe(replace(whole, keys=keys, values=keys[..., :0]))
            ours[index, :, begin:end] = importance[:, sinks : sinks + end - begin]
        begin = end
    theirs = press.score_val[:, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    # All heads of all layers compete.
    for kept in KEPT:
        count = kept * ours.shape[0] * ours.shape[1]
        own, other = ours.flatten().topk(count).indices, theirs.flatten().topk(count).indices
        assert shared([set(own.tolist())], [set(other.tolist())]) >= 0.9999


def test_the_pass_is_the_models(model, layers, long_ids):
    # Otherwise both sides might agree on what the model does not compute.
    ids = torch.tensor([long_ids(NUM_TOKENS, seed=7)])
    ours = model(ids, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    try:
        theirs = model(ids, use_cache=False).logits
    finally:
        model.set_attn_implementation("observed")
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert layers[0].module.scaling == layers[0].module.head_dim ** -0.5
