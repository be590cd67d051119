"""KV-cache compression that stock vLLM can serve with: per-head, and with the freed blocks really freed."""

from typing import Any

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError

__all__ = [
    "KVCompressionConfig",
    "KVCompressionError",
    "__version__",
    "compact_prefix",
    "delete_prefix",
    "list_prefixes",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in ("compact_prefix", "delete_prefix", "list_prefixes"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm_kvcompress import offline  # which imports vLLM

    return getattr(offline, name)
