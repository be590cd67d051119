"""Policies in user code: from installed packages, and from files named in an environment variable."""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

ENTRY_POINTS = "vllm_kvcompress.policies"
VARIABLE = "KV_COMPRESSION_POLICIES"


def load_user_policies() -> None:
    """Import what registers further policies; every process of an engine does so for itself.

    Packages name a module in the entry-point group `vllm_kvcompress.policies`; single files are listed in
    `KV_COMPRESSION_POLICIES`, separated like `PATH`.

    Raises:
        ImportError: a file cannot be read or does not run, in one line.
    """
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        entry_point.load()
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        _load_file(Path(name))


def _load_file(path: Path) -> None:
    module_name = f"kv_compression_policy_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"{VARIABLE} names {path}, which is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ImportError(f"{VARIABLE}: {path} does not run: {type(error).__name__}: {error}") from error
