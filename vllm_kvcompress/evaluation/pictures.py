"""Pictures of what was measured, each readable without its table."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_kvcompress.evaluation.host import require

EXTRA = "eval"
# Colours that colour-blind readers tell apart too: Okabe and Ito's, with three of Tol's for their yellow. The
# number of markers has no common divisor with theirs, so that a pair comes again only after 110 lines.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"),
    *("#56B4E9", "#000000", "#882255", "#999933", "#332288"),
)
MARKERS = "osD^vX*<>hP"
MODES = {"inside": "question inside the compressed prompt", "after": "question asked after compression"}
KINDS = {"prose": "the prose goes on", "repeat": "a passage is repeated"}
SERVED = {"requests_ratio": "requests at once", "throughput_ratio": "output tokens/s"}


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
    for axis, (mode, caption) in zip(axes[0], MODES.items(), strict=True):
        axis.set_title(caption, fontsize=11)
        if full[mode]:
            axis.axhline(100 * full[mode]["value"], color="grey", linestyle="--", label="full cache")
        _lines(axis, others, lambda row, mode=mode: row[mode], 100)
        axis.set_ylim(-3, 105)
    for axis, (kind, caption) in zip(axes[1], KINDS.items(), strict=True):
        axis.set_title(caption, fontsize=11)
        axis.set_yscale("log")
        _lines(axis, others, lambda row, kind=kind: row["kl"][kind], 1)
        axis.set_xlabel("KV bytes kept, of the full cache's")
    axes[0][0].set_ylabel("right answers, %")
    axes[1][0].set_ylabel("KL divergence to the full cache, nats/token")
    _bound_divergence(axes[1], [row["kl"][kind] for row in others for kind in KINDS])
    kept = [row["kept_fraction"] for row in others if row["kept_fraction"]]
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_xticks([2.0**-n for n in range(8)])
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axis.minorticks_off()
        axis.set_xlim(min([0.115, *(0.9 * x for x in kept)]), max([1.1, *(1.1 * x for x in kept)]))
        axis.grid(alpha=0.3)
        if not axis.lines and not axis.texts:
            axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", color="grey")
    _legend_below(figure, axes.flat, ["full cache", *_labels(others)])
    return _save(figure, path, title)


def _labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["label"] for row in rows))


def _lines(
    axis: Any,
    rows: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], Mapping[str, float] | None],
    scale: float,
) -> None:
    labels = _labels(rows)
    logarithmic = axis.get_yscale() == "log"
    absent = []
    for index, label in enumerate(labels):
        points = [(row["kept_fraction"], value(row)) for row in rows if row["label"] == label]
        points = sorted(((x, y) for x, y in points if x and y), key=lambda point: point[0])
        if logarithmic:  # it has no place for zero
            absent += [f"{label} at {100 * x:.0f} %" for x, y in points if y["value"] <= 0]
            points = [(x, y) for x, y in points if y["value"] > 0]
        if not points:
            continue
        shift = 1 + 0.012 * (index - (len(labels) - 1) / 2)  # so that intervals do not hide one another
        ys = [scale * y["value"] for _, y in points]
        below = [_arm(middle, scale * y["low"]) for middle, (_, y) in zip(ys, points, strict=True)]
        above = [_arm(middle, scale * y["high"]) for middle, (_, y) in zip(ys, points, strict=True)]
        axis.errorbar(
            [x * shift for x, _ in points],
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
    if absent:
        note = textwrap.fill("no divergence: " + "; ".join(absent), 70)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        axis.text(0.01, 0.02, note, transform=axis.transAxes, fontsize=8, va="bottom", bbox=box, zorder=5)


def _arm(middle: float, end: float) -> float:
    return 0.0 if math.isnan(end) else abs(end - middle)


def _bound_divergence(axes: Sequence[Any], values: Sequence[Mapping[str, float] | None]) -> None:
    """Around what was measured; an interval that reaches zero runs out of the picture below."""
    ends = [
        end
        for value in values
        if value
        for end in (value["low"], value["value"], value["high"])
        if end > 0  # nor is NaN
    ]
    for axis in axes:
        if ends:
            axis.set_ylim(min(ends) / 1.6, max(ends) * 1.6)
        else:
            axis.set_yticks([])


def _legend_below(figure: Any, axes: Any, order: Sequence[str]) -> None:
    """One legend of all the axes: a method may have been measured in some of them only."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = [label for label in order if label in handles]
    if names:
        columns = max(1, min(5, 150 // (8 + max(map(len, names)))))
        shown = [handles[name] for name in names]
        figure.legend(shown, names, loc="outside lower center", ncols=columns, fontsize=10)


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
    pair = 2 * max(1.8, 0.4 * len(lengths)) + 0.6
    per_row = max(1, min(3, len(cells), int(15 / pair)))
    rows = math.ceil(len(cells) / per_row)
    names = [textwrap.wrap(_name(variant), int(13 * pair)) for variant in cells]
    height = rows * (max(1.3, 0.21 * len(depths)) + 0.5 + 0.14 * max(map(len, names))) + 0.8
    figure = _figure(max(6.0, pair * per_row + 1), height)
    axes = figure.subplots(rows, 2 * per_row, squeeze=False)
    image = None
    for axis in axes.flat[2 * len(cells) :]:
        axis.set_visible(False)
    for index, (name, both) in enumerate(zip(names, cells.values(), strict=True)):
        for offset, mode in enumerate(MODES):
            axis = axes.flat[2 * index + offset]
            image = _map(axis, both[mode], 0, 1)
            # The variant's name runs over both maps of its pair.
            axis.set_title("\n".join([*name, mode]) if offset == 0 else mode, fontsize=8, loc="left")
            axis.set_xticks(range(len(lengths)), [_thousands(n) for n in lengths], fontsize=7)
            shown = [f"{100 * depth:.0f} %" for depth in depths] if offset == 0 else [""] * len(depths)
            axis.set_yticks(range(len(depths)), shown, fontsize=7)
            if offset == 0:
                axis.set_ylabel("depth", fontsize=8)
            if index // per_row == rows - 1:
                axis.set_xlabel("tokens", fontsize=8)
    grids = [grid for both in cells.values() for grid in both.values()]
    gaps = any(cell is None for grid in grids for row in grid for cell in row)
    figure.colorbar(
        image,
        ax=axes,
        shrink=min(1, 4 / height),
        aspect=min(4, height) / 0.16,
        label="facts found" + (" (hatched: not asked)" if gaps else ""),
        format=_percent,
    )
    return _save(figure, path, title)


def _name(variant: str) -> str:
    """A variant as a caption: its method, options of which the budget is last."""
    if variant == "off":
        return "full cache"
    if variant.startswith("stock:"):
        return f"stock, {variant.removeprefix('stock:')} cache"
    method, _, options = variant.partition(":")
    parts = sorted(filter(None, options.split(",")), key=lambda option: option.startswith("budget="))
    return ", ".join([method, *(part.replace("budget=", "budget ") for part in parts)])


def kept_by_head(kept: Sequence[Sequence[float]], path: Path, title: str) -> Any:
    """Fraction of the tokens kept, layers down, heads across."""
    values = [value for row in kept for value in row]
    figure = _by_head(kept, max(values) or 1, "tokens kept")
    mean = sum(values) / len(values)
    note = f"least {100 * min(values):.0f} %, mean {100 * mean:.0f} %, most {100 * max(values):.0f} %"
    return _save(figure, path, f"{title}\n{note}")


def unexplained_by_head(shares: Sequence[Sequence[float]], path: Path, title: str) -> Any:
    """Share of a variance that is not explained, layers down, heads across."""
    return _save(_by_head(shares, 1, "variance that is not explained"), path, title)


def _by_head(values: Sequence[Sequence[float]], high: float, label: str) -> Any:
    layers, heads = len(values), len(values[0])
    figure = _figure(min(12.0, max(5.6, 0.6 * heads + 3)), max(4.0, 0.28 * layers + 1.8))
    axis = figure.subplots()
    image = _map(axis, values, 0, high, text=layers * heads <= 400 and heads <= 20)
    axis.set_xlabel("KV head")
    axis.set_ylabel("layer")
    axis.set_xticks(range(0, heads, math.ceil(heads / 32)))
    axis.set_yticks(range(0, layers, max(1, layers // 15)))
    figure.colorbar(image, ax=axis, label=label, aspect=30, format=_percent)
    return figure


def head_sensitivity(
    costs: Sequence[Sequence[Sequence[float]]], fractions: Sequence[float], path: Path, title: str
) -> Any:
    """What it costs that one head keeps few tokens: a map for each kept fraction, on one logarithmic scale.

    Args:
        costs: `[fraction][layer][head]`, KL divergence in nats per token.
        fractions: of the tokens that the one head keeps.
        path: PNG to write.
        title: of the picture.
    """
    layers, heads = len(costs[0]), len(costs[0][0])
    positive = [value for grid in costs for row in grid for value in row if value > 0] or [1.0]
    # Below a millionth of the worst there is only rounding.
    high = math.log10(max(positive))
    low = max(math.log10(min(positive)), high - 6)
    width = min(5.0, max(1.8, 0.35 * heads))
    figure = _figure(max(5.6, width * len(costs) + 2), max(4.0, 0.2 * layers + 2))
    axes = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
    image = None
    for axis, fraction, grid in zip(axes, fractions, costs, strict=True):
        logarithms = [[math.log10(max(value, 10**low)) for value in row] for row in grid]
        image = _map(axis, logarithms, low, max(high, low + 0.1), text=False)
        axis.set_title(f"it keeps {100 * fraction:g} %", fontsize=11)
        axis.set_xlabel("KV head")
        axis.set_xticks(range(0, heads, math.ceil(heads / 16)))
        axis.set_yticks(range(0, layers, max(1, layers // 15)))
    axes[0].set_ylabel("layer")
    label = "KL divergence to the full cache, nats/token"
    figure.colorbar(image, ax=axes, label=label, aspect=30, format=lambda value, _: f"{10**value:.2g}")
    return _save(figure, path, title)


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
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axis.plot(contexts, values, color=colour, marker=marker, label=label)
        lows, highs = zip(*spread[label], strict=True)
        if len(contexts) == 1:  # a shade would have no width
            axis.vlines(contexts, lows, highs, color=colour, linewidth=1)
        else:
            axis.fill_between(contexts, lows, highs, color=colour, alpha=0.2, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [_thousands(n) for n in contexts])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("context, tokens")
    axis.set_ylabel("decode step time over stock's, less is faster")
    axis.grid(alpha=0.3)
    _legend_below(figure, [axis], ["stock", *ratios])
    return _save(figure, path, title)


def blocks_over_time(blocks: Mapping[str, Any], path: Path, title: str) -> Any:
    """Blocks that a long output and a prompt larger than the pool hold, against tokens computed.

    Args:
        blocks: of `held.measure_blocks`.
        path: PNG to write.
        title: of the picture.
    """
    figure = _figure(12, 4.5)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name in zip(axes, ("output", "prompt"), strict=True):
        run = blocks[name]
        tokens, held = zip(*run["held"], strict=True)
        axis.set_title(
            f"{run['prompt']} tokens of prompt, {tokens[-1] - run['prompt']} of output", fontsize=11
        )
        whole = [0, -(-tokens[-1] // blocks["block_size"])]
        axis.plot([0, tokens[-1]], whole, color="grey", linestyle="--", label="stock would hold")
        axis.axhline(blocks["pool_blocks"], color=COLOURS[1], label="the whole pool")
        axis.plot(tokens, held, color=COLOURS[0], label="compressed holds")
        axis.set_xlabel("tokens computed")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("blocks held")
    _legend_below(figure, axes, ["stock would hold", "the whole pool", "compressed holds"])
    return _save(figure, path, title)


def concurrency(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> Any:
    """Requests at once and output tokens per second over stock's, a pair of bars for each variant.

    Args:
        rows: each with `label`, `requests_ratio` and `throughput_ratio` (either may be None), and where
            known `spread`: of each of the two names, the lowest and highest round.
        path: PNG to write.
        title: of the picture.
    """
    figure = _figure(9, 0.75 * len(rows) + 1.8)
    axis = figure.subplots()
    axis.axvline(1, color="grey", linestyle="--", label="stock")
    for index, (name, caption) in enumerate(SERVED.items()):
        shown = [(place, row) for place, row in enumerate(rows) if row[name] is not None]
        places = [place + 0.36 * (index - 0.5) for place, _ in shown]
        values = [row[name] for _, row in shown]
        ends = [row.get("spread", {}).get(name, (row[name], row[name])) for _, row in shown]
        axis.barh(places, values, height=0.34, color=COLOURS[index], alpha=0.85, label=caption)
        for place, value, (low, high) in zip(places, values, ends, strict=True):
            if high > low:
                arms = [[value - low], [high - value]]
                axis.errorbar([value], [place], xerr=arms, color="black", linewidth=1, capsize=3)
            axis.annotate(
                f"{value:.2f}", (high, place), (5, 0), textcoords="offset points", va="center", fontsize=9
            )
    axis.set_yticks(range(len(rows)), [textwrap.fill(row["label"].replace(",", ", "), 30) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.margins(x=0.1)
    axis.set_xlim(left=0)
    axis.set_xlabel("over stock's, more is better")
    axis.grid(alpha=0.3, axis="x")
    axis.set_axisbelow(True)
    _legend_below(figure, [axis], ["stock", *SERVED.values()])
    return _save(figure, path, title)


def rates(result: Mapping[str, Any], path: Path, title: str) -> Any:
    """Throughput, waiting and answers against the rate of requests, a line for each server.

    Args:
        result: what `evaluation.speed.rates` measured.
        path: PNG to write.
        title: of the picture.
    """
    panels = {
        "output tokens/s": lambda row: row["output_throughput"],
        "time to first token, 99th percentile (s)": lambda row: row["p99_ttft_ms"] / 1000,
        "inter-token latency, 99th percentile (ms)": lambda row: row["p99_itl_ms"],
        "requests compacted": lambda row: row["compacted"] / row["n"],
        "preemptions": lambda row: row["preemptions"],
    }
    first, *others = dict.fromkeys(row["mode"] for row in result["rows"])
    drawn = [(caption, first, value) for caption, value in panels.items()]
    for mode in (first, *others):
        drawn.append((f"pass keys found, question {mode}", mode, lambda row: row["right"] / row["n"]))
    figure = _figure(12, 7)
    columns = -(-len(drawn) // 2)
    axes = figure.subplots(2, columns).flatten()
    for unused in axes[len(drawn) :]:
        unused.set_axis_off()
    variants = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    for axis, (caption, mode, value) in zip(axes, drawn, strict=False):
        for index, variant in enumerate(variants):
            rows = [row for row in result["rows"] if (row["variant"], row["mode"]) == (variant, mode)]
            axis.plot(
                [row["rate"] for row in rows],
                [value(row) for row in rows],
                label=variant,
                color=COLOURS[index],
                marker=MARKERS[index],
            )
        every = sorted({row["rate"] for row in result["rows"]})
        axis.set_xscale("log")
        axis.set_xticks(every, [f"{rate:g}" for rate in every])
        axis.minorticks_off()
        axis.set_xlabel("requests/s")
        axis.set_title(caption, fontsize=10)
        axis.set_ylim(0, max(1, axis.get_ylim()[1]))
        axis.grid(alpha=0.3)
        if caption == "requests compacted" or caption.startswith("pass keys"):
            axis.set_ylim(0, 1.05)
            axis.yaxis.set_major_formatter(_percent)
    _legend_below(figure, axes, variants)
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
    require("matplotlib", EXTRA)  # by its own name first: the message is about a package, not a module of it
    figure = require("matplotlib.figure", EXTRA)
    return figure.Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path, title: str) -> Any:
    columns = int(10 * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.fill(line, columns) for line in title.split("\n")), fontsize=12)
    figure.savefig(path, dpi=110)
    return figure


def _map(axis: Any, values: Sequence[Sequence[float | None]], low: float, high: float, text=True) -> Any:
    data = [[math.nan if value is None else value for value in row] for row in values]
    axis.patch.set(facecolor="#dddddd", edgecolor="#999999", hatch="////")  # where there is nothing
    image = axis.imshow(data, vmin=low, vmax=high, cmap="viridis", aspect="auto")
    for y, row in enumerate(data):
        for x, value in enumerate(row):
            if text and not math.isnan(value):
                colour = "white" if value < low + 0.45 * (high - low) else "black"
                axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    return image


def _percent(value: float, _: Any) -> str:
    return f"{100 * value:.0f} %"


def _thousands(tokens: int) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 512 == 0 else str(tokens)
