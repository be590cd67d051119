"""What Attention Matching notes of the queries, whatever steps they come in, and what it fits to."""

from dataclasses import replace

import pytest
import torch
from allocated import measured
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from test_policies import naive_attention, observe

from vllm_kvcompress.matching import finish, solve_bytes_on
from vllm_kvcompress.policies import POLICIES, LayerObservation
from vllm_kvcompress.policies.base import RepeatedPart

CODED = 2**-10  # relative: the lowest bits of how much a query paid say which query it is


def policy(**options):
    return POLICIES["attention_matching"](**options)


def repetition(num_context, sinks, asked, part, heads=2, group=3, seed=0, softcap=0.0) -> LayerObservation:
    """Sinks, a part of a context, and a repetition of `asked + part` tokens, all of them observed."""
    width = sinks + 2 * part + asked
    drawn = observe(width, asked + part, heads, group, softcap=softcap, seed=seed)
    return replace(drawn, num_tokens=num_context + asked + part, num_scored=width)


def chunks(whole: LayerObservation, lengths: list[int]) -> list[LayerObservation]:
    """The same queries in several steps, each of which sees the columns up to its last one."""
    parts, begin, num_queries = [], 0, len(whole.queries)
    for length in lengths:
        end, later = begin + length, num_queries - begin - length
        width = whole.keys.shape[1] - later
        parts.append(
            replace(
                whole,
                keys=whole.keys[:, :width],
                values=whole.values[:, :width],
                queries=whole.queries[begin:end],
                num_scored=width,
                num_tokens=whole.num_tokens - later,
            )
        )
        begin = end
    assert begin == num_queries
    return parts


def by_hand(whole: LayerObservation, seen: slice):
    """Squares, the most paid, and by which query `[G, n]`, of some columns."""
    attention = naive_attention(whole)[..., seen]  # [H, G, n, c]
    flat = attention.flatten(1, 2)
    return flat.square().sum(1), flat.amax(1), flat


@settings(max_examples=25, deadline=None)
@given(
    part=st.integers(1, 40),
    asked=st.integers(0, 9),
    sinks=st.integers(0, 4),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    cuts=st.lists(st.integers(1, 30), max_size=3),
    softcap=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 1000),
)
def test_what_a_repetition_pays_is_summed_and_its_best_query_kept(
    part, asked, sinks, heads, group, cuts, softcap, seed
):
    num_context, begin = part + 7, 5
    whole = repetition(num_context, sinks, asked, part, heads, group, seed, softcap)
    of_part = RepeatedPart(slice(begin, begin + part), slice(sinks, sinks + part), num_context)
    lengths, left = [], asked + part
    for cut in cuts:
        if cut < left:
            lengths.append(cut)
            left -= cut
    state = None
    for chunk in chunks(whole, [*lengths, left]):
        state = policy().repeat(replace(chunk, state=state), of_part)
    squares, most, paid = by_hand(whole, of_part.seen)
    own = of_part.columns
    assert state.squares.shape == (heads, num_context)
    torch.testing.assert_close(state.squares[:, own].double(), squares, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(state.most[:, own].double(), most, atol=1e-6, rtol=CODED)
    for untouched in (slice(0, begin), slice(begin + part, num_context)):
        assert not state.squares[:, untouched].any() and not state.by[:, untouched].any()
    queries = whole.queries.permute(1, 2, 0, 3).flatten(1, 2)  # [H, G·n, D]
    for head in range(heads):
        for column in range(part):
            same = (queries[head] == state.by[head, begin + column]).all(1)
            assert same.any(), "it is one of the queries"
            member = int(state.member[head, begin + column])
            assert same.view(group, -1)[member].any()
            assert paid[head, same, column].max() >= most[head, column] * (1 - CODED) - 1e-6
            position = int(state.at[head, begin + column]) - (whole.num_tokens - asked - part)
            assert same.view(group, -1)[:, position].any()


@pytest.mark.parametrize(
    ("group", "references", "total"), [(1, 8, 5), (3, 24, 200), (7, 64, 129), (4, 2, 30)]
)
def test_the_sample_is_even_bounded_and_the_same_whatever_the_steps(group, references, total):
    whole = repetition(total + 3, 0, total - 20 if total > 20 else 0, min(total, 20), 2, group)
    part = RepeatedPart(slice(0, min(total, 20)), slice(0, min(total, 20)), total + 3)
    count = len(whole.queries)
    states = []
    for lengths in ([count], [1] * count, [count // 3, count - count // 3]):
        state = None
        for chunk in chunks(whole, [length for length in lengths if length]):
            state = policy(references=references).repeat(replace(chunk, state=state), part)
        states.append(state)
    for state in states:
        positions = state.positions - (whole.num_tokens - count)
        assert positions.tolist() == list(range(0, count, state.stride))
        assert torch.equal(state.sample, whole.queries[positions])
        most = max(1, references // group)
        assert len(state.sample) <= most
        assert state.stride == 1 or 2 * len(state.sample) >= most
        assert state.stride == states[0].stride


def test_the_prompts_own_queries_are_observed_step_by_step():
    whole = observe(50, 50, 2, 3)
    whole = replace(whole, num_tokens=50, num_scored=50)
    own = policy(queries="prompt", references=30)
    assert own.accumulates and not own.repeats
    state = None
    for chunk in chunks(whole, [20, 1, 29]):
        state = own.observe(replace(chunk, state=state))
    squares, most, _ = by_hand(whole, slice(0, 50))
    torch.testing.assert_close(state.squares.double(), squares, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(state.most.double(), most, atol=1e-6, rtol=CODED)
    assert state.positions.tolist() == list(range(0, 50, state.stride)) and 5 <= len(state.sample) <= 10
    for head in range(2):
        for column in range(50):
            at = int(state.at[head, column])
            assert at >= column
            assert (whole.queries[at, head] == state.by[head, column]).all(1).any()


def observed(own, width=60, scored=48, heads=2, group=3, seed=3):
    whole = observe(width, width, heads, group, seed=seed)
    whole = replace(whole, num_tokens=width, num_scored=width)
    state = own.observe(whole)
    return replace(whole, state=state, num_scored=scored, queries=whole.queries[:0])


def drawn(head, member, width=60, heads=2, group=3, seed=3):
    """A query head's queries, as `observed` drew them."""
    return observe(width, width, heads, group, seed=seed).queries[:, head, member]


def fitted(own, seen, columns, present, heads=slice(0, 2)):
    return finish(own.solve(seen, heads, columns, present, 0))[2]


def dense(queries, keys, values, bias, scale):
    logits = queries.double() @ keys.double().T * scale + bias
    return logits.softmax(-1) @ values.double(), logits.logsumexp(-1)


def test_what_is_fitted_answers_the_queries_better_than_what_was_kept():
    own = policy()
    seen = observed(policy(queries="prompt"))
    state = seen.state
    columns = state.squares[:, :48].argsort(1, descending=True)[:, :12].sort(1).values
    present = torch.ones_like(columns, dtype=torch.bool)
    present[1, 9:] = False
    fit = fitted(own, seen, columns, present)
    for head in range(2):
        kept = columns[head][present[head]]
        queries = torch.cat([state.sample[:, head].flatten(0, 1), state.by[head, kept]])
        keys, values = seen.keys[head, :48], seen.values[head, :48]
        outputs, mass = dense(queries, keys, values, 0, seen.scale)

        def errors(bias, written, head=head, kept=kept, queries=queries, outputs=outputs, mass=mass):
            got, own_mass = dense(queries, seen.keys[head, kept], written, bias, seen.scale)
            return float((got - outputs).square().mean()), float(
                ((own_mass - mass).exp() - 1).square().mean()
            )

        n = len(kept)
        solved = errors(fit.bias[head, :n].double(), fit.values[head, :n])
        plain = errors(torch.zeros(n), seen.values[head, kept])
        assert solved[0] < plain[0] / 2 and solved[1] < plain[1] / 2
    # Alone a head is fitted to the same queries as beside one that keeps more.
    second = replace(seen, keys=seen.keys[1:], values=seen.values[1:])
    one = fitted(own, second, columns[1:, :9], present[1:, :9], slice(1, 2))
    torch.testing.assert_close(one.values[0, :9], fit.values[1, :9], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(one.bias[0, :9], fit.bias[1, :9], atol=1e-4, rtol=1e-3)


def test_pursued_tokens_are_as_many_and_add_up_to_more_of_the_mass():
    seen = observed(policy(queries="prompt"))
    columns = seen.state.squares[:, :48].argsort(1, descending=True)[:, :12].sort(1).values
    present = torch.ones_like(columns, dtype=torch.bool)
    present[1, 9:] = False
    same, there, _ = finish(policy().solve(seen, slice(0, 2), columns, present, 2))
    assert same is columns and there is present
    pursued, there, _ = finish(policy(keys="omp").solve(seen, slice(0, 2), columns, present, 2))
    assert there.sum(1).tolist() == [12, 9]
    for head in range(2):
        own, before = pursued[head][there[head]], columns[head][present[head]]
        assert own[:2].tolist() == [0, 1] and bool((own.diff() > 0).all())
        queries = torch.cat([seen.state.sample[:, head].flatten(0, 1), seen.state.by[head, before]])
        softmax = (queries.double() @ seen.keys[head, :48].double().T * seen.scale).softmax(-1).numpy()
        left = [nnls(softmax[:, kept.tolist()], softmax.sum(1))[1] for kept in (own, before)]
        assert left[0] < 0.95 * left[1]
    # Of some heads alone it is the same; keys and values are theirs.
    second = replace(seen, keys=seen.keys[1:], values=seen.values[1:])
    one, *_ = finish(policy(keys="omp").solve(second, slice(1, 2), columns[1:, :9], present[1:, :9], 2))
    assert one[0].tolist() == pursued[1][there[1]].tolist()


def test_a_querys_sink_is_that_of_its_own_head():
    own = policy()
    seen = observed(policy(queries="prompt"))
    columns = seen.state.squares[:, :48].argsort(1, descending=True)[:, :12].sort(1).values
    random = torch.Generator().manual_seed(4)
    sinks = torch.randn(2, 3, generator=random) * 3 + 3
    problem, asked = own._problem(replace(seen, sinks=sinks), slice(0, 2), columns)
    for head in range(2):
        for queries, told in ((problem.queries, problem.sinks), (asked.queries, asked.sinks)):
            for query, sink in zip(queries[head], told[head].tolist(), strict=True):
                members = {g for g in range(3) if (drawn(head, g) == query).all(1).any()}
                assert any(sink == float(sinks[head, member]) for member in members) and members
    second = replace(seen, sinks=sinks, keys=seen.keys[1:], values=seen.values[1:])
    some, _ = own._problem(second, slice(1, 2), columns[1:])
    assert torch.equal(some.sinks, problem.sinks[1:])


def test_the_most_recent_tokens_may_have_a_share_of_what_is_kept():
    assert policy().num_recent(300) == 0 and policy(recent=0.25).num_recent(303) == 75
    for wrong, problem in (
        ({"recent": 1.5}, "between 0 and 1"),
        ({"recent": 0.1, "keys": "omp"}, "keys=att"),
    ):
        with pytest.raises(ValueError, match=problem):
            policy(**wrong)


def test_ablations_leave_biases_or_values_as_they_were():
    seen = observed(policy(queries="prompt"))
    columns = torch.arange(0, 48, 4).expand(2, -1)
    present = torch.ones_like(columns, dtype=torch.bool)
    own = seen.values.gather(1, columns[..., None].expand(-1, -1, seen.values.shape[2]))
    without = fitted(policy(bias=False), seen, columns, present)
    assert not without.bias.any() and not torch.allclose(without.values, own)
    without = fitted(policy(values=False), seen, columns, present)
    assert without.bias.any() and torch.equal(without.values, own)


def test_queries_of_the_prompt_are_matched_over_what_they_saw():
    seen = observed(policy(queries="prompt", references=10**6))
    columns = torch.tensor([[3, 9, 20], [0, 1, 2]])
    present = torch.ones_like(columns, dtype=torch.bool)
    early = seen.state.positions < 40
    assert early.any() and not early.all()
    sample, positions = seen.state.sample[early], seen.state.positions[early]
    state = replace(seen.state, sample=sample, positions=positions, at=seen.state.at.clamp(max=39))
    values = torch.where(torch.arange(60)[:, None] >= 40, 99.0, seen.values)
    fits = {
        queries: [
            fitted(policy(queries=queries), replace(seen, state=state, values=own), columns, present)
            for own in (seen.values, values)
        ]
        for queries in ("prompt", "repeat")
    }
    one, other = fits["prompt"]
    assert torch.equal(one.values, other.values), "nobody saw what has changed"
    one, other = fits["repeat"]
    assert not torch.allclose(one.values, other.values), "a repetition comes after all columns"


def test_states_of_layers_are_scored_as_more_heads():
    states = [observed(policy(queries="prompt"), seed=seed).state for seed in (1, 2)]
    joined = policy().stack(states)
    assert torch.equal(joined.squares, torch.cat([state.squares for state in states]))
    seen = observed(policy(queries="prompt"))
    score = policy().score(replace(seen, state=joined))
    assert torch.equal(score, joined.squares[:, :48])


@pytest.mark.parametrize("options", [{"references": 0}, {"ridge": -0.1}, {"chunk": 0}, {"sinks": -1}])
def test_hyper_parameters_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        policy(**options)


def test_what_is_noted_takes_no_more_memory_than_it_says():
    own = policy(queries="prompt", references=64)
    seen = observe(400, 400, 2, 3)
    state = own.observe(replace(seen, num_tokens=400, num_scored=400))
    held = [state.squares, state.most, state.by, state.at, state.member, state.sample]
    used = sum(tensor.numel() * tensor.element_size() for tensor in held)
    said = 2 * own.state_bytes(400, seen.keys.shape[2], 4)
    assert 0.8 * said < used <= said


def test_fitting_long_heads_takes_memory_of_a_part_and_of_their_queries():
    def bytes_of(tokens, columns, size=128, heads=1, device="cpu", keys="attention"):
        return policy(keys=keys).fit_bytes(heads, tokens, columns, size, device)

    short, long, longer = (bytes_of(tokens, tokens // 4) for tokens in (16384, 65536, 131072))
    assert short < long < longer < 2.2 * long, "it grows with the context, not with its square"
    assert bytes_of(2048, 256, 64) < 2**28
    assert bytes_of(200, 50, 64) < bytes_of(200, 50, 64, keys="omp")
    assert bytes_of(65536, 16384, keys="omp") < 1.2 * long, "nor does pursuit, which is among fewer"
    for tokens in (500, 4096, 5000, 40000):
        most = policy().most_fit_bytes(tokens, 128, "cuda")
        every = [bytes_of(tokens, columns, device="cuda") for columns in range(1, tokens + 1, 97)]
        assert 0.9 * most <= max(every) <= most, "one that keeps all is not the one that takes most"
    assert bytes_of(4096, 256, heads=8, device="cuda") <= solve_bytes_on("cuda"), "a layer's heads at once"


def test_pursuit_takes_no_more_memory_than_it_says(tmp_path):
    own = policy(keys="omp", references=256)
    seen = observed(policy(queries="prompt", references=256), width=1400, scored=1400)
    columns = seen.state.squares.argsort(1, descending=True)[:, :200].sort(1).values
    present = torch.ones_like(columns, dtype=torch.bool)

    def solve():
        finish(own.solve(seen, slice(0, 2), columns, present, 4))

    said = own.fit_bytes(2, 1400, 200, seen.keys.shape[2], "cpu")
    assert measured(tmp_path / "trace.json", solve) <= said
