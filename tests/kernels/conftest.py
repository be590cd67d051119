"""Kernels compiled for GPUs that are not there."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

SHARED_BYTES = 99 * 1024  # per block, of the GPUs of compute capability 8.6, which have the least since 8.0


class Compiled(dict):
    """Kernels by name, as compiled last.

    Attributes:
        launches: their names in the order in which they were to be launched.
        capability: of the GPU, as 90 for 9.0.
        folder: for files.
    """

    def __init__(self, capability: int, folder: Path) -> None:
        self.launches: list[str] = []
        self.capability = capability
        self.folder = folder

    def assert_fit(self, *names: str) -> None:
        """Those kernels were compiled, and fit the shared memory."""
        assert set(self) == set(names)
        for kernel in self.values():
            assert kernel.asm["cubin"]
            assert kernel.metadata.shared <= SHARED_BYTES

    def assert_in_registers(self) -> None:
        """The kernels hold nothing in memory for want of registers."""
        import triton

        dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        for name, kernel in self.items():
            cubin = self.folder / f"{name}.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            run = subprocess.run([dump, "-res-usage", cubin], capture_output=True, check=True, text=True)
            usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", run.stdout))
            assert usage["STACK"] == usage["LOCAL"] == "0", (name, self.capability, usage)


@pytest.fixture(params=[80])
def compiled(request, monkeypatch, tmp_path):
    """Kernels are compiled instead of launched; parametrise indirectly by the GPU's compute capability."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found, launch = Compiled(request.param, tmp_path), JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        found.launches.append(self.__name__)
        found[self.__name__] = launch(self, *args, grid=grid, warmup=True, **kwargs)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    absent = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", request.param, 32),
        get_current_device=lambda: -request.param,  # no device's kernels are replaced by these
        get_current_stream=lambda device=None: 0,
    )
    monkeypatch.setattr(driver, "_active", absent)
    return found
