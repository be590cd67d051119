"""Files of learned scorers: what is written is read, and what is not one is refused in one line."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from vllm_kvcompress import scorers
from vllm_kvcompress.scorers import Scorer

LAYERS, HEADS, SIZE, WIDTH = 2, 3, 4, 5


def made(seed: int = 0, **changes) -> Scorer:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"up": (2 * SIZE, WIDTH), "up_bias": (WIDTH,), "down": (WIDTH,), "down_bias": ()}
    # (Of few bits, so that float16 holds them.)
    tensors = {
        name: torch.randint(-8, 8, (LAYERS, HEADS, *shape), generator=draw) / 8
        for name, shape in shapes.items()
    }
    return Scorer(**{"model": "tiny", "fingerprint": "f", "record": {"epochs": 3}, **tensors, **changes})


def answer(scorer: Scorer, layer: int, head: int, key, value) -> float:
    """The network of one head and one token, by its definition."""
    x = torch.cat([key, value]).double()
    hidden = torch.nn.functional.gelu(
        x @ scorer.up[layer, head].double() + scorer.up_bias[layer, head].double()
    )
    return float(hidden @ scorer.down[layer, head].double() + scorer.down_bias[layer, head].double())


@pytest.mark.parametrize("first_head", [0, 1])
def test_each_head_has_its_own_network(first_head):
    scorer = made()
    keys, values = torch.randn(2, 2, 7, SIZE)
    for layer in range(LAYERS):
        found = scorer.log_scores((layer,), first_head, keys, values)
        assert found.shape == (2, 7) and found.dtype == torch.float32
        for head in range(2):
            for token in range(7):
                wanted = answer(scorer, layer, first_head + head, keys[head, token], values[head, token])
                assert float(found[head, token]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("layers", [(1, 2), (0, 2)])  # consecutive ones, and others
def test_layers_together_answer_as_each_alone(layers):
    draw = torch.Generator().manual_seed(3)
    shapes = (2 * SIZE, WIDTH), (WIDTH,), (WIDTH,), ()
    scorer = Scorer("", "", *(torch.randn(3, HEADS, *shape, generator=draw) for shape in shapes))
    keys, values = torch.randn(2, 4, 7, SIZE, generator=draw)
    found = scorer.log_scores(layers, 1, keys, values).split(2)
    for layer, own, *given in zip(layers, found, keys.split(2), values.split(2), strict=True):
        torch.testing.assert_close(own, scorer.log_scores((layer,), 1, *given))


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "own.safetensors"
    scorers.write(path, made())
    read = scorers.load(str(path))
    for name in scorers.TENSORS:
        assert torch.equal(getattr(read, name).float(), getattr(made(), name))
    assert (read.model, read.fingerprint, read.record) == ("tiny", "f", {"epochs": 3})
    assert read.shape == (LAYERS, HEADS, SIZE)
    assert path.stat().st_mode & 0o777 == 0o644 and list(tmp_path.iterdir()) == [path]
    scorers.write(path, made(1))
    assert torch.equal(scorers.load(str(path)).up.float(), made(1).up), "a new state of the file is read"


def refused(path) -> str:
    with pytest.raises(ValueError) as error:
        scorers.load(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_what_is_no_scorer_is_refused_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "own.safetensors"
    assert "there is no scorer" in refused(path)
    path.write_text("nothing")
    assert "is not a scorer" in refused(path)
    save_file({"up": torch.ones(2)}, path)
    assert "is not a scorer" in refused(path)
    save_file({"up": torch.ones(2)}, path, {"kvcompress_scorer": "[]"})
    assert "is not a scorer" in refused(path)
    content = {"version": scorers.VERSION + 1, "model": "", "fingerprint": "", "record": {}}
    save_file({"up": torch.ones(2)}, path, {"kvcompress_scorer": json.dumps(content)})
    assert "train it again" in refused(path)
    scorers.write(path, made())
    path.write_bytes(path.read_bytes()[:-8])
    assert "is not a scorer" in refused(path)
    scorers.write(path, made())
    monkeypatch.setattr(scorers, "MOST_BYTES", 100)
    assert "is not a scorer" in refused(path)


@pytest.mark.parametrize(
    "change",
    [
        {"up": torch.ones(LAYERS, HEADS, 2 * SIZE + 1, WIDTH)},
        {"up": torch.full((LAYERS, HEADS, 2 * SIZE, WIDTH), torch.nan)},
        {"up": torch.ones(HEADS, 2 * SIZE, WIDTH)},
        {"down": torch.ones(LAYERS, HEADS, WIDTH + 1)},
        {"down_bias": torch.ones(LAYERS, HEADS + 1)},
        {"up_bias": torch.full((LAYERS, HEADS, WIDTH), torch.inf)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change):
    path = tmp_path / "own.safetensors"
    scorers.write(path, made(**change))
    assert "damaged" in refused(path)


CONFIG = dict(model_type="llama", hidden_size=64, num_hidden_layers=2, num_key_value_heads=3, vocab_size=99)


def test_a_fingerprint_is_of_what_keys_and_values_depend_on():
    own = scorers.fingerprint(SimpleNamespace(**CONFIG, torch_dtype="bfloat16"))
    assert own == scorers.fingerprint(SimpleNamespace(**CONFIG, torch_dtype="float32"))
    for name, other in (("model_type", "qwen2"), ("vocab_size", 100), ("head_dim", 16)):
        assert own != scorers.fingerprint(SimpleNamespace(**(CONFIG | {name: other})))
    turned = CONFIG | {"rope_parameters": {"rope_theta": 1e6}}
    assert own != scorers.fingerprint(SimpleNamespace(**turned))
    filled = {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}  # as a model fills it in
    assert scorers.fingerprint(SimpleNamespace(**turned)) == scorers.fingerprint(
        SimpleNamespace(**(CONFIG | filled))
    )
    scorer = made(fingerprint=own)
    assert scorer.serves(SimpleNamespace(**CONFIG)) and not made().serves(SimpleNamespace(**CONFIG))


def test_a_scorer_is_found_beside_the_checkpoint_then_in_the_cache_then_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(scorers, "FOLDER", tmp_path / "package")
    model = tmp_path / "Tiny-1B"
    places = [
        tmp_path / "package" / "tiny-1b.safetensors",
        tmp_path / "cache" / "vllm-kvcompress" / "scorers" / "tiny-1b.safetensors",
        model / scorers.BESIDE,
    ]
    assert scorers.find(str(model)) is None
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        scorers.write(place, made())
        assert scorers.find(str(model)) == str(place)
    assert scorers.find("someone/Tiny-1B") == str(places[1])
    assert scorers.included() == ["tiny-1b"]
    assert scorers.load("tiny-1b").model == "tiny"
