"""Kernels compiled for GPUs that are not there."""

import pytest

# KiB of a block, by compute capability; what is compiled for 8.0 runs on 8.6, too.
SHARED_BYTES = {80: 99, 89: 99, 90: 227, 100: 227, 120: 99}


class Compiled:
    """Kernels by name, as compiled last.

    Attributes:
        launches: their names in the order in which they were to be launched.
        capability: of the GPU, as 90 for 9.0.
    """

    def __init__(self, found) -> None:
        self.found, self.capability, self.launches = found, found.capability, found.launches

    def __getitem__(self, name):
        return self.found.kernels[name]

    def code(self, name):
        """What a kernel was compiled to."""
        from vllm_kvcompress.kernels.compiled import Code

        return Code.of(self.found.kernels[name])

    def assert_fit(self, *names: str) -> None:
        """Those kernels were compiled, and fit the shared memory."""
        assert set(self.found.kernels) == set(names)
        for kernel in self.found.kernels.values():
            assert kernel.asm["cubin"]
            assert kernel.metadata.shared <= 1024 * SHARED_BYTES[self.capability]

    def assert_in_registers(self) -> None:
        """The kernels hold nothing in memory for want of registers."""
        for name in self.found.kernels:
            code = self.code(name)
            assert code.stack == 0, (name, self.capability, code.registers, code.stack)


@pytest.fixture(params=[80])
def compiled(request, monkeypatch, tmp_path):
    """Kernels are compiled instead of launched; parametrise indirectly by the GPU's compute capability."""
    from vllm_kvcompress.kernels.compiled import compiling

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with compiling(request.param) as found:
        yield Compiled(found)
