"""The rotated channels may be anywhere in a head, or none."""

import pytest
import torch

from vllm_kvcompress.policies.rotary import Rotary


def cos_sin(rotated):
    angle = torch.arange(50)[:, None] / 10 ** (torch.arange(rotated // 2) / rotated)
    return torch.cat([angle.cos(), angle.sin()], 1)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("first", [0, 2, 4])
def test_only_the_rotated_channels_are_turned_back(is_neox, first):
    table, vectors = cos_sin(4), torch.randn(5, 3, 8)
    undone = Rotary(table, is_neox, first).undo(vectors, 7)
    rotated = slice(first, first + 4)
    expected = vectors.clone()
    expected[..., rotated] = Rotary(table, is_neox).undo(vectors[..., rotated], 7)
    assert torch.equal(undone, expected) and not torch.equal(undone, vectors)


@pytest.mark.parametrize("is_neox", [True, False])
def test_only_the_rotated_channels_are_in_the_mean_matrix(is_neox):
    last = Rotary(cos_sin(4), is_neox, 4).mean_matrix(3, 9, 8)
    assert torch.equal(last[:4, :4], torch.eye(4)) and not last[:4, 4:].any() and not last[4:, :4].any()
    assert torch.equal(last[4:, 4:], Rotary(cos_sin(4), is_neox).mean_matrix(3, 9, 4))


def test_the_identity_changes_nothing_at_any_position():
    vectors = torch.randn(5, 3, 8)
    identity = Rotary.identity(50)
    assert torch.equal(identity.undo(vectors, 40), vectors)
    assert torch.equal(identity.mean_matrix(40, 100, 8), torch.eye(8))


def test_chosen_positions_are_a_table_of_their_own():
    rotary, vectors = Rotary(cos_sin(8), True), torch.randn(2, 8)
    chosen = rotary.at(torch.tensor([31, 4])).undo(vectors, 0)
    for row, position in enumerate((31, 4)):
        assert torch.equal(chosen[row], rotary.undo(vectors[row : row + 1], position)[0])
