"""`eval`, `bench` and `inspect` as a user runs them, small, on a random model: what they print and leave."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import vllm

from vllm_kvcompress.cli import main


def command(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_kvcompress.cli", *arguments], capture_output=True, text=True, timeout=500
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


EVAL = ["--methods", "snapkv,kv_compress", "--budgets", "0.25", "--lengths", "512", "--repetitions", "1"]


@pytest.fixture(scope="module")
def evaluated(random_model, tmp_path_factory):
    """A small evaluation and the folder it left."""
    folder = tmp_path_factory.mktemp("eval")
    arguments = ["eval", str(random_model), *EVAL, "--kl-tokens", "8", "--output", str(folder)]
    arguments += ["--tasks", "needle,recall,kl", "--baselines", "fp8"]
    return arguments, folder, command(*arguments).stdout


def test_eval_shows_every_variant(evaluated):
    _, folder, printed = evaluated
    assert printed.count("| full cache ") >= 2  # of the main table and of the tasks
    for method in ("snapkv", "kv_compress"):
        assert re.search(rf"^\| {method} +\| 0.25 ", printed, re.M)
    summary = json.loads((folder / "summary.json").read_text())
    full, snapkv, _, fp8 = summary["rows"]
    assert fp8["label"] == "stock, fp8 cache" and fp8["kept_fraction"] == 0.25  # of float32
    assert 0 < fp8["kl"]["prose"]["value"] < snapkv["kl"]["prose"]["value"]
    # (Products of other shapes are rounded otherwise on some CPUs: the prefix is cached the second time.)
    assert full["kept_fraction"] == 1.0 and full["kl"]["prose"]["value"] < 1e-6 < fp8["kl"]["prose"]["value"]
    # 512 tokens: 15 blocks below the boundary of which 4 stay, and 1 or 2 of the tail.
    assert 0.25 < snapkv["kept_fraction"] < 0.4
    assert snapkv["kl"]["prose"]["value"] > 0
    assert summary["settings"]["vllm"] == vllm.__version__


def test_eval_leaves_its_table_and_pictures(evaluated):
    _, folder, printed = evaluated
    assert (folder / "table.md").read_text().strip() in printed
    assert is_picture(folder / "quality.png") and is_picture(folder / "needle.png")


def test_eval_goes_on_where_it_was_ended(evaluated):
    arguments, folder, _ = evaluated
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]))
    command(*arguments)
    again = path.read_text().splitlines(keepends=True)
    assert again[: len(lines) - 3] == lines[:-3]  # nothing was measured twice
    assert len(again) == len(lines)


def test_inspect_draws_the_kept_fraction(random_model, tmp_path):
    printed = command("inspect", str(random_model), "--tokens", "600", "--output", str(tmp_path)).stdout
    assert "adakv:budget=0.25" in printed
    kept = json.loads((tmp_path / "kept.json").read_text())["kept"]
    assert len(kept) == 4 and len(kept[0]) == 3
    # 17 blocks of 600 - 32 tokens, of which 5 stay: the layers' shares are alike, the heads' are not.
    assert [sum(layer) / 3 for layer in kept] == pytest.approx([5 / 17] * 4)
    assert len({share for layer in kept for share in layer}) > 1
    assert is_picture(tmp_path / "kept.png")


def test_inspect_shows_what_a_method_keeps_that_has_the_prompt_repeated(random_model, tmp_path):
    arguments = ["--compression", "kvzip:budget=0.25", "--tokens", "600", "--output", str(tmp_path)]
    command("inspect", str(random_model), *arguments)
    kept = json.loads((tmp_path / "kept.json").read_text())["kept"]
    assert len({share for layer in kept for share in layer}) > 1


def test_bench_compares_with_stock(random_model, tmp_path):
    arguments = ["--contexts", "512", "--batch", "2", "--rounds", "2", "--steps", "3", "--requests", "8"]
    arguments += ["--prompt", "1500", "--output-tokens", "120", "--server-rounds", "1"]
    printed = command("bench", str(random_model), *arguments, "--output", str(tmp_path)).stdout
    result = json.loads((tmp_path / "bench.json").read_text())
    pressure = result["serve"]["regimes"]["pressure"]["runs"]
    assert pressure["stock"][0]["at_once"] == 4  # as many as the pool was made for
    assert pressure["compressed"][0]["at_once"] > 4
    assert 0 < pressure["compressed"][0]["peak_blocks"] <= result["serve"]["pool_blocks"]
    (row,) = result["steps"]["rows"]
    assert row["compaction_seconds"] > 0
    assert all(0 < row["metadata_seconds"][name] < row["step_seconds"][name] for name in row["step_seconds"])
    assert re.search("Compression (pays|does not pay) with short prompts", printed)
    assert is_picture(tmp_path / "decode_time.png")


MISTAKES = [
    ["eval", "--methods", "snapkw"],
    ["eval", "--tasks", "needel"],
    ["eval", "--tasks", "ruler"],
    ["eval", "nowhere/to/be/found"],
    ["bench", "--parts", "stepps"],
    ["bench", "--compression", "snapkv:budget=2"],
]


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_mistakes_are_one_line(random_model, capsys, monkeypatch, arguments):
    # Here, where the command has no need to start itself again in another environment.
    monkeypatch.setattr("vllm_kvcompress.cli.engine_environment", lambda: dict(os.environ))
    if "nowhere/to/be/found" not in arguments:
        arguments = [arguments[0], str(random_model), *arguments[1:]]
    assert main(arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("error: ") and not any("Traceback" in line for line in printed)


def test_a_mistake_that_shows_once_the_engine_runs_is_one_line(random_model):
    done = command("inspect", str(random_model), "--compression", "adakv:budget=1", check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: "), done.stderr[-1000:]


def test_bench_counts_the_blocks_of_a_prompt_larger_than_the_pool(random_model, tmp_path):
    arguments = ["--parts", "blocks", "--long-output", "24", "--long-prompt", "3000"]
    printed = command("bench", str(random_model), *arguments, "--output", str(tmp_path)).stdout
    blocks = json.loads((tmp_path / "bench.json").read_text())["blocks"]
    assert blocks["pool_blocks"] == 31  # 992 tokens
    held = dict(blocks["prompt"]["held"])
    assert max(held) > 3000 and max(held.values()) <= 31
    assert "stock vLLM would hold 96" in printed
    assert blocks["stock_says"] and "KV cache" in blocks["stock_says"]
    assert is_picture(tmp_path / "blocks_over_time.png")
