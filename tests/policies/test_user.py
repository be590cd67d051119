"""Policies in user code are found by name, wherever a configuration is read."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_policy.py"
PARSE = """
from vllm_kvcompress import KVCompressionConfig
config = KVCompressionConfig.parse("value_norm:budget=0.5,power=2,allocation=global")
print(type(config.build_policy()).__name__, config.build_policy().power)
"""


def run(code: str, policies: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "KV_COMPRESSION_POLICIES": policies}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_example_is_a_method_with_options_and_any_allocation():
    assert run(PARSE, str(EXAMPLE)).stdout.split() == ["ValueNorm", "2.0"]


def test_without_its_file_the_name_is_unknown():
    done = run(PARSE, "")
    assert done.returncode and "unknown kv_compression method 'value_norm'" in done.stderr


def test_several_files_may_be_given(tmp_path):
    other = tmp_path / "other.py"
    other.write_text(EXAMPLE.read_text().replace("value_norm", "other").replace("ValueNorm", "Other"))
    code = PARSE + "KVCompressionConfig.parse('other')"
    assert run(code, f"{EXAMPLE}{os.pathsep}{other}").returncode == 0


def test_a_file_that_is_not_there_or_does_not_run_is_named_in_one_line(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import nowhere_to_be_found")
    for path in (broken, tmp_path / "missing.py"):
        last = run("import vllm_kvcompress", str(path)).stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: KV_COMPRESSION_POLICIES") and str(path) in last
