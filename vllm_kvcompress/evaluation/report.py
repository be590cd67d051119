"""From single results to the table, its JSON and its pictures."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

UNSOLVED = 0.5  # a task that the full cache solves less often measures nothing
Z = 1.96  # of a 95 % confidence interval
Results = Mapping[tuple[str, ...], Mapping[str, Any]]


class Row(Protocol):
    """A variant of `evaluate`."""

    @property
    def spec(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def budget(self) -> float | None: ...


def share(scores: Sequence[float]) -> dict[str, float] | None:
    """Mean of scores in [0, 1] with Wilson's 95 % interval; None without scores.

    For scores between 0 and 1 the interval is wider than need be, for their variance is below a coin's.
    """
    if not scores:
        return None
    n, p = len(scores), statistics.fmean(scores)
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return {"value": p, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "n": n}


def mean(values: Sequence[float]) -> dict[str, float] | None:
    """Mean of values that are not negative, with its normal 95 % interval, each an independent sample."""
    if not values:
        return None
    value, n = statistics.fmean(values), len(values)
    half = Z * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    low = value - half if math.isnan(half) else max(0.0, value - half)
    return {"value": value, "low": low, "high": value + half, "n": n}


def summarise(settings: Mapping[str, Any], rows: Sequence[Row], results: Results) -> dict[str, Any]:
    """Everything that the table and the pictures show, as plain data with the settings to rerun it."""
    asked: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    diverged: dict[str, list[Mapping[str, Any]]] = {}
    steps: dict[str, float] = {}
    for key, result in results.items():
        if key[0] == "ask":
            asked.setdefault((key[3], key[2]), []).append(result)
        elif key[0] == "kl":
            diverged.setdefault(key[2], []).append(result)
        elif key[0] == "step":
            steps[key[1]] = result["seconds"]

    full = {mode: _by_task(asked.get(("off", mode), [])) for mode in ("inside", "after")}
    solved = {
        mode: [task for task, scores in full[mode].items() if statistics.fmean(scores) >= UNSOLVED]
        for mode in full
    }
    prefill = _prefill_by_length(asked.get(("off", "inside"), []))
    summary: dict[str, Any] = {
        "settings": dict(settings),
        "left_out": {mode: sorted(set(full[mode]) - set(solved[mode])) for mode in full},
        "prefill_seconds": prefill,
        "rows": [],
        "needle": _needle(rows, results),
    }
    for row in rows:
        both = [*asked.get((row.spec, "inside"), []), *asked.get((row.spec, "after"), [])]
        entry: dict[str, Any] = {"variant": row.spec, "label": row.label, "budget": row.budget}
        entry["tasks"] = {
            mode: {task: share(s) for task, s in _by_task(asked.get((row.spec, mode), [])).items()}
            for mode in full
        }
        for mode in full:
            scores = _by_task(asked.get((row.spec, mode), []))
            entry[mode] = share([s for task in solved[mode] for s in scores.get(task, [])])
        of_row = diverged.get(row.spec, [])
        entry["kl"] = {kind: mean(_per_text(of_row, kind, "kl")) for kind in KINDS}
        entry["nll"] = {kind: mean(_per_text(of_row, kind, "surprise")) for kind in KINDS}
        entry["agrees"] = {kind: mean(_per_text(of_row, kind, "agrees")) for kind in KINDS}
        entry["kinds"] = _by_kind(of_row)
        entry["kept_fraction"] = _mean_of(both or of_row, "kept_fraction")
        entry["kept_bytes"] = _mean_of(both, "kept_bytes")
        entry["compaction_seconds"] = _longest_mean(both, "compaction_seconds")
        entry["step_seconds"] = steps.get(row.spec)
        summary["rows"].append(entry)
    return summary


KINDS = ("prose", "repeat")


def _by_kind(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """KL divergence and kept fraction of repeated passages, by kind of document."""
    of_kind: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        if "kind" in result:
            of_kind.setdefault(result["kind"], []).append(result)
    return {
        kind: {
            "kl": mean([statistics.fmean(result["kl"]) for result in own]),
            "kept_fraction": _mean_of(own, "kept_fraction"),
        }
        for kind, own in of_kind.items()
    }


def _by_task(results: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for result in results:
        scores.setdefault(result["task"], []).append(result["score"])
    return scores


def _per_text(results: Iterable[Mapping[str, Any]], kind: str, name: str) -> list[float]:
    return [statistics.fmean(r[name]) for r in results if r["task"] == f"kl_{kind}" and name in r]


def _mean_of(results: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return statistics.fmean(r[name] for r in results) if results else None


def _longest_mean(results: Sequence[Mapping[str, Any]], name: str) -> float | None:
    longest = max((r["length"] for r in results), default=None)
    return _mean_of([r for r in results if r["length"] == longest], name)


def _prefill_by_length(asked: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of the slowest answer of the full cache at each length: a document's first question pays."""
    slowest: dict[str, list[float]] = {}
    for result in asked:
        slowest.setdefault(str(result["length"]), []).append(result["seconds"])
    return {length: max(seconds) for length, seconds in slowest.items()}


def _needle(rows: Sequence[Row], results: Results) -> dict[str, Any]:
    """Accuracy by depth and length of the tasks whose fact lies at one place."""
    placed = [(key, r) for key, r in results.items() if key[0] == "ask" and r["depth"] is not None]
    lengths = sorted({r["length"] for _, r in placed})
    depths = sorted({r["depth"] for _, r in placed})
    cells: dict[str, dict[str, list[list[float | None]]]] = {}
    for row in rows:
        cells[row.spec] = {}
        for mode in ("inside", "after"):
            at: dict[tuple[float, int], list[float]] = {}
            for key, r in placed:
                if key[2:] == (mode, row.spec):
                    at.setdefault((r["depth"], r["length"]), []).append(r["score"])
            cells[row.spec][mode] = [
                [statistics.fmean(at[depth, length]) if (depth, length) in at else None for length in lengths]
                for depth in depths
            ]
    return {"lengths": lengths, "depths": depths, "cells": cells}


def table(summary: Mapping[str, Any]) -> str:
    """The main table and the tasks behind it, in Markdown."""
    settings, rows = summary["settings"], summary["rows"]
    full = rows[0]
    longest = max(map(int, summary["prefill_seconds"]), default=0)
    prefill = summary["prefill_seconds"].get(str(longest))
    lines = [
        f"Model {Path(settings['model']).name}, documents of {_list(settings['lengths'])} tokens, "
        f"blocks of {settings['block_size']}, seed {settings['seed']}.",
        "*Inside*: the question is part of the compressed prompt. *After*: the document is compressed before "
        "the question is read.",
        "Figures are means with 95 % intervals; n is the number of samples behind one row.",
        "",
    ]
    head = ["method", "budget", "kept KV", "kept MB", "inside", "% of full", "after", "% of full"]
    head += ["KL prose", "KL repeat", "ppl prose", "ppl repeat", "same token, prose", "same token, repeat"]
    head += ["compaction", "decode step"]
    body = []
    for row in rows:
        body.append(
            [
                row["label"],
                _budget(row),
                _percent(row["kept_fraction"]),
                "" if row["kept_bytes"] is None else f"{row['kept_bytes'] / 1e6:.1f}",
                *(
                    cell
                    for mode in ("inside", "after")
                    for cell in (_interval(row[mode], 100, 0), _of_full(row[mode], full[mode]))
                ),
                *(_interval(row["kl"][kind], 1, 3) for kind in KINDS),
                *(
                    "" if row["nll"][kind] is None else f"{math.exp(row['nll'][kind]['value']):.2f}"
                    for kind in KINDS
                ),
                *(_interval(row["agrees"][kind], 100, 1) for kind in KINDS),
                _over_prefill(row["compaction_seconds"], prefill),
                _ratio(row["step_seconds"], full["step_seconds"]),
            ]
        )
    lines += _markdown(head, body)
    counts = [f"{mode} n={full[mode]['n']}" for mode in ("inside", "after") if full[mode]]
    texts = [f"KL {kind} n={full['kl'][kind]['n']} texts" for kind in KINDS if full["kl"][kind]]
    lines += ["", "; ".join(counts + texts)]
    if any(row["variant"].startswith("stock:") for row in rows):
        lines.append("A quantized cache's kept KV is over the cache in the checkpoint's own precision.")
    if settings.get("too_long"):
        lines.append(f"{too_long(settings['too_long'], settings['context'])}.")
    if prefill:
        lines.append(f"Compaction is over the full cache's prefill of {longest} tokens, {prefill:.1f} s.")
    for mode, tasks in summary["left_out"].items():
        for task in tasks:
            value = full["tasks"][mode][task]
            lines.append(
                f"Left out of *{mode}*: {task}, which the full cache solves in {_percent(value['value'])} "
                f"of {value['n']}."
            )
    for mode in ("inside", "after"):
        names = list(full["tasks"][mode])
        if names:
            lines += ["", f"Right answers by task, question {mode}:", ""]
            cells = [[_interval(row["tasks"][mode].get(name), 100, 0) for name in names] for row in rows]
            lines += _by_column(rows, names, cells)
    if kinds := list(full["kinds"]):
        number = full["kinds"][kinds[0]]["kl"]["n"]
        lines += ["", f"KL divergence on a repeated passage by kind of document, n={number}; kept KV:", ""]
        cells = [[_of_kind(row["kinds"].get(kind)) for kind in kinds] for row in rows]
        lines += _by_column(rows, kinds, cells)
    return "\n".join(lines) + "\n"


def too_long(tokens: Mapping[str, int], limit: int) -> str:
    """One line that names what a model's context is too short for."""
    names = ", ".join(f"{name} ({count} tokens)" for name, count in tokens.items())
    return f"Left out, longer than the model's context of {limit} tokens: {names}"


def kvpress_table(
    theirs: Sequence[Mapping[str, Any]],
    specs: Mapping[tuple[str, float], str],
    ours: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    model: str,
) -> str:
    """Quality, memory and speed of kvpress on transformers beside this plugin's, on the same samples.

    Args:
        theirs: `variants` of `kvpress_baseline.compare`.
        specs: of each (method, budget), this plugin's variant.
        ours: results of each (variant, mode).
        model: its name.
    """
    head = ["method", "budget", "question", "plugin: right", "kvpress: right", "same score"]
    head += ["plugin: KV MB", "kvpress: KV MB", "kvpress: decode ms/token"]
    body = []
    for row in theirs:
        mine = {r["key"][1]: r for r in ours[specs[row["method"], row["budget"]], row["mode"]]}
        scores = [mine[sample["id"]]["score"] for sample in row["samples"]]
        same = sum(a == sample["score"] for a, sample in zip(scores, row["samples"], strict=True))
        decode = row["decode_seconds"]
        body.append(
            [
                row["method"],
                f"{row['budget']:g}",
                row["mode"],
                _interval(share(scores), 100, 0),
                _interval(share([sample["score"] for sample in row["samples"]]), 100, 0),
                f"{same} of {len(scores)}",
                f"{statistics.fmean(r['kept_bytes'] for r in mine.values()) / 1e6:.1f}",
                f"{row['kv_bytes'] / 1e6:.1f}" + (" (only masked)" if row["masked_only"] else ""),
                "" if decode is None else f"{1000 * decode:.0f}",
            ]
        )
    title = f"The same prompts and kept fractions, {model}: this plugin beside kvpress on transformers."
    return "\n".join([title, "", *_markdown(head, body)]) + "\n"


def draw(summary: Mapping[str, Any], folder: Path) -> None:
    """Write the pictures next to the table."""
    from vllm_kvcompress.evaluation import pictures

    name = Path(summary["settings"]["model"]).name
    pictures.quality_against_memory(
        summary["rows"], folder / "quality.png", f"{name}: quality against memory"
    )
    needle = summary["needle"]
    if needle["depths"]:
        title = f"{name}: facts found, by depth and document length"
        cells, lengths, depths = needle["cells"], needle["lengths"], needle["depths"]
        pictures.needle_heatmaps(cells, lengths, depths, folder / "needle.png", title)


def _by_column(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], cells: Sequence[Sequence[str]]
) -> list[str]:
    """A table of every row's cells under these names."""
    body = [[row["label"], _budget(row), *own] for row, own in zip(rows, cells, strict=True)]
    return _markdown(["method", "budget", *names], body)


def _budget(row: Mapping[str, Any]) -> str:
    return "" if row["budget"] is None else f"{row['budget']:g}"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in [head, *body]]
    return [lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]


def _interval(value: Mapping[str, float] | None, scale: float, digits: int) -> str:
    if value is None:
        return ""
    numbers = [value["value"], value["low"], value["high"]]
    middle, low, high = (f"{scale * number:.{digits}f}" for number in numbers)
    return middle if math.isnan(value["low"]) else f"{middle} [{low}, {high}]"


def _of_kind(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{_interval(found['kl'], 1, 3)}; {_percent(found['kept_fraction'])}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _of_full(value: Mapping[str, float] | None, full: Mapping[str, float] | None) -> str:
    return _percent(value["value"] / full["value"]) if value and full and full["value"] else ""


def _over_prefill(value: float | None, prefill: float | None) -> str:
    return f"{100 * value / prefill:.1f} %" if value and prefill else ""


def _ratio(value: float | None, full: float | None) -> str:
    return f"{value / full:.2f}" if value and full else ""


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
