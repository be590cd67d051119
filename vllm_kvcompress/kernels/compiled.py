"""What Triton makes of the attention kernels for a GPU, be it there or not; needs no vLLM.

    python -m vllm_kvcompress.kernels.compiled [--capability 90]

Prints one line for each way in which tokens are kept: what a decode step reads of a token of a KV head, and
what the compiled loop over tokens takes. Nothing here is a time.
"""

import argparse
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_kvcompress.formats import FORMATS, RECORD
from vllm_kvcompress.kernels.attention import attend
from vllm_kvcompress.kernels.batch import Rows, Runs, Scales
from vllm_kvcompress.kernels.records import attend_records, uses_shares
from vllm_kvcompress.kernels.shares import Shares

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE = 2, 4, 128, 64
MATRIX = ("HMMA", "GMMA", "UTCMMA", "UTCHMMA")


@dataclass
class Compilation:
    """Kernels that were compiled in place of launches.

    Attributes:
        capability: of the GPU, as 90 for 9.0.
        kernels: by name, as compiled last.
        constants: what each was called with by keyword.
        launches: their names in order.
    """

    capability: int
    kernels: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, dict[str, Any]] = field(default_factory=dict)
    launches: list[str] = field(default_factory=list)


@contextmanager
def compiling(capability: int) -> Iterator[Compilation]:
    """Compile kernels for a GPU of this capability, whatever is there, and launch none."""
    found, launch = Compilation(capability), JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        found.launches.append(self.__name__)
        found.constants[self.__name__] = kwargs
        found.kernels[self.__name__] = launch(self, *args, grid=grid, warmup=True, **kwargs)

    absent = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: -capability,  # no device's kernels are replaced by these
        get_current_stream=lambda device=None: 0,
    )
    with patch.object(JITFunction, "run", compile_only), patch.object(driver, "_active", absent):
        yield found


@dataclass(frozen=True)
class Loop:
    """A loop of machine code.

    Attributes:
        instructions: of a warp, once through.
        products: of them, those of tensor cores.
        loads: of global memory by the bytes of a thread: `(16, 18)` is 18 of 16 bytes.
        copies: whether loads go to shared memory behind the warp's back.
        spills: accesses to registers that are in memory.
    """

    instructions: int
    products: int
    loads: tuple[tuple[int, int], ...]
    copies: bool
    spills: int


@dataclass(frozen=True)
class Code:
    """What a kernel was compiled to.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread, for want of registers.
        shared: bytes of a program.
        buffers: tiles that each operand has room for in shared memory; 0 without copies to it.
        loops: all of them that hold no other.
    """

    registers: int
    stack: int
    shared: int
    buffers: int
    loops: tuple[Loop, ...]

    @classmethod
    def of(cls, kernel: Any) -> "Code":
        """Read a compiled kernel, with the disassembler that comes with Triton."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage, listing = (
                subprocess.run(
                    [TOOLS / "cuobjdump", option, file.name], capture_output=True, check=True, text=True
                ).stdout
                for option in ("-res-usage", "-sass")
            )
        used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        depths = re.findall(r"memdesc<(\d+)x\d+x\d+x", kernel.asm["ttgir"])
        return cls(
            registers=used["REG"],
            stack=used["STACK"] + used["LOCAL"],
            shared=kernel.metadata.shared,
            buffers=max(map(int, depths), default=0),
            loops=tuple(_loops(listing)),
        )

    @property
    def tail_loop(self) -> Loop:
        """That over raw tokens, which are copied to shared memory."""
        return max((loop for loop in self.loops if loop.copies), key=lambda loop: loop.instructions)

    @property
    def record_loop(self) -> Loop:
        """That over records, which are loaded to registers."""
        return max((loop for loop in self.loops if not loop.copies), key=lambda loop: loop.products)


def _loops(listing: str) -> Iterator[Loop]:
    """The innermost loops of a disassembled kernel."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", listing)]
    found = []
    for at, text in code:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            found.append((int(jump[1], 16), at))
    for begin, end in found:
        if any((begin, end) != other and begin <= other[0] and other[1] <= end for other in found):
            continue
        body = [text for at, text in code if begin <= at <= end]
        loads: dict[int, int] = {}
        for text in body:
            if load := re.search(r"\bLDG(STS)?\.(\S+)", text):
                size = next(
                    (n for name, n in (("128", 16), ("64", 8), ("16", 2), ("8", 1)) if name in load[2]), 4
                )
                loads[size] = loads.get(size, 0) + 1
        yield Loop(
            instructions=len(body),
            products=sum(any(name in text for name in MATRIX) for text in body),
            loads=tuple(sorted(loads.items(), reverse=True)),
            copies=any("LDGSTS" in text for text in body),
            spills=sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in body),
        )


def compile_decode(name: str, dtype: torch.dtype = torch.bfloat16, query_len: int = 1) -> str:
    """Call the kernel of a format, `raw` or `fp8` with rows of so many tokens; the kernel's name."""

    def int32(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int32)

    out = torch.zeros(2 * query_len, HEADS * GROUP, HEAD_SIZE, dtype=dtype)
    cache = torch.zeros(1, 4, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=dtype)
    rows = Rows(int32(2), int32(2, 4), int32(2), int32(3), query_len)
    shares = Shares.empty(2, 1, HEADS, 16, "cpu")
    scales = None
    if name == "fp8":
        cache = torch.zeros(cache.shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scales = Scales(*torch.ones(3).unbind())
    if name in ("raw", "fp8"):
        runs, parts = Runs(int32(3, 4), int32(3, HEADS + 1), int32(3)), cache.split(HEAD_SIZE, -1)
        last = dict(out=out, compacted_only=True, scales=scales, shares=shares)
        attend(out, *parts, runs, rows, 0, 0.1, **last)
        return "_attend_kernel"
    format = FORMATS[name]
    places = int32(3, len(format.parts), HEADS)
    runs = Runs(int32(3, 4), int32(3, HEADS + 1), int32(3), encoded=places, first=places)
    pages = cache.flatten(0, 2).flatten(1).view(torch.uint8)
    keys_and_values = cache.split(HEAD_SIZE, -1)
    attend_records(out, pages, *keys_and_values, runs, rows, 0, format, 1, 0.1, shares=shares)
    return "_records_kernel"


def table(capability: int) -> Iterator[str]:
    """The lines of a Markdown table of every format that one kernel reads."""
    yield (
        "| kept as | bytes of a token | warp instructions per token | registers "
        "| spilled bytes, accesses in the loop "
        "| programs per SM | loads of a thread per tile |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    one_part = [name for name, format in FORMATS.items() if uses_shares(format)]
    for name in ("raw", *["fp8"] * (capability >= 89), *one_part):
        with compiling(capability) as found:
            kernel = compile_decode(name)
        code, constants = Code.of(found.kernels[kernel]), found.constants[kernel]
        if kernel == "_attend_kernel":
            loop, tokens = code.tail_loop, constants["KEYS"]
            size = 2 * HEAD_SIZE * (1 if name == "fp8" else 2)
        else:
            loop, tokens = code.record_loop, RECORD * constants["RECORDS"]
            size = FORMATS[name].record_bytes(HEAD_SIZE) / RECORD
        warps = constants["num_warps"]
        by_registers = 65536 // (32 * warps * -(-code.registers // 8) * 8)
        programs = min(by_registers, (228 * 1024) // (code.shared + 1024))
        loads = ", ".join(f"{count} × {width}" for width, count in loop.loads)
        instructions = loop.instructions * warps / tokens
        yield (
            f"| {name} | {size:g} | {instructions:.0f} | {code.registers} | {code.stack}, {loop.spills} "
            f"| {programs} of {warps} warps | {loads} B |"
        )


def main() -> None:
    """Compile, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90, help="of the GPU, as 90 for 9.0")
    capability = parser.parse_args().capability
    warnings.simplefilter("ignore")
    print(
        f"sm_{capability}, triton {triton.__version__}: {HEAD_SIZE} channels, groups of {GROUP}, bfloat16\n"
    )
    for line in table(capability):
        print(line, flush=True)


if __name__ == "__main__":
    main()
