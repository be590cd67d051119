"""TurboQuant: its codebook is Lloyd-Max's, its error the codebook's, and "prod" is right on average."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from test_base import codes_of, draw

from vllm_kvcompress.formats import FORMATS, turboquant

MSE = {"turbo4": 4, "turbo3": 3, "turbo2": 2}
PROD = {"turbo4_prod": 4, "turbo3_prod": 3, "turbo2_prod": 2}
ALL = MSE | PROD
GROUPS = {48: 16, 64: 32, 80: 16, 128: 32}  # of a value's codes, by head size
PAPER = {1: 0.36, 2: 0.117, 3: 0.034, 4: 0.009}  # error of unit vectors, by bits


def units(count: int, head_size: int, seed: int = 0) -> torch.Tensor:
    """Random unit vectors `[count, 32, D]`."""
    vectors = draw(count, 32, head_size, seed=seed, channels=0.0)
    return vectors / vectors.norm(dim=-1, keepdim=True)


@cache
def law(head_size: int) -> tuple[np.ndarray, np.ndarray]:
    """A grid on (-1, 1) and the weights of a coordinate of a random unit vector there."""
    grid = (np.arange(400_000) + 0.5) / 200_000 - 1
    weights = (1 - grid**2) ** ((head_size - 3) / 2)
    return grid, weights / weights.sum()


def theory(codebook: torch.Tensor, head_size: int) -> float:
    """E‖y - ŷ‖² of a random unit vector."""
    grid, weights = law(head_size)
    levels = codebook.double().numpy()
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)]
    return head_size * float(((grid - nearest) ** 2 * weights).sum())


def split(record: torch.Tensor, name: str, head_size: int) -> dict[str, np.ndarray]:
    """The parts of one record: codes and signs `[32, D]`, norms `[32]`."""
    data, bits, begin = bytes(record.tolist()), ALL[name], 0
    prod = name in PROD

    def take(size: int) -> bytes:
        nonlocal begin
        begin += size
        return data[begin - size : begin]

    def codes(bits: int, group: int) -> np.ndarray:
        return np.array(codes_of(take(4 * bits * head_size), bits, 32 * head_size, group))

    parts = {"key_codes": codes(bits - prod, 32).reshape(head_size, 32).T}
    if prod:
        parts["signs"] = codes(1, 32).reshape(head_size, 32).T * 2 - 1
    parts["value_codes"] = codes(bits, GROUPS[head_size]).reshape(32, head_size)
    for part in ["key_norms", *(["residual_norms"] if prod else []), "value_norms"]:
        parts[part] = np.frombuffer(take(64), "<f2").astype(np.float64)
    assert begin == len(data)
    return parts


def residual_norms(records: torch.Tensor, head_size: int) -> torch.Tensor:
    """Those of "prod" records `[n, record_bytes]`: `[n, 32]` float32."""
    return records[:, -128:-64].contiguous().view(torch.float16).float()


# --------------------------------------------------- matrices and codebooks


@pytest.mark.parametrize("head_size", [16, 48, 64, 80, 128, 256])
def test_the_rotation_is_orthogonal_and_always_the_same(head_size):
    rotation = FORMATS["turbo4"].rotation(head_size)
    assert rotation.shape == (head_size, head_size) and rotation.dtype == torch.float32
    assert rotation.device.type == "cpu"
    eye = torch.eye(head_size, dtype=torch.float64)
    torch.testing.assert_close(rotation.double() @ rotation.double().T, eye, atol=1e-6, rtol=0)
    assert all(torch.equal(FORMATS[name].rotation(head_size), rotation) for name in ALL)
    # No direction is left nearly as it is.
    assert rotation.abs().max() < 6 / math.sqrt(head_size)


def test_matrices_are_the_same_on_every_machine():
    """As recorded: what one process has written, another reads."""
    rotation, projection = FORMATS["turbo4_prod"].rotation(64), FORMATS["turbo4_prod"].projection(64)
    assert rotation[0, :3].tolist() == pytest.approx([0.22390911, 0.03306921, 0.14603769], abs=1e-6)
    assert projection[0, :3].tolist() == pytest.approx([1.7581064, -0.9770029, -1.0645682], abs=1e-5)


@pytest.mark.parametrize("head_size", [16, 64, 80, 128])
def test_the_projection_has_orthogonal_rows_as_long_as_normal_ones(head_size):
    projection = FORMATS["turbo3_prod"].projection(head_size).double()
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, head_size, generator=generator).norm(dim=-1)
    gram = projection @ projection.T
    length = float(gram.diagonal().mean().sqrt())
    assert length == pytest.approx(float(normal.mean()), abs=5 * float(normal.std()) / math.sqrt(len(normal)))
    torch.testing.assert_close(gram, torch.eye(head_size).double() * length**2, atol=1e-4, rtol=0)
    # It has nothing to do with the rotation.
    rotation = FORMATS["turbo3_prod"].rotation(head_size).double()
    for each in rotation, rotation.T:
        assert (projection / length @ each).abs().max() < 0.9


@pytest.mark.parametrize("head_size", [16, 48, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codebooks_meet_the_conditions_of_lloyd_and_max(head_size, bits):
    """Each level is the mean of the numbers that are nearest to it."""
    levels = turboquant.lloyd_max(head_size, bits)
    assert levels.shape == (2**bits,) and levels.dtype == torch.float32
    assert torch.equal(levels, -levels.flip(0)) and (levels.diff() > 0).all()
    grid, weights = law(head_size)
    levels = levels.double().numpy()
    edges = np.concatenate([[-1], (levels[1:] + levels[:-1]) / 2, [1]])
    for level, low, high in zip(levels, edges, edges[1:], strict=False):
        cell = (grid > low) & (grid <= high)
        mean = (grid * weights)[cell].sum() / weights[cell].sum()
        assert level == pytest.approx(mean, abs=5e-6)


@pytest.mark.parametrize(("name", "bits"), ALL.items())
def test_keys_and_values_have_the_codebook_of_their_bits(name, bits):
    format, key_bits = FORMATS[name], bits - (name in PROD)
    assert format.key_bits == key_bits
    assert torch.equal(format.codebook(64), turboquant.lloyd_max(64, bits))
    assert torch.equal(format.key_codebook(64), turboquant.lloyd_max(64, key_bits))


# -------------------------------------------------------------------- error


@pytest.mark.parametrize(("name", "bits"), MSE.items())
@pytest.mark.parametrize("head_size", [64, 128])
def test_the_error_is_that_of_the_codebook(name, bits, head_size):
    keys, values = units(200, head_size), units(200, head_size, seed=1)
    expected = theory(FORMATS[name].codebook(head_size), head_size)
    for read, written in zip(
        FORMATS[name].decode(FORMATS[name].encode(keys, values), head_size), (keys, values), strict=True
    ):
        error = float((read - written).square().sum(-1).mean())
        assert error == pytest.approx(expected, rel=0.02)
        assert error == pytest.approx(PAPER[bits], rel=0.05)
        # Levels are means, so what is lost is the length; it is not restored.
        assert float(read.square().sum(-1).mean()) == pytest.approx(1 - expected, rel=0.003)


@pytest.mark.parametrize(("name", "bits"), PROD.items())
@pytest.mark.parametrize("head_size", [64, 128])
def test_the_error_of_prod_is_that_of_its_two_stages(name, bits, head_size):
    format, keys, values = FORMATS[name], units(200, head_size), units(200, head_size, seed=1)
    records = format.encode(keys, values)
    first = theory(format.key_codebook(head_size), head_size)
    measured = float(residual_norms(records, head_size).square().mean())
    assert measured == pytest.approx(first, rel=0.02)
    assert measured == pytest.approx(PAPER[bits - 1], rel=0.05)

    read_keys, read_values = format.decode(records, head_size)
    length = float(format.projection(head_size)[0].norm())
    second = first * (math.pi / 2 * length**2 / head_size - 1)
    assert float((read_keys - keys).square().sum(-1).mean()) == pytest.approx(second, rel=0.02)
    expected = theory(format.codebook(head_size), head_size)
    assert float((read_values - values).square().sum(-1).mean()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", MSE)
@pytest.mark.parametrize("head_size", [64, 80])
def test_vectors_along_one_channel_lose_no_more_than_others(name, head_size):
    format, vectors = FORMATS[name], 5 * torch.eye(head_size).repeat(2, 1).view(-1, 32, head_size)
    expected = theory(format.codebook(head_size), head_size)
    for read in format.decode(format.encode(vectors, vectors), head_size):
        assert float((read - vectors).square().sum(-1).mean()) / 25 == pytest.approx(expected, rel=0.1)


# ------------------------------------------------------------------ records


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("head_size", GROUPS)
def test_codes_are_of_the_nearest_levels(name, head_size):
    format = FORMATS[name]
    keys, values = draw(32, head_size), draw(32, head_size, seed=1)
    parts = split(format.encode(keys, values), name, head_size)
    rotation = format.rotation(head_size).double().numpy()
    books = format.key_codebook(head_size), format.codebook(head_size)
    for kind, vectors, book in zip(("key", "value"), (keys, values), books, strict=True):
        rows = vectors.double().numpy()
        norms = np.sqrt((rows**2).sum(1))
        np.testing.assert_allclose(parts[f"{kind}_norms"], norms, rtol=2.0**-11)
        rotated = rows / norms[:, None] @ rotation
        distance = np.abs(rotated[..., None] - book.double().numpy())
        chosen = np.take_along_axis(distance, parts[f"{kind}_codes"][..., None], -1)[..., 0]
        assert (chosen <= distance.min(-1) + 1e-6).all()
        if kind == "key" and name in PROD:
            residual = rotated - book.double().numpy()[parts["key_codes"]]
            np.testing.assert_allclose(
                parts["residual_norms"], np.sqrt((residual**2).sum(1)), rtol=2.0**-11 + 1e-5
            )
            projected = residual @ format.projection(head_size).double().numpy().T
            assert ((np.sign(projected) == parts["signs"]) | (np.abs(projected) < 1e-5)).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("head_size", GROUPS)
def test_attention_in_the_rotated_space_is_that_over_decoded_vectors(name, head_size):
    """From a record's parts alone, as kernels compute it: scores of rotated queries, values rotated back."""
    format = FORMATS[name]
    keys, values = draw(32, head_size), draw(32, head_size, seed=1)
    query = draw(5, head_size, seed=2).double().numpy()
    record = format.encode(keys, values)
    parts = split(record, name, head_size)
    read_keys, read_values = (each.double().numpy() for each in format.decode(record, head_size))

    rotation = format.rotation(head_size).double().numpy()
    rotated = query @ rotation
    scores = rotated @ format.key_codebook(head_size).double().numpy()[parts["key_codes"]].T
    if name in PROD:
        projected = rotated @ format.projection(head_size).double().numpy().T
        scale = parts["residual_norms"] * math.sqrt(math.pi / 2) / head_size
        scores = scores + scale * (projected @ parts["signs"].T)
    scores = scores * parts["key_norms"]
    np.testing.assert_allclose(scores, query @ read_keys.T, rtol=1e-4, atol=1e-4 * np.abs(scores).max())

    paid = np.random.RandomState(0).rand(5, 32)
    levels = format.codebook(head_size).double().numpy()[parts["value_codes"]]
    output = paid @ (levels * parts["value_norms"][:, None]) @ rotation.T
    np.testing.assert_allclose(output, paid @ read_values, rtol=1e-4, atol=1e-4 * np.abs(output).max())


@pytest.mark.parametrize("name", MSE)
@pytest.mark.parametrize("head_size", [64, 128])
def test_what_was_read_is_written_with_the_same_codes(name, head_size):
    format, keys = FORMATS[name], units(20, head_size) * 7
    records = format.encode(keys, keys.flip(0))
    read = format.decode(records, head_size)
    again = format.encode(*read)
    codes = format.record_bytes(head_size) - 128
    assert torch.equal(records[:, :codes], again[:, :codes])
    # The second time nothing but the length that the first time lost is missing, twice.
    lengths = read[0].norm(dim=-1) / 7
    for one, two in zip(read[:1], format.decode(again, head_size)[:1], strict=True):
        torch.testing.assert_close(two, one * lengths[..., None], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "head_size", "expected"),
    [
        ("turbo4", 64, 2 * 64 * 32 * 4 // 8 + 2 * 32 * 2),
        ("turbo3", 64, 2 * 64 * 12 + 128),
        ("turbo2", 128, 2 * 1024 + 128),
        ("turbo3", 80, 2 * 960 + 128),
        ("turbo4_prod", 64, 64 * 12 + 64 * 4 + 1024 + 3 * 64),
        ("turbo3_prod", 128, 128 * 8 + 128 * 4 + 128 * 12 + 192),
        ("turbo2_prod", 48, 48 * 4 + 48 * 4 + 48 * 8 + 192),
    ],
)
def test_bytes_are_those_of_codes_and_norms(name, head_size, expected):
    assert FORMATS[name].record_bytes(head_size) == expected
    assert FORMATS[name].tokens_per_page(5 * expected + 1, head_size) == 160


# ----------------------------------------------------------------- products


def slope(queries: torch.Tensor, keys: torch.Tensor, read: torch.Tensor) -> tuple[float, float]:
    """Regression of the read keys' products with queries on the true ones, and its standard error."""
    true, found = ((queries * each).sum(-1).double().flatten() for each in (keys, read))
    estimate = float((true * found).sum() / true.square().sum())
    error = true * (found - estimate * true)
    return estimate, float(error.square().sum().sqrt() / true.square().sum())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("towards", [0.0, 5.0])
def test_products_are_right_on_average_with_prod_and_shrink_with_mse(name, head_size, towards):
    """Random pairs of queries and keys, queries more or less along their keys."""
    format, keys = FORMATS[name], units(400, head_size)
    queries = units(400, head_size, seed=1) + towards * keys
    read, _ = format.decode(format.encode(keys, keys), head_size)
    estimate, error = slope(queries, keys, read)
    assert error < 0.006
    if name in PROD:
        assert abs(estimate - 1) < 4 * error + 0.0015  # the projection is one draw
    else:
        lost = theory(format.key_codebook(head_size), head_size)
        assert abs(estimate - (1 - lost)) < 4 * error + 0.0005
        if ALL[name] < 4:
            assert estimate < 1 - 4 * error


@pytest.mark.parametrize("head_size", [16, 32])
def test_the_mean_over_projections_is_the_residual_itself(head_size):
    """However long the rows are, one fixed residual comes back from its signs."""
    residual = draw(head_size, channels=0.0).double()
    length = FORMATS["turbo2_prod"].projection(head_size)[0].norm().double()
    found = []
    for seed in range(100, 1100):
        matrix = turboquant.orthogonal.__wrapped__(head_size, seed).double() * length
        signs = (matrix @ residual).sign()
        found.append(residual.norm() * math.sqrt(math.pi / 2) / head_size * (signs @ matrix))
    found = torch.stack(found)
    along = found @ residual / residual.square().sum()
    assert float(along.mean()) == pytest.approx(1, abs=4 * float(along.std()) / math.sqrt(len(found)))
    assert 4 * float(along.std()) / math.sqrt(len(found)) < 0.01
    off = (found.mean(0) - residual) / (found.std(0) / math.sqrt(len(found)))
    assert off.abs().max() < 4.5


# -------------------------------------------------------------- odd numbers


@pytest.mark.parametrize("name", ALL)
def test_vectors_without_length_stay_zero(name):
    keys, values = draw(32, 64), draw(32, 64, seed=1)
    keys[3], values[4], keys[5], values[5] = 0, 0, torch.nan, 1e-12
    read = FORMATS[name].decode(FORMATS[name].encode(keys, values), 64)
    assert not read[0][[3, 5]].any() and not read[1][[4, 5]].any()
    for each in read:
        assert (each.norm(dim=-1) > 0).sum() == 30


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [0.01, 1000.0])
def test_lengths_do_not_change_directions(name, size):
    keys, values = draw(3, 32, 64, channels=0.0), draw(3, 32, 64, seed=1, channels=0.0)
    plain = FORMATS[name].decode(FORMATS[name].encode(keys, values), 64)
    scaled = FORMATS[name].decode(FORMATS[name].encode(keys * size, values * size), 64)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other / size, one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MSE)
def test_lengths_beyond_float16_are_cut_off(name):
    keys = torch.full((32, 64), 3e4) * draw(32, 64, channels=0.0).sign()
    values = keys.clone()
    values[0, 0] = torch.inf
    values[1, 1], values[1, 2:] = -torch.inf, 0.0
    values[1, 0] = torch.nan
    read = FORMATS[name].decode(FORMATS[name].encode(keys, values), 64)
    full = FORMATS[name].decode(FORMATS[name].encode(keys / 10, values / 10), 64)
    torch.testing.assert_close(read[0], full[0] * (65504 / 24000), rtol=1e-3, atol=1.0)
    # One number that is infinite is all of the direction, and NaN is none of it.
    expected = torch.zeros(64)
    expected[1] = -65504.0
    cosine = torch.nn.functional.cosine_similarity(read[1][1], expected, dim=0)
    assert cosine > {4: 0.99, 3: 0.97, 2: 0.9}[MSE[name]]


# ------------------------------------------------------------------ centred


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("head_size", [64, 80])
def test_what_all_keys_of_a_record_share_costs_them_nothing(bits, head_size):
    plain, centred = FORMATS[f"turbo{bits}"], FORMATS[f"turbo{bits}_centred"]
    assert centred.record_bytes(head_size) == plain.record_bytes(head_size) + 2 * head_size
    keys, values = draw(50, 32, head_size, channels=0.0), draw(50, 32, head_size, seed=1)
    offset = 40 * draw(head_size, seed=2)
    read, read_values = centred.decode(centred.encode(keys + offset, values), head_size)
    assert torch.equal(read_values, plain.decode(plain.encode(keys, values), head_size)[1])
    spread = (keys - keys.mean(1, keepdim=True)).square().sum(-1).mean()
    error = float((read - keys - offset).square().sum(-1).mean() / spread)
    assert error == pytest.approx(theory(plain.codebook(head_size), head_size), rel=0.05)
    lost = float(
        (plain.decode(plain.encode(keys + offset, values), head_size)[0] - keys - offset)
        .square()
        .sum(-1)
        .mean()
    )
    assert lost / spread > 10 * error


@pytest.mark.parametrize("name", ["turbo4_centred", "turbo2_centred"])
def test_a_centred_record_is_that_of_the_differences_and_their_mean(name):
    format, plain = FORMATS[name], FORMATS[name.removesuffix("_centred")]
    keys, values = draw(32, 64) + 3, draw(32, 64, seed=1)
    record, rotation = format.encode(keys, values), format.rotation(64).double()
    stored = np.frombuffer(bytes(record[-2 * 64 :].tolist()), "<f2")
    mean = (keys.double().mean(0) @ rotation).numpy()
    np.testing.assert_allclose(stored, mean, rtol=2.0**-10, atol=1e-4)
    shared = torch.from_numpy(stored.astype(np.float64)) @ rotation.T
    expected = plain.encode((keys.double() - shared).float(), values)
    different = record[: -2 * 64] != expected
    assert different.sum() <= 3, "all but what lies between two codes"
