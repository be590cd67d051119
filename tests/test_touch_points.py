"""The table of touch points is true of the installed vLLM and complete, and refuses by what has changed."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm

import vllm_kvcompress
from vllm_kvcompress import touch_points
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.source import Source
from vllm_kvcompress.touch_points import TABLE, WRITTEN_AGAINST, changes, check_touch_points, installed

PACKAGE = Path(vllm_kvcompress.__file__).parent
SCHEDULER = "vllm.v1.core.sched.scheduler"
# Objects by the class that they are of.
OBJECTS = {("vllm.platforms", "current_platform"): ("vllm.platforms.interface", "Platform")}
INHERITED_BY_CALL = {  # class FlashBuilder(Ours, FlashAttentionBackend.get_builder_cls())
    "FlashAttentionBackend.get_builder_cls": (
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionMetadataBuilder",
    ),
    "FlashAttentionBackend.get_impl_cls": ("vllm.v1.attention.backends.flash_attn", "FlashAttentionImpl"),
    "TritonAttentionBackend.get_builder_cls": (
        "vllm.v1.attention.backends.triton_attn",
        "TritonAttentionMetadataBuilder",
    ),
    "TritonAttentionBackend.get_impl_cls": ("vllm.v1.attention.backends.triton_attn", "TritonAttentionImpl"),
}
OWN = {  # set by this package, and read where a more general class is named
    "vllm.engine.arg_utils:EngineArgs._kv_compression",
    "vllm.v1.engine.core:EngineCore.kv_compression_delete_prefix",
    "vllm.v1.engine.core:EngineCore.kv_compression_heads",
    "vllm.v1.engine.core:EngineCore.kv_compression_load_prefix",
    "vllm.v1.engine.core:EngineCore.kv_compression_prefix_saved",
    "vllm.v1.engine.core:EngineCore.kv_compression_save_prefix",
    "vllm.v1.engine.core:EngineCore.kv_compression_saves",
    "vllm.v1.engine.core:EngineCore.kv_compression_prefixes",
    "vllm.v1.engine.core:EngineCore.kv_compression_state",
    "vllm.v1.core.sched.output:SchedulerOutput.kv_compression",
    "vllm.v1.outputs:ModelRunnerOutput.kv_compression",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata.compacted",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata.encoded",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata.observed",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata.rest_tokens",
    "vllm.model_executor.layers.attention.mla_attention:MLACommonMetadata.computing",
    "vllm.model_executor.layers.attention.mla_attention:MLACommonMetadata.decoding",
    "vllm.model_executor.layers.attention.mla_attention:MLACommonMetadata.layers",
    "vllm.v1.attention.selector:_cached_get_attn_backend.cache_clear",  # functools.cache's
}
Name = tuple[str, str]  # module, and a name or Class.name in it


def test_the_installed_vllm_is_as_the_table_says():
    minor = ".".join(vllm.__version__.split(".")[:2])
    assert minor in WRITTEN_AGAINST
    assert list(changes(installed(), minor)) == []


# ------------------------------------------------------------------ the table is complete


class Ours:
    """What this package's source says of vLLM."""

    def __init__(self) -> None:
        self.trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")}
        self.imports = {file: dict(_imports(tree)) for file, tree in self.trees.items()}
        self.classes = {
            node.name: (file, node)
            for file, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        }

    def touched(self) -> Iterator[Name]:
        for file, tree in self.trees.items():
            yield from self.imports[file].values()
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    yield from self._parameters(file, node)
                elif isinstance(node, ast.ClassDef):
                    yield from self._kept(file, node)
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    if (owner := self.imports[file].get(node.value.id)) is not None:
                        yield _attribute(owner, node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    if re.fullmatch(r"vllm(\.\w+)+\.[A-Z]\w+", node.value):
                        module, _, name = node.value.rpartition(".")
                        yield module, name
        for name in self.classes:
            yield from self._inherited(name)

    def _kept(self, file: Path, node: ast.ClassDef) -> Iterator[Name]:
        """Attributes of what a class of ours is given of vLLM's when it is made, and keeps."""
        for function in node.body:
            if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                classes, kept = self._annotated(file, function), dict(_assigned(function))
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Attribute) and ast.unparse(inner.value) in kept:
                        if (owner := classes.get(kept[ast.unparse(inner.value)])) is not None:
                            yield _attribute(owner, inner.attr)

    def _annotated(self, file: Path, function: ast.FunctionDef) -> dict[str, Name]:
        """The parameters of a function that are said to be of a class of vLLM's."""
        classes = {}
        for argument in [*function.args.args, *function.args.kwonlyargs]:
            kind = (
                argument.annotation.left
                if isinstance(argument.annotation, ast.BinOp)
                else argument.annotation
            )
            if isinstance(kind, ast.Name) and kind.id in self.imports[file]:
                classes[argument.arg] = self.imports[file][kind.id]
        return classes

    def _parameters(self, file: Path, function: ast.FunctionDef) -> Iterator[Name]:
        """Attributes of these parameters."""
        classes = self._annotated(file, function)
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in classes
            ):
                yield _attribute(classes[node.value.id], node.attr)

    def _family(self, name: str) -> tuple[list[ast.ClassDef], list[Name]]:
        """A class of ours with all that it inherits from: ours, and vLLM's."""
        file, node = self.classes[name]
        ours, theirs = [node], []
        for base in node.bases:
            if isinstance(base, ast.Call):
                theirs.append(INHERITED_BY_CALL[ast.unparse(base.func)])
            elif isinstance(base, ast.Name) and base.id in self.imports[file]:
                theirs.append(self.imports[file][base.id])
            elif isinstance(base, ast.Name) and base.id in self.classes:
                more = self._family(base.id)
                ours, theirs = ours + more[0], theirs + more[1]
        return ours, theirs

    def _inherited(self, name: str) -> Iterator[Name]:
        """What a class extends or reads of the classes of vLLM's that it inherits from."""
        ours, theirs = self._family(name)
        if not theirs:
            return
        defined = {part.name for node in ours for part in node.body if isinstance(part, ast.FunctionDef)}
        read = set()
        for node in (inner for one in ours for inner in ast.walk(one)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()"):
                read.add(node.attr)
        for member in sorted(defined | read):
            for module, owner in theirs:
                if installed().find(module, f"{owner}.{member}") is not None:
                    yield module, f"{owner}.{member}"


def _imports(tree: ast.Module) -> Iterator[tuple[str, Name]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            for alias in node.names:
                yield alias.asname or alias.name, (node.module, alias.name)


def _assigned(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """What a function assigns names to, and the names."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                both = [each.elts if isinstance(each, ast.Tuple) else [each] for each in (target, node.value)]
                for place, value in zip(*both, strict=False):
                    if isinstance(value, ast.Name):
                        yield ast.unparse(place), value.id


def _attribute(owner: Name, attribute: str) -> Name:
    module, name = OBJECTS.get(owner, owner)
    if installed().find(f"{module}.{name}", attribute) is not None:  # a module's
        return f"{module}.{name}", attribute
    return module, f"{name}.{attribute}"


def test_all_that_is_imported_extended_or_read_is_in_the_table():
    listed, names = set(), set()
    for place, touched in TABLE.items():
        module, _, owner = place.partition(":")
        members = [*touched.reads.split(), *touched.calls, *touched.overrides]
        names |= set(members)
        for name in [owner, *(f"{owner}.{member}".strip(".") for member in members)]:
            found = installed().find(module, name) if name else None
            listed |= {module if found is None else found.place}
    missing = set()
    for module, name in Ours().touched():
        found = installed().find(module, name)
        if found is not None:
            missing |= {found.place} - listed
        elif name.rpartition(".")[2] not in names:  # of a class below the one that is named
            missing.add(f"{module}:{name}")
    missing -= OWN
    assert not missing
    assert len(listed) > 150 and "vllm.v1.core.sched.scheduler:Scheduler._holds_kv_blocks" in listed


# ------------------------------------------------------------------ an unknown vLLM


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """`changed(module, old, new)`: the installed vLLM with another text in one of its modules."""
    known, source = installed(), Source(Path(vllm.__file__).parent)
    monkeypatch.setattr(touch_points, "installed", lambda: source)

    def make(module: str, old: str, new: str) -> None:
        file = source._file
        text = file(module).read_text(encoding="utf-8")
        assert old in text
        copy = tmp_path / "changed.py"
        copy.write_text(text.replace(old, new), encoding="utf-8")
        monkeypatch.setattr(source, "_file", lambda name: copy if name == module else file(name))
        own, other = functools.cache(source._read), known._names  # which is read once for all tests
        monkeypatch.setattr(source, "_names", lambda name: (own if name == module else other)(name))

    return make


CHANGES = {
    "Scheduler._holds_kv_blocks is gone": ("_holds_kv_blocks", "_keeps_kv_blocks"),
    "Scheduler._free_blocks takes at": (
        "def _free_blocks(self, request: Request",
        "def _free_blocks(self, request: Request, at=0",
    ),
    "Scheduler.num_waiting_for_streaming_input is gone": ("num_waiting_for_streaming_input", "num_asleep"),
    "scheduler.Scheduler is gone": ("class Scheduler(", "class Planner("),
}


@pytest.mark.parametrize("version", ["0.34.0", "0.32.9", "0.33.1.dev3+g1234567"])
@pytest.mark.parametrize("said", CHANGES)
def test_a_vllm_is_refused_by_what_has_changed(changed, version, said):
    changed(SCHEDULER, *CHANGES[said])
    minor = ".".join(vllm.__version__.split(".")[:2])
    if not version.startswith(minor):
        version = "0.34.0"  # the other known version's signatures are not those of the installed one
    with pytest.raises(KVCompressionError) as refused:
        check_touch_points(version)
    message = str(refused.value)
    assert said in message and version in message and "install vLLM 0.32 or 0.33" in message
    assert "\n" not in message and len(message) < 400


def test_what_is_called_may_come_to_take_more_but_not_to_need_it(changed):
    place, old = "vllm.v1.core.kv_cache_manager", "tuple[list[KVCacheBlock], ...]\n    ) -> KVCacheBlocks:"
    changed(place, old, old.replace("\n", ", quick=False\n"))
    check_touch_points("0.34.0")
    changed(place, ", quick=False", ", quick")
    with pytest.raises(KVCompressionError, match="create_kv_cache_blocks takes quick;"):
        check_touch_points("0.34.0")


def test_what_only_the_measuring_commands_need_does_not_stop_an_engine(changed):
    changed("vllm.benchmarks.serve", "def add_cli_args(", "def add_arguments(")
    check_touch_points("0.34.0")
    assert list(changes(touch_points.installed(), "0.34")) == ["vllm.benchmarks.serve.add_cli_args is gone"]


def test_a_new_number_alone_is_served_with_a_line_a_new_patch_release_without(caplog):
    check_touch_points(".".join(vllm.__version__.split(".")[:2]) + ".7")
    assert not caplog.records
    check_touch_points("0.34.0")
    (record,) = caplog.records
    assert "was not tried with vLLM 0.34.0" in record.getMessage() and record.levelname == "WARNING"


def test_a_known_version_costs_no_look_at_its_source(monkeypatch):
    monkeypatch.setattr(touch_points, "changes", lambda *args, **kwargs: pytest.fail("it looked"))
    for version in ("0.32.0", "0.33.0", "0.33.0+cu129"):
        check_touch_points(version)


def test_reading_the_source_imports_nothing_of_vllm():
    script = (
        "import sys; from vllm_kvcompress import touch_points as t; t.main(); print('vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0 and done.stdout.endswith("changed\nFalse\n"), done.stdout + done.stderr
