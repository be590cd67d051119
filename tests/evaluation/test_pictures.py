"""The pictures show the values they are given; that they can be read was looked at by eye."""

import math
import sys

import pytest

from vllm_kvcompress.evaluation import pictures

ABOUT = {"low": 0.4, "high": 0.6, "value": 0.5, "n": 9}
NOTHING = {"low": 0.0, "high": 0.0, "value": 0.0, "n": 9}
PNG = b"\x89PNG"


def row(label: str, kept: float, value: dict | None, kl: dict | None = None) -> dict:
    kl = kl or value
    divergence = {"prose": kl, "repeat": kl and {**kl, "low": math.nan, "high": math.nan}}
    return {"label": label, "kept_fraction": kept, "inside": value, "after": value, "kl": divergence}


def legend(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


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
    (bars,) = inside.containers[0].lines[2]
    assert [end for _, end in bars.get_segments()[0]] == pytest.approx([40, 60])
    assert legend(figure) == ["full cache", "snapkv", "adakv"]
    assert (tmp_path / "q.png").read_bytes().startswith(PNG)


def test_quality_shows_a_method_that_finds_nothing(tmp_path):
    rows = [row("full cache", 1.0, ABOUT), row("knorm", 0.25, NOTHING)]
    figure = pictures.quality_against_memory(rows, tmp_path / "q.png", "title")
    inside, _, prose, _ = figure.axes
    assert list(inside.containers[0].lines[0].get_ydata()) == [0]
    assert not prose.containers  # a logarithmic axis has no place for zero
    assert [text.get_text() for text in prose.texts] == ["no divergence: knorm at 25 %"]


def test_quality_of_what_was_measured_in_part(tmp_path):
    rows = [row("full cache", 1.0, None), row("snapkv", 0.05, None, kl={**ABOUT, "low": -0.1})]
    figure = pictures.quality_against_memory(rows, tmp_path / "q.png", "title")
    inside, _, prose, _ = figure.axes
    assert legend(figure) == ["snapkv"]
    assert [text.get_text() for text in inside.texts] == ["no data"]
    low, high = prose.get_ylim()
    assert 0 < low < 0.5 < 0.6 < high
    assert prose.get_xlim()[0] < 0.05


def test_quality_of_the_full_cache_alone(tmp_path):
    figure = pictures.quality_against_memory([row("full cache", 1.0, ABOUT)], tmp_path / "q.png", "title")
    assert legend(figure) == ["full cache"]


def test_every_line_looks_different(tmp_path):
    labels = [f"method {index}" for index in range(12)]
    rows = [row(label, 0.25, ABOUT) for label in ["full cache", *labels]]
    figure = pictures.quality_against_memory(rows, tmp_path / "q.png", "title")
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 12
    assert len({float(line.get_xdata()[0]) for line in lines}) == 12


def test_needle_maps_have_a_pair_for_each_variant(tmp_path):
    grid = [[1.0, None], [0.25, 0.5]]
    specs = ["off", "stock:fp8", "snapkv:budget=0.25", "snapkv:budget=0.5,window=16,kernel_size=7"]
    cells = {spec: {"inside": grid, "after": grid} for spec in specs}
    figure = pictures.needle_heatmaps(cells, [1024, 2048], [0.1, 0.9], tmp_path / "n.png", "title")
    maps = [axis for axis in figure.axes if axis.get_title(loc="left")]
    assert [axis.get_title(loc="left") for axis in maps] == [
        "full cache\ninside",
        "after",
        "stock, fp8 cache\ninside",
        "after",
        "snapkv, budget 0.25\ninside",
        "after",
        "snapkv, window=16, kernel_size=7, budget 0.5\ninside",
        "after",
    ]
    assert [text.get_text() for text in maps[2].texts] == ["100", "25", "50"]  # and nothing where None is
    assert [label.get_text() for label in maps[0].get_xticklabels()] == ["1k", "2k"]
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["10 %", "90 %"]
    assert "hatched" in figure.axes[-1].get_ylabel()


def test_needle_maps_of_one_variant_in_which_nothing_was_asked(tmp_path):
    cells = {"off": {"inside": [[0.5]], "after": [[None]]}}
    figure = pictures.needle_heatmaps(cells, [1000], [0.5], tmp_path / "n.png", "title")
    assert [len(axis.texts) for axis in figure.axes[:2]] == [1, 0]
    assert (tmp_path / "n.png").read_bytes().startswith(PNG)


def test_kept_fractions_are_written_into_their_cells(tmp_path):
    figure = pictures.kept_by_head([[0.1, 0.3], [0.5, 0.1]], tmp_path / "k.png", "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["10", "30", "50", "10"]
    assert "least 10 %, mean 25 %, most 50 %" in figure.get_suptitle()


def test_kept_fractions_of_many_heads_are_colours_only(tmp_path):
    kept = [[0.01 * (layer + head) for head in range(32)] for layer in range(24)]
    figure = pictures.kept_by_head(kept, tmp_path / "k.png", "title")
    axis = figure.axes[0]
    assert not axis.texts
    assert axis.images[0].get_array().tolist() == kept


def test_decode_times(tmp_path):
    spread = {"compressed": [(0.7, 0.9), (0.4, 0.6)]}
    ratios = {"compressed": [0.8, 0.5]}
    figure = pictures.decode_time([1024, 4096], ratios, spread, tmp_path / "d.png", "title")
    assert list(figure.axes[0].lines[1].get_ydata()) == [0.8, 0.5]
    shade = figure.axes[0].collections[0].get_paths()[0].vertices
    assert {y for x, y in shade if x == 4096} == {0.4, 0.6}
    assert legend(figure) == ["stock", "compressed"]


def test_decode_time_at_one_context(tmp_path):
    figure = pictures.decode_time([512], {"idle": [1.0]}, {"idle": [(0.9, 1.2)]}, tmp_path / "d.png", "title")
    (segment,) = figure.axes[0].collections[0].get_segments()
    assert [y for _, y in segment] == [0.9, 1.2]


def test_concurrency_has_a_pair_of_bars_for_each_variant(tmp_path):
    rows = [
        {
            "label": "snapkv",
            "requests_ratio": 3.5,
            "throughput_ratio": 1.4,
            "spread": {"requests_ratio": (3.0, 4.0)},
        },
        {"label": "adakv", "requests_ratio": 2.0, "throughput_ratio": None},
    ]
    figure = pictures.concurrency(rows, tmp_path / "c.png", "title")
    axis = figure.axes[0]
    bars = sorted((bar.get_y(), bar.get_width()) for bar in axis.patches)
    assert [width for _, width in bars] == [3.5, 1.4, 2.0]
    assert [text.get_text() for text in axis.texts] == ["3.50", "2.00", "1.40"]
    assert axis.get_xlim()[1] > 4
    assert legend(figure) == ["stock", "requests at once", "output tokens/s"]


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == "matplotlib":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=r"^matplotlib is not .*'vllm-kvcompress\[eval\]'$"):
        pictures.kept_by_head([[0.5]], tmp_path / "k.png", "title")


def test_text_heatmap():
    assert pictures.text_heatmap([[0.1, 0.3], [0.5, 1.0]]).splitlines() == [
        "  layer    h0   h1",
        "      0    10   30",
        "      1    50  100",
    ]


def test_rates_have_a_line_for_each_server(tmp_path):
    shown = dict(p99_ttft_ms=2000.0, p99_itl_ms=50.0, preemptions=1.0, n=4)
    rows = [
        {"rate": rate, "variant": variant, "output_throughput": 10 * rate, "compacted": compacted, **shown}
        | {"mode": mode, "right": right}
        for mode, right, compacted in (("inside", 3, 2), ("after", 1, 4))
        for rate in (0.5, 1.0)
        for variant in ("stock", "pressure")
    ]
    figure = pictures.rates({"rows": rows}, tmp_path / "r.png", "title")
    panels = {axis.get_title(): [list(line.get_ydata()) for line in axis.lines] for axis in figure.axes}
    assert panels["output tokens/s"] == [[5.0, 10.0]] * 2
    assert panels["time to first token, 99th percentile (s)"] == [[2.0, 2.0]] * 2
    assert panels["requests compacted"] == [[0.5, 0.5]] * 2
    assert panels["pass keys found, question inside"] == [[0.75, 0.75]] * 2
    assert panels["pass keys found, question after"] == [[0.25, 0.25]] * 2
    assert legend(figure) == ["stock", "pressure"]


def test_blocks_over_time_show_the_pool_and_what_stock_would_hold(tmp_path):
    run = {"prompt": 64, "held": [(64, 2), (96, 3), (128, 2)]}
    blocks = {"pool_blocks": 3, "block_size": 32, "output": run, "prompt": {**run, "prompt": 120}}
    figure = pictures.blocks_over_time(blocks, tmp_path / "b.png", "title")
    for axis in figure.axes:
        stock, pool, held = axis.lines
        assert list(stock.get_ydata()) == [0, 4] and set(pool.get_ydata()) == {3}
        assert list(held.get_ydata()) == [2, 3, 2]
    assert [axis.get_title() for axis in figure.axes] == [
        "64 tokens of prompt, 64 of output",
        "120 tokens of prompt, 8 of output",
    ]
    assert (tmp_path / "b.png").read_bytes().startswith(PNG)
