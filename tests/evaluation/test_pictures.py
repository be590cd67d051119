"""The pictures show the values they are given; that they can be read was looked at by eye."""

import math

import pytest

from vllm_kvcompress.evaluation import pictures

ABOUT = {"low": 0.4, "high": 0.6, "value": 0.5, "n": 9}
NOTHING = {"low": 0.0, "high": 0.0, "value": 0.0, "n": 9}


def row(label: str, kept: float, value: dict) -> dict:
    kl = {"prose": value, "repeat": {**value, "low": math.nan, "high": math.nan}}
    return {"label": label, "kept_fraction": kept, "inside": value, "after": value, "kl": kl}


def test_quality_lies_where_it_was_measured(tmp_path):
    rows = [row("full cache", 1.0, {**ABOUT, "value": 0.9}), row("snapkv", 0.5, ABOUT)]
    rows += [row("snapkv", 0.25, {**ABOUT, "value": 0.45}), row("adakv", 0.25, NOTHING)]
    figure = pictures.quality_against_memory(rows, tmp_path / "q.png", "title")
    inside, _, prose, _ = figure.axes
    full, snapkv = inside.lines[0], inside.containers[0].lines[0]
    assert set(full.get_ydata()) == {90}
    assert list(snapkv.get_ydata()) == [45, 50]
    assert snapkv.get_xdata() == pytest.approx([0.25, 0.5], rel=0.05)
    assert list(prose.containers[0].lines[0].get_ydata()) == [0.45, 0.5]
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")


def test_needle_maps_have_a_pair_for_each_variant(tmp_path):
    grid = [[1.0, None], [0.25, 0.5]]
    cells = {"off": {"inside": grid, "after": grid}, "snapkv:budget=0.25": {"inside": grid, "after": grid}}
    figure = pictures.needle_heatmaps(cells, [1024, 2048], [0.1, 0.9], tmp_path / "n.png", "title")
    maps = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in maps] == [
        "full cache\ninside",
        "full cache\nafter",
        "snapkv\nbudget 0.25, inside",
        "snapkv\nbudget 0.25, after",
    ]
    assert [text.get_text() for text in maps[2].texts] == ["100", "25", "50"]  # and nothing where None is


def test_kept_fractions_are_written_into_their_cells(tmp_path):
    figure = pictures.kept_by_head([[0.1, 0.3], [0.5, 0.1]], tmp_path / "k.png", "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["10", "30", "50", "10"]
    assert "least 10 %, mean 25 %, most 50 %" in figure.get_suptitle()


def test_decode_times(tmp_path):
    spread = {"compressed": [(0.7, 0.9), (0.4, 0.6)]}
    ratios = {"compressed": [0.8, 0.5]}
    figure = pictures.decode_time([1024, 4096], ratios, spread, tmp_path / "d.png", "title")
    assert list(figure.axes[0].lines[1].get_ydata()) == [0.8, 0.5]


def test_text_heatmap():
    assert pictures.text_heatmap([[0.1, 0.3], [0.5, 1.0]]).splitlines() == [
        "  layer    h0   h1",
        "      0    10   30",
        "      1    50  100",
    ]
