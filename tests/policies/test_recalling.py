"""What stays of a matched context as its output grows: by the output's last queries and by recalled ones."""

import math
from dataclasses import replace

import pytest
import torch
from test_policies import observe

from vllm_kvcompress.policies import POLICIES
from vllm_kvcompress.policies.kv_compress import KVCompress
from vllm_kvcompress.policies.recalling import Recalling

WINDOW = 4
FEATURES = ["plain", "soft cap", "sinks", "bias", "padding", "all"]


def drawn(features: str, seed: int = 0):
    """Two heads of three query heads each, 30 columns of which 24 are scored, and nine recalled positions."""
    random = torch.Generator().manual_seed(seed)
    seen = replace(observe(30, WINDOW, 2, 3, seed=seed), num_scored=24)
    options = {
        "soft cap": {"logits_soft_cap": 1.5},
        "sinks": {"sinks": torch.randn(2, 3, generator=random)},
        "bias": {"bias": torch.randn(2, 30, generator=random)},
        "padding": {"padding": torch.tensor([0, 7])},
        "plain": {},
    }
    chosen = options if features == "all" else {features: options[features]}
    seen = replace(seen, **{name: value for option in chosen.values() for name, value in option.items()})
    return seen, torch.randn(9, 2, 3, seen.keys.shape[2], generator=random)


def paid(seen, recalled, head: int) -> list[float]:
    """Σ A² of the recalled queries over a head's scored columns, in loops."""
    first = 0 if seen.padding is None else int(seen.padding[head])
    total = [0.0] * seen.num_scored
    for at in range(len(recalled)):
        for member in range(3):
            terms = []
            for column in range(seen.num_scored):
                logit = seen.scale * float(
                    recalled[at, head, member].double() @ seen.keys[head, column].double()
                )
                if seen.logits_soft_cap:
                    logit = seen.logits_soft_cap * math.tanh(logit / seen.logits_soft_cap)
                if seen.bias is not None:
                    logit += float(seen.bias[head, column])
                terms.append(math.exp(logit) if column >= first else 0.0)
            sink = 0.0 if seen.sinks is None else math.exp(float(seen.sinks[head, member]))
            for column, term in enumerate(terms):
                total[column] += (term / (sum(terms) + sink)) ** 2
    return total


@pytest.mark.parametrize("features", FEATURES)
def test_recalled_queries_add_what_they_pay_to_the_scored_columns(features):
    seen, recalled = drawn(features)
    policy = Recalling(window=WINDOW)
    scores = policy.score(replace(seen, state=recalled))
    window = KVCompress(window=WINDOW).score(seen)
    assert torch.equal(policy.score(seen), window), "of none the window alone scores"
    for head in range(2):
        first = 0 if seen.padding is None else int(seen.padding[head])
        expected = torch.tensor(paid(seen, recalled, head)) + window[head]
        torch.testing.assert_close(scores[head, first:], expected[first:].float(), atol=1e-5, rtol=1e-4)
    assert float((scores - window).max()) > 0.1


def test_layers_are_scored_together_as_one_by_one():
    policy, layers = Recalling(window=WINDOW), [drawn("all", seed) for seed in (0, 1)]
    alone = [policy.score(replace(seen, state=recalled)) for seen, recalled in layers]
    joined = {
        name: torch.cat([getattr(seen, name) for seen, _ in layers])
        for name in ("keys", "values", "sinks", "bias", "padding")
    }
    queries = torch.cat([seen.queries for seen, _ in layers], 1)
    together = replace(layers[0][0], **joined, queries=queries, layers=(0, 1))
    stacked = policy.stack([recalled for _, recalled in layers])
    torch.testing.assert_close(policy.score(replace(together, state=stacked)), torch.cat(alone))
    assert policy.stack([None, None]) is None


@pytest.mark.parametrize(("sampled", "recalled"), [(100, 64), (64, 64), (5, 64), (130, 7), (6, 0)])
def test_recalled_are_even_and_bounded_and_hold_nothing_else(sampled, recalled):
    own = POLICIES["attention_matching"](recalled=recalled, window=WINDOW, references=10**4)
    state = own.observe(replace(observe(sampled, sampled, 2, 3), num_tokens=sampled))
    assert len(state.sample) == sampled
    kept = own.recall(state)
    if not recalled:
        assert kept is None
        return
    stride = -(-sampled // recalled)
    assert len(kept) == -(-sampled // stride) <= recalled
    assert torch.equal(kept, state.sample[::stride])
    assert kept.untyped_storage().nbytes() == kept.nbytes
    assert replace(own, window=0).recall(state) is None, "nothing is compacted again"
    assert own.recall(None) is None
