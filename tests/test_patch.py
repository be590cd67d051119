"""The patch for the installed vLLM applies to it and can stand in for the plugin's own wrappers."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vllm

MINOR = ".".join(vllm.__version__.split(".")[:2])
PATCH = Path(__file__).parents[1] / "patches" / f"vllm-{MINOR}-kv-compression-flag.patch"
TOUCHED = re.findall(r"^\+\+\+ b/(\S+)$", PATCH.read_text(encoding="utf-8"), re.MULTILINE)

# Run on the patched vLLM, where the plugin's wrappers are not installed.
SCRIPT = """
import sys
from types import SimpleNamespace

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.plugins import EngineHooks, engine_hooks, register_engine_hooks
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.input_processor import InputProcessor

model = sys.argv[1]


def configured(*flags):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    namespace = parser.parse_args(["--model", model, "--max-model-len", "1024", *flags])
    return AsyncEngineArgs.from_cli_args(namespace).create_engine_config()


assert not engine_hooks and not hasattr(EngineArgs, "_kv_compression")
assert configured().additional_config == {}
try:
    configured("--kv-compression", "snapkv")
except ValueError as error:
    assert "none is loaded" in str(error), error
else:
    raise AssertionError("accepted without a plugin")

from vllm_kvcompress.plugin import KEY, _check_request, configure


def check_params(vllm_config, params):
    if KEY in (params.extra_args or {}):
        _check_request(vllm_config, params.extra_args[KEY])


for _ in range(2):  # vLLM may load a plugin more than once
    register_engine_hooks(KEY, EngineHooks(configure, check_params))
assert len(engine_hooks) == 1
assert configured().scheduler_config.scheduler_cls is None

for flags in (["--kv-compression", "snapkv:budget=0.5"], ["--kv-compression.budget", "0.5"]):
    config = configured(*flags)
    assert config.additional_config[KEY]["budget"] == 0.5
    assert config.scheduler_config.scheduler_cls.startswith("vllm_kvcompress.")
    assert config.parallel_config.worker_cls.startswith("vllm_kvcompress.")

try:
    wrong = SamplingParams(extra_args={KEY: "snapkv:budget=7"})
    InputProcessor._validate_params(SimpleNamespace(vllm_config=config), wrong, ("generate",))
except VLLMValidationError as error:
    assert error.parameter == KEY and "budget" in str(error)
else:
    raise AssertionError("a wrong option was accepted")
print("done")
"""


def installed_vllm() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture
def sources(tmp_path) -> Path:
    """A folder with copies of the files of the installed vLLM that the patch touches."""
    for file in TOUCHED:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(installed_vllm().parent / file, tmp_path / file)
    return tmp_path


def git_apply(folder: Path, *options: str) -> None:
    # A ceiling, so that a repository around the folder is not taken for the target.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "--verbose", *options, str(PATCH)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Skipped" not in done.stderr and "offset" not in done.stderr, done.stderr


def test_the_patch_applies_to_the_installed_vllm_and_compiles(sources):
    assert "vllm/engine/arg_utils.py" in TOUCHED
    before = {file: (sources / file).read_text() for file in TOUCHED}
    git_apply(sources, "--check")
    git_apply(sources)
    for file in TOUCHED:
        after = (sources / file).read_text()
        assert after != before[file]
        compile(after, file, "exec")
    git_apply(sources, "--reverse")
    assert {file: (sources / file).read_text() for file in TOUCHED} == before


@pytest.mark.timeout(300)
def test_the_patched_vllm_needs_no_wrappers(sources, smollm2):
    git_apply(sources)
    overlay = sources / "overlay"
    shutil.copytree(installed_vllm(), overlay / "vllm", copy_function=os.symlink)
    for file in TOUCHED:
        (overlay / file).unlink()
        shutil.copyfile(sources / file, overlay / file)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(overlay), os.environ.get("PYTHONPATH")])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "VLLM_PLUGINS": "",  # ours would install its wrappers
    }
    command = [sys.executable, "-c", SCRIPT, str(smollm2)]
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr
