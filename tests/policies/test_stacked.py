"""Policies that score several layers at once score each as if it were alone."""

import dataclasses

import pytest
import torch

from vllm_kvcompress import scorers
from vllm_kvcompress.policies import POLICIES, LayerObservation, Policy
from vllm_kvcompress.policies.expected_attention import QueryStatistics
from vllm_kvcompress.policies.rotary import Rotary

LAYERS, HEADS, GROUP, SIZE, WIDTH, SCORED = 3, 2, 2, 8, 40, 30
STACKED = [name for name, policy in POLICIES.items() if policy.stacks_layers is True]


@pytest.fixture(params=[False, True], ids=["even", "padded"])
def layers(request) -> list[LayerObservation]:
    draw = torch.Generator().manual_seed(0)
    made, angles = [], torch.rand(WIDTH + 600, SIZE // 2, generator=draw) * 6
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], 1), is_neox=True)
    for layer in range(LAYERS):
        keys = torch.randn(HEADS, WIDTH, SIZE, generator=draw) * (layer + 1)
        state = torch.rand(HEADS, WIDTH, generator=draw)
        padding = torch.randint(0, 9, (HEADS,), generator=draw) if request.param else None
        queries = torch.randn(WIDTH - SCORED, HEADS, GROUP, SIZE, generator=draw)
        made.append(
            LayerObservation(
                keys,
                keys,
                queries,
                0.4,
                SCORED,
                WIDTH,
                padding=padding,
                state=state,
                layers=(layer,),
                rotary=rotary,
            )
        )
    return made


@pytest.fixture
def scorer(tmp_path) -> str:
    draw, units = torch.Generator().manual_seed(1), 5
    shapes = (2 * SIZE, units), (units,), (units,), ()
    up, *others = (torch.randn(LAYERS, HEADS, *shape, generator=draw) for shape in shapes)
    scorers.write(tmp_path / "scorer", scorers.Scorer("", "", up * 0.1, *others))
    return str(tmp_path / "scorer")


def moments(layer: LayerObservation) -> LayerObservation:
    """Its state as `expected_attention` has it."""
    size = HEADS, GROUP, SIZE
    draw = torch.Generator().manual_seed(layer.layers[0])
    scatter = torch.randn(*size, SIZE, generator=draw) * 3
    mean = torch.randn(*size, generator=draw)
    return dataclasses.replace(layer, state=QueryStatistics(70, mean, scatter @ scatter.transpose(2, 3)))


def unseen(layer: LayerObservation) -> LayerObservation:
    return dataclasses.replace(layer, state=None)


def stacked(policy: Policy, layers: list[LayerObservation], window: int) -> LayerObservation:
    def together(name: str, dim: int = 0):
        parts = [getattr(layer, name) for layer in layers]
        return None if parts[0] is None else torch.cat(parts, dim)

    return dataclasses.replace(
        layers[0],
        layers=tuple(range(LAYERS)),
        queries=together("queries", 1)[WIDTH - SCORED - window :],
        state=policy.stack([layer.state for layer in layers]),
        **{name: together(name) for name in ("keys", "values", "padding")},
    )


def test_most_methods_are():
    assert {*POLICIES} - {*STACKED} == {"criticalkv"}


@pytest.mark.parametrize("name", STACKED)
def test_each_layer_is_scored_as_if_it_were_alone(name, layers, scorer):
    cls = POLICIES[name]
    names = {field.name for field in dataclasses.fields(cls)}
    options = {"window": 5, "scorer": scorer}
    policy = cls(**{name: value for name, value in options.items() if name in names})
    if name == "expected_attention":
        layers = [moments(layer) for layer in layers]
    if name == "attention_matching":
        layers = [dataclasses.replace(layer, state=policy.observe(unseen(layer))) for layer in layers]
    held = [torch.ones(HEADS, SCORED, dtype=torch.bool)] * LAYERS
    if layers[0].padding is not None:
        held = [torch.arange(SCORED) >= layer.padding[:, None] for layer in layers]
    alone = []
    for layer in layers:
        own = dataclasses.replace(layer, queries=layer.queries[len(layer.queries) - policy.window :])
        alone.append((own, policy.score(own)))
    whole = stacked(policy, layers, policy.window)
    found = policy.score(whole)
    kept = torch.full((HEADS,), 12)
    for index, ((own, wanted), mask) in enumerate(zip(alone, held, strict=True)):
        ours = found[index * HEADS : (index + 1) * HEADS]
        torch.testing.assert_close(ours[mask], wanted[mask], atol=1e-6, rtol=1e-5)
        refined = policy.refine(found.clone(), kept.repeat(LAYERS), whole)[
            index * HEADS : (index + 1) * HEADS
        ]
        torch.testing.assert_close(
            refined[mask], policy.refine(wanted.clone(), kept, own)[mask], atol=1e-6, rtol=1e-5
        )


def test_states_are_aligned_at_their_last_columns():
    states = [torch.rand(HEADS, width) for width in (5, 8, 3)]
    policy = POLICIES["h2o"]()
    found = policy.stack(states).view(3, HEADS, 8)
    for own, state in zip(found, states, strict=True):
        width = state.shape[1]
        assert torch.equal(own[:, 8 - width :], state) and not own[:, : 8 - width].any()
