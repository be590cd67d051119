"""KV-cache compression that stock vLLM can serve with: per-head, and with the freed blocks really freed."""

import importlib
from typing import Any

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError

__all__ = [
    "KVCompressionConfig",
    "KVCompressionError",
    "__version__",
    "compact_prefix",
    "delete_prefix",
    "list_prefixes",
    "load_prefix",
    "save_prefix",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__ or not name.endswith(("_prefix", "_prefixes")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("vllm_kvcompress.offline"), name)  # which imports vLLM
