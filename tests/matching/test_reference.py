"""Attention over all tokens is what loops in float64 make of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_attention import FEATURES, attention, draw

from vllm_kvcompress.matching import attend
from vllm_kvcompress.matching.reference import attention_weights


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("chunk_bytes", [2**24, 4 * 3 * 40 * 7, 1])
def test_attention_is_the_softmax(features, chunk_bytes):
    problem = draw(features=features)
    reference = attend(problem, chunk_bytes)
    weights = attention_weights(problem, reference, chunk_bytes)
    for head in range(3):
        softmax, mass, outputs = attention(problem, head)
        np.testing.assert_allclose(weights[head], softmax, atol=2e-5)
        np.testing.assert_allclose(reference.outputs[head], outputs, atol=1e-4)
        np.testing.assert_allclose(reference.log_mass[head], log(mass), atol=1e-4)
        np.testing.assert_allclose(reference.share[head], softmax.sum(1), atol=2e-5)
        np.testing.assert_allclose(reference.scores[head], np.sqrt((softmax**2).mean(0)), atol=2e-5)


def log(mass):
    return np.log(mass, out=np.full_like(mass, -np.inf), where=mass > 0)


def test_queries_that_see_nothing_are_among_those_tested():
    problem = draw(features="all")
    assert (problem.limits <= problem.padding[:, None]).any()


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_only_differences_of_logits_count(shift):
    problem = draw(features="bias")
    moved = attend(replace(problem, bias=problem.bias + shift))
    reference = attend(problem)
    torch.testing.assert_close(moved.outputs, reference.outputs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved.log_mass, reference.log_mass + shift, atol=1e-4, rtol=1e-5)


def test_bfloat16_is_computed_in_float32():
    problem = draw()
    names = ("keys", "values", "queries")
    half = {name: getattr(problem, name).bfloat16() for name in names}
    got = attend(replace(problem, **half))
    expected = attend(replace(problem, **{name: tensor.float() for name, tensor in half.items()}))
    assert torch.equal(got.outputs, expected.outputs) and torch.equal(got.scores, expected.scores)


@pytest.mark.parametrize("name", ["values", "queries", "padding", "sinks", "bias", "limits"])
def test_a_tensor_of_another_shape_is_named(name):
    problem = draw(features="all")
    with pytest.raises(ValueError, match=f"^{name} must be"):
        replace(problem, **{name: getattr(problem, name)[:1]})
