"""Pictures of what was measured, each readable without its table."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_kvcompress.evaluation.datafiles import require

EXTRA = "eval"
# Okabe and Ito's colours, told apart by colour-blind readers too, and a marker for each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
MODES = {"inside": "question inside the compressed prompt", "after": "question asked after compression"}
KINDS = {"prose": "the prose goes on", "repeat": "a passage is repeated"}


def quality_against_memory(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> Any:
    """Right answers, and KL divergence to the full cache, against kept bytes; a line for each method.

    Args:
        rows: of `report.summarise`; the first is the full cache.
        path: PNG to write.
        title: of the picture.
    """
    figure = _figure(12, 8.5)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    full, others = rows[0], rows[1:]
    labels = list(dict.fromkeys(row["label"] for row in others))
    for axis, (mode, caption) in zip(axes[0], MODES.items(), strict=True):
        axis.set_title(caption, fontsize=11)
        if full[mode]:
            axis.axhline(100 * full[mode]["value"], color="grey", linestyle="--", label="full cache")
        _lines(axis, others, labels, lambda row, mode=mode: row[mode], 100)
        axis.set_ylim(-3, 105)
    for axis, (kind, caption) in zip(axes[1], KINDS.items(), strict=True):
        axis.set_title(caption, fontsize=11)
        _lines(axis, others, labels, lambda row, kind=kind: row["kl"][kind], 1)
        axis.set_yscale("log")
        axis.set_xlabel("KV bytes kept, of the full cache's")
    axes[0][0].set_ylabel("right answers, %")
    axes[1][0].set_ylabel("KL divergence to the full cache, nats/token")
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axis.grid(alpha=0.3)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=10)
    return _save(figure, path, title)


def _lines(axis, rows, labels: Sequence[str], value, scale: float) -> None:
    for index, label in enumerate(labels):
        points = [(row["kept_fraction"], value(row)) for row in rows if row["label"] == label]
        points = sorted((x, y) for x, y in points if x and y and y["value"] > 0)
        if not points:
            continue
        shift = 1 + 0.012 * (index - len(labels) / 2)  # so that intervals do not hide one another
        xs = [x * shift for x, _ in points]
        ys = [scale * y["value"] for _, y in points]
        # A logarithmic axis has no room for an interval that reaches zero.
        lows = [scale * max(y["low"], y["value"] / 10) if scale == 1 else scale * y["low"] for _, y in points]
        below = [0.0 if math.isnan(low) else max(0.0, y - low) for y, low in zip(ys, lows, strict=True)]
        highs = [scale * y["high"] for _, y in points]
        above = [0.0 if math.isnan(high) else max(0.0, high - y) for y, high in zip(ys, highs, strict=True)]
        axis.errorbar(
            xs,
            ys,
            yerr=[below, above],
            label=label,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=6,
            linewidth=1.6,
            elinewidth=0.8,
            capsize=2,
        )


def needle_heatmaps(
    cells: Mapping[str, Mapping[str, Sequence[Sequence[float | None]]]],
    lengths: Sequence[int],
    depths: Sequence[float],
    path: Path,
    title: str,
) -> Any:
    """Share of facts found by depth and document length, a pair of maps for each variant.

    Args:
        cells: variant, mode, then `[depth][length]`; None where nothing was asked.
        lengths: in tokens.
        depths: 0 (start) to 1 (end).
        path: PNG to write.
        title: of the picture.
    """
    per_row = min(3, len(cells))
    rows = math.ceil(len(cells) / per_row)
    figure = _figure(5.2 * per_row, 2.3 * rows + 1.2)
    axes = figure.subplots(rows, 2 * per_row, squeeze=False)
    image = None
    for axis in axes.flat[2 * len(cells) :]:
        axis.set_visible(False)
    for index, (variant, both) in enumerate(cells.items()):
        for offset, mode in enumerate(MODES):
            axis = axes.flat[2 * index + offset]
            image = _map(axis, both[mode], 0, 1)
            method, _, budget = variant.rpartition("budget=")
            name = f"{method[:-1]}\nbudget {budget}, " if method else "full cache\n"
            axis.set_title(name + mode, fontsize=8)
            axis.set_xticks(range(len(lengths)), [_thousands(n) for n in lengths], fontsize=8)
            shown = [f"{100 * depth:.0f} %" for depth in depths] if offset == 0 else [""] * len(depths)
            axis.set_yticks(range(len(depths)), shown, fontsize=8)
            if offset == 0:
                axis.set_ylabel("depth", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.6, label="facts found", format=lambda v, _: f"{100 * v:.0f} %")
    return _save(figure, path, title)


def kept_by_head(kept: Sequence[Sequence[float]], path: Path, title: str) -> Any:
    """Fraction of the tokens kept, layers down, heads across."""
    layers, heads = len(kept), len(kept[0])
    figure = _figure(max(5.0, 0.6 * heads + 3), max(4.0, 0.28 * layers + 1.8))
    axis = figure.subplots()
    values = [value for row in kept for value in row]
    image = _map(axis, kept, 0, max(values), text=len(values) <= 400)
    axis.set_xlabel("KV head")
    axis.set_ylabel("layer")
    axis.set_xticks(range(heads))
    axis.set_yticks(range(0, layers, max(1, layers // 15)))
    figure.colorbar(image, ax=axis, label="tokens kept", format=lambda v, _: f"{100 * v:.0f} %")
    mean = sum(values) / len(values)
    note = f"least {100 * min(values):.0f} %, mean {100 * mean:.0f} %, most {100 * max(values):.0f} %"
    return _save(figure, path, f"{title}\n{note}")


def decode_time(
    contexts: Sequence[int],
    ratios: Mapping[str, Sequence[float]],
    spread: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    title: str,
) -> Any:
    """Decode step time over stock's against context length, with the lowest and highest round shaded."""
    figure = _figure(8, 5)
    axis = figure.subplots()
    axis.axhline(1, color="grey", linestyle="--", label="stock")
    for index, (label, values) in enumerate(ratios.items()):
        colour, marker = COLOURS[index], MARKERS[index]
        axis.plot(contexts, values, color=colour, marker=marker, label=label)
        lows, highs = zip(*spread[label], strict=True)
        axis.fill_between(contexts, lows, highs, color=colour, alpha=0.2, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [_thousands(n) for n in contexts])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("context, tokens")
    axis.set_ylabel("decode step time over stock's")
    axis.grid(alpha=0.3)
    axis.legend()
    return _save(figure, path, title)


def text_heatmap(kept: Sequence[Sequence[float]]) -> str:
    """`kept_by_head` for a terminal: percent of the tokens kept, a line per layer, a column per head."""
    width = max(2, len(str(len(kept) - 1)))
    lines = [f"{'layer':>{width + 5}}  " + " ".join(f"{f'h{h}':>4}" for h in range(len(kept[0])))]
    lines += [
        f"{layer:>{width + 5}}  " + " ".join(f"{100 * value:4.0f}" for value in row)
        for layer, row in enumerate(kept)
    ]
    return "\n".join(lines)


def _figure(width: float, height: float) -> Any:
    figure = require("matplotlib.figure", EXTRA)
    return figure.Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path, title: str) -> Any:
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)
    return figure


def _map(axis: Any, values: Sequence[Sequence[float | None]], low: float, high: float, text=True) -> Any:
    data = [[math.nan if value is None else value for value in row] for row in values]
    axis.set_facecolor("#dddddd")  # where there is nothing
    image = axis.imshow(data, vmin=low, vmax=high, cmap="viridis", aspect="auto")
    for y, row in enumerate(data):
        for x, value in enumerate(row):
            if text and not math.isnan(value):
                colour = "white" if value < low + 0.6 * (high - low) else "black"
                axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    return image


def _thousands(tokens: int) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 512 == 0 else str(tokens)
