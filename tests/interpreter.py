"""Triton's interpreter, less what it does over and over or for nothing, which is most of its time.

- At each launch, and at each call of a function by a kernel (`tl.sum` is one), it looks through all of the
  language for what to put its own in the place of.
- It computes every sum and product of integers again in 64 bits, to assert that none overflowed, and asserts
  nothing unless it debugs.
- It copies all that a kernel is given from the device and back: on a CPU onto itself.
- It checks and names the same few shapes for every intermediate value.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton.language as tl
from triton.runtime import interpreter


def outcomes(request: pytest.FixtureRequest, folder: Path, **environment: str) -> Callable[[str], None]:
    """Run those files of a folder that a module's chosen tests have for their `name`, interpreted.

    All in one process: what it imports, and its first engine, take as long as most of the files.

    Returns:
        What asserts of a name that all tests of the file were run and passed.
    """
    names = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-rap", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *(str(folder / f"{name}.py") for name in names)],
        env={**os.environ, "TRITON_INTERPRET": "1"} | environment,
        capture_output=True,
        text=True,
    )

    def passed(name: str) -> None:
        found = re.findall(rf"^([A-Z]+) (?:\[\d+\] )?\S*\b{name}\.py", run.stdout, re.M)
        assert found and set(found) == {"PASSED"}, run.stdout[-20000:] + run.stderr[-2000:]

    return passed


def hasten() -> None:
    """Do once what has the same result each time, and leave out what has none; no number changes.

    For a process that compiles nothing: the language stays the interpreter's.
    """
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    scope = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda function: scope
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
    interpreter._get_np_dtype = _numpy_types(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = _known_shapes(tl.core.block_type.__init__)
    tl.core.tensor.__init__ = _tensor


def _numpy_types(look_up: Callable) -> Callable:
    known: dict[str, object] = {}

    def found(type_: tl.dtype):
        element = type_.scalar
        if element.name not in known:
            known[element.name] = look_up(element)
        return known[element.name]

    return found


def _known_shapes(make: Callable) -> Callable:
    known: dict[tuple[int, ...], tuple] = {}

    def init(self, element_ty, shape) -> None:
        sizes = tuple(shape)
        if type(shape) is tuple or not all(type(size) is int for size in sizes):
            make(self, element_ty, shape)
            return
        if sizes not in known:
            make(self, element_ty, shape)
            known[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, sizes_name = known[sizes]
        self.name = f"<{sizes_name}, {element_ty}>"

    return init


_EXTENTS: dict[tuple[int, ...], tuple] = {}


def _tensor(self, handle, type) -> None:
    sizes = tuple(type.shape) if type.is_block() else ()
    if sizes not in _EXTENTS:
        extents = tl.core.tuple([tl.constexpr(size) for size in sizes])
        _EXTENTS[sizes] = tl.constexpr(math.prod(sizes)), extents
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _EXTENTS[sizes]
