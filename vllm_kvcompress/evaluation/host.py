"""What this machine has for an engine, whatever the variant: cores, OpenMP library, arithmetic, packages."""

import importlib
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_kvcompress.config import KVCompressionError


def engine_environment() -> dict[str, str]:
    """Environment variables for a process that runs a vLLM engine: all cores, no model hub, quiet logs.

    vLLM's CPU build leaves a core to its front end unless told which to bind, and does prefill about twice as
    fast with the Intel OpenMP library that it depends on. A value the user has set stays.
    """
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment = {**defaults, **os.environ}
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    preloaded = [path for path in environment.get("LD_PRELOAD", "").split(":") if path]
    if openmp.exists() and str(openmp) not in preloaded:
        # vLLM refuses two OpenMP libraries, and leaves torch's own to the children of a process that ran it.
        others = [path for path in preloaded if "libgomp" not in Path(path).name]
        environment["LD_PRELOAD"] = ":".join([*others, str(openmp)])
    return environment


def checkpoint(given: str | None) -> str:
    """The checkpoint that a command was given, or the quick start's model.

    Raises:
        KVCompressionError: it cannot be read.
    """
    if given is None:
        from vllm_kvcompress.models import smollm2

        return str(smollm2())
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(given)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise KVCompressionError(f"cannot read a model from {given}: {reason}") from None
    return given


def model_config(model: str) -> Any:
    """A model's configuration as vLLM reads it."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=model).create_model_config()


def context_limit(model: str) -> int:
    """Tokens of a model's context, as vLLM has it."""
    return model_config(model).max_model_len


def cache_groups(model: str) -> int:
    """How many cache groups vLLM makes of a model's layers, about: as large as its rarest kind has layers.

    In a pool each request has blocks of every group.
    """
    config = model_config(model).hf_text_config
    kinds = Counter(
        getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ["attention"]
    )
    return sum(-(-number // min(kinds.values())) for number in kinds.values())


def engine_dtype() -> str:
    """`dtype` for vLLM here: the checkpoint's own, or float32 on a CPU that cannot multiply bfloat16.

    Without AVX512-BF16 or AMX, bfloat16 matrix products run at a third of float32's speed.
    """
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or torch.cpu._is_avx512_bf16_supported():
        return "auto"
    return "float32"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ModuleNotFoundError(
            f"{module} is not installed: pip install 'vllm-kvcompress[{extra}]'", name=module
        ) from None
