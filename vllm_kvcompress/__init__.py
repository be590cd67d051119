"""KV-cache compression that stock vLLM can serve with: per-head, and with the freed blocks really freed."""

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError

__all__ = ["KVCompressionConfig", "KVCompressionError", "__version__"]
__version__ = "0.1.0"
