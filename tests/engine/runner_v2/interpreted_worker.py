"""The GPU worker in place of the CPU's, to run its kernels interpreted."""

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.worker.gpu import CompressionGPUWorker


class InterpretedWorker(CompressionGPUWorker, CPUWorker):
    backends = {
        AttentionBackendEnum.CPU_ATTN: "vllm_kvcompress.attention.gpu.CompressedTritonAttentionBackend"
    }
