"""Foresight scores a token by its key without rotation and its value, wherever the token is."""

import math

import pytest
import torch

from vllm_kvcompress import scorers
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.policies import POLICIES, LayerObservation, foresight
from vllm_kvcompress.policies.foresight import Foresight
from vllm_kvcompress.policies.rotary import Rotary
from vllm_kvcompress.scorers import Scorer

LAYERS, HEADS, SIZE, WIDTH, MOST = 3, 2, 8, 6, 90


@pytest.fixture
def scorer(tmp_path) -> str:
    draw = torch.Generator().manual_seed(0)
    shapes = (2 * SIZE, WIDTH), (WIDTH,), (WIDTH,), ()
    tensors = (torch.randn(LAYERS, HEADS, *shape, generator=draw) / 3 for shape in shapes)
    path = tmp_path / "own.safetensors"
    scorers.write(path, Scorer("tiny", "f", *tensors))
    return str(path)


@pytest.fixture(params=[True, False], ids=["neox", "interleaved"])
def rotary(request) -> Rotary:
    angle = torch.arange(MOST)[:, None] * 50.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
    return Rotary(torch.cat([angle.cos(), angle.sin()], 1), request.param)


def rotated(plain: torch.Tensor, position: int, rotary: Rotary) -> torch.Tensor:
    """One vector `[D]` turned by its position's angles, pair by pair."""
    out, cos_sin = plain.clone(), rotary.cos_sin[position]
    for pair, (left, right) in enumerate(zip(*rotary.pairs(), strict=True)):
        cos, sin = cos_sin[pair], cos_sin[pair + SIZE // 2]
        out[left] = plain[left] * cos - plain[right] * sin
        out[right] = plain[left] * sin + plain[right] * cos
    return out


def meant(path: str, layer: int, head: int, key, value) -> float:
    own = scorers.load(path)
    x = torch.cat([key, value]).double()
    hidden = x @ own.up[layer, head].double() + own.up_bias[layer, head].double()
    hidden = torch.nn.functional.gelu(hidden)
    return math.exp(float(hidden @ own.down[layer, head].double() + own.down_bias[layer, head].double()))


def observation(rotary, positions, dtype=torch.float32, padding=(0, 0), layer=1, first_head=0):
    """Heads that hold tokens at these positions, each behind its padding, and the last three raw."""
    draw = torch.Generator().manual_seed(1)
    width = len(positions[0])
    plain, values = torch.randn(2, len(positions), width, SIZE, generator=draw)
    keys = plain.clone()
    for head, own in enumerate(positions):
        for column, position in enumerate(own):
            keys[head, column] = rotated(plain[head, column], position, rotary)
        keys[head, : padding[head]] = torch.nan
    seen = LayerObservation(
        keys.to(dtype),
        values.to(dtype),
        torch.empty(0, len(positions), 1, 0),
        scale=1.0,
        num_scored=width - 3,
        rotary=rotary,
        layers=(layer,),
        first_head=first_head,
        padding=torch.tensor(padding) if any(padding) else None,
    )
    return seen, plain, values


@pytest.fixture(params=[foresight.AT_ONCE, 7 * HEADS * SIZE], ids=["at once", "in parts"])
def parts(request, monkeypatch):
    monkeypatch.setattr(foresight, "AT_ONCE", request.param)


@pytest.mark.usefixtures("parts")
def test_first_compactions_see_every_position(scorer, rotary):
    seen, plain, values = observation(rotary, [range(20)] * 2)
    found = Foresight(scorer=scorer).score(seen)
    assert found.shape == (2, 17) and found.dtype == torch.float32
    for head in range(2):
        for column in range(17):
            wanted = meant(scorer, 1, head, plain[head, column], values[head, column])
            assert float(found[head, column]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("pooling", [1, 3])
def test_later_ones_see_what_each_head_kept_and_later_ranks_their_own_heads(scorer, rotary, pooling):
    import dataclasses

    positions = [[0, 0, 0, 3, 9, 11, 40, 41, 70, 71, 72], [0, 1, 5, 6, 8, 30, 33, 60, 70, 71, 72]]
    seen, plain, values = observation(rotary, positions[1:], padding=(2,), layer=2, first_head=1)
    seen = dataclasses.replace(seen, kept_positions=lambda: torch.tensor(positions[1:]))
    found = Foresight(scorer=scorer, pooling=pooling).score(seen)
    single = [meant(scorer, 2, 1, plain[0, column], values[0, column]) for column in range(8)]
    for column in range(2, 8):
        around = single[max(2, column - pooling // 2) : column + pooling // 2 + 1]
        assert float(found[0, column]) == pytest.approx(max(around), rel=1e-4)


@pytest.mark.parametrize("tiles", [False, True])
def test_bfloat16_is_near_float32_and_multiplied_as_such_where_a_cpu_has_tiles(
    scorer, rotary, monkeypatch, tiles
):
    multiplied = []
    of_scorer = scorers.Scorer.log_scores

    def log_scores(self, layers, first_head, keys, values):
        multiplied.append((keys.dtype, values.dtype))
        return of_scorer(self, layers, first_head, keys, values)

    monkeypatch.setattr(foresight, "_tiles_bfloat16", lambda: tiles)
    monkeypatch.setattr(scorers.Scorer, "log_scores", log_scores)
    (rough, *_), (fine, *_) = (
        observation(rotary, [range(60)] * 2, kind) for kind in (torch.bfloat16, torch.float32)
    )
    rough, fine = (Foresight(scorer=scorer).score(seen).log() for seen in (rough, fine))
    assert 0 < (rough - fine).abs().max() < 0.1
    own = torch.bfloat16 if tiles else torch.float32
    assert multiplied == [(own, own), (torch.float32, torch.float32)]


def test_the_file_may_go_once_a_process_has_read_it(scorer, rotary, tmp_path):
    config = KVCompressionConfig.parse(f"foresight:scorer={scorer}")
    (tmp_path / "own.safetensors").unlink()
    seen, *_ = observation(rotary, [range(20)] * 2)
    assert config.build_policy().score(seen).isfinite().all()
    assert config.for_request("foresight:budget=0.125").build_policy() == config.build_policy()
    assert config.for_request("snapkv").scorer == scorer


def test_auto_is_foresight_where_there_is_a_scorer(scorer):
    assert isinstance(KVCompressionConfig.parse(f"auto:scorer={scorer}").build_policy(), Foresight)
    without = KVCompressionConfig.parse("auto:budget=0.125")
    assert isinstance(without.build_policy(), POLICIES["kv_compress"])
    assert without.build_allocation() == KVCompressionConfig.parse("foresight").build_allocation()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foresight:pooling=4", "foresight: pooling must be an odd number of tokens, 1 to 255, got 4"),
        ("foresight:scorer=/no/where", "foresight: there is no scorer /no/where: give a file that"),
        ("snapkv:scorer=/no/where", "snapkv: there is no scorer /no/where: give a file that"),
    ],
)
def test_mistakes_are_one_line(text, message):
    with pytest.raises(KVCompressionError) as error:
        KVCompressionConfig.parse(text)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_most_recent_tokens_have_an_eighth_of_what_is_kept_beyond_what_scores_well():
    own = Foresight()
    assert [own.num_recent(kept) for kept in (0, 128, 135, 136, 1024, 10**6)] == [0, 0, 0, 1, 112, 512]
    assert Foresight(recent=0.0).num_recent(4096) == 0
    with pytest.raises(ValueError, match="recent must be between 0 and 1, got -0.1"):
        Foresight(recent=-0.1)
