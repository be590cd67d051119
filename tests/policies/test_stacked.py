"""Policies that score several layers at once score each as if it were alone."""

import dataclasses

import pytest
import torch

from vllm_kvcompress.policies import POLICIES, LayerObservation

LAYERS, HEADS, GROUP, SIZE, WIDTH, SCORED = 3, 2, 2, 8, 40, 30
STACKED = [name for name, policy in POLICIES.items() if policy.stacks_layers is True]


@pytest.fixture(params=[False, True], ids=["even", "padded"])
def layers(request) -> list[LayerObservation]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for layer in range(LAYERS):
        keys = torch.randn(HEADS, WIDTH, SIZE, generator=draw) * (layer + 1)
        state = torch.rand(HEADS, WIDTH, generator=draw)
        padding = torch.randint(0, 9, (HEADS,), generator=draw) if request.param else None
        queries = torch.randn(WIDTH - SCORED, HEADS, GROUP, SIZE, generator=draw)
        made.append(
            LayerObservation(
                keys, keys, queries, 0.4, SCORED, WIDTH, padding=padding, state=state, layer=layer
            )
        )
    return made


def stacked(layers: list[LayerObservation], window: int) -> LayerObservation:
    def together(name: str, dim: int = 0):
        parts = [getattr(layer, name) for layer in layers]
        return None if parts[0] is None else torch.cat(parts, dim)

    return dataclasses.replace(
        layers[0],
        num_layers=LAYERS,
        queries=together("queries", 1)[WIDTH - SCORED - window :],
        **{name: together(name) for name in ("keys", "values", "padding", "state")},
    )


def test_most_methods_are():
    assert {"snapkv", "kv_compress", "tova", "knorm", "keydiff", "h2o", "kvzip"} <= {*STACKED}


@pytest.mark.parametrize("name", STACKED)
def test_each_layer_is_scored_as_if_it_were_alone(name, layers):
    cls = POLICIES[name]
    names = {field.name for field in dataclasses.fields(cls)}
    policy = cls(**({"window": 5} if "window" in names else {}))
    held = [torch.ones(HEADS, SCORED, dtype=torch.bool)] * LAYERS
    if layers[0].padding is not None:
        held = [torch.arange(SCORED) >= layer.padding[:, None] for layer in layers]
    alone = []
    for layer in layers:
        own = dataclasses.replace(layer, queries=layer.queries[len(layer.queries) - policy.window :])
        alone.append((own, policy.score(own)))
    whole = stacked(layers, policy.window)
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
