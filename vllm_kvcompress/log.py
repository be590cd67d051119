"""Where messages go."""

from vllm.logger import init_logger

logger = init_logger("vllm.kv_compression")  # a name below vLLM's own, for only such messages are shown
