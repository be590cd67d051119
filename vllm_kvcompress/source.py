"""What a vLLM offers, read in its source: nothing of it is imported, and no device is touched."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Found:
    """A name in vLLM's source.

    Attributes:
        place: where it is defined, `module:name` or `module:Class.name`.
        signature: of functions, and of `__init__` of dataclasses: the parameters without annotations,
            defaults as `...`; None of all else.
    """

    place: str
    signature: str | None


class Source:
    """The source of one vLLM.

    Args:
        package: the folder `vllm`.
    """

    def __init__(self, package: Path) -> None:
        self._root = package.parent
        self._names = functools.cache(self._read)

    def find(self, module: str, name: str) -> Found | None:
        """A module's name, or `Class.name`, imported or inherited from wherever; None if there is none."""
        first, _, member = name.partition(".")
        if (defined := self._definition(module, first)) is None:
            is_module = not member and self._file(f"{module}.{first}") is not None
            return Found(f"{module}.{first}", None) if is_module else None
        home, node = defined
        if not member:
            return Found(f"{home}:{first}", _signature(node) if _is_function(node) else None)
        return self._member(home, node, member) if isinstance(node, ast.ClassDef) else None

    def _definition(self, module: str, name: str) -> tuple[str, _Definition] | None:
        node = self._names(module).get(name)
        if isinstance(node, tuple):  # imported from another module, under another name perhaps
            return self._definition(*node)
        return None if node is None else (module, node)

    def _member(self, module: str, node: ast.ClassDef, name: str) -> Found | None:
        own = _members(node).get(name)
        if own is not None:
            plain = not _is_function(own) or _is_property(own)
            return Found(f"{module}:{node.name}.{name}", None if plain else _signature(own))
        if name == "__init__" and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            return Found(f"{module}:{node.name}.__init__", _fields(node))
        for base in node.bases:
            target = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(target, ast.Name) and (defined := self._definition(module, target.id)) is not None:
                home, parent = defined
                inherited = self._member(home, parent, name) if isinstance(parent, ast.ClassDef) else None
                if inherited is not None:
                    return inherited
        return None

    def _file(self, module: str) -> Path | None:
        path = self._root.joinpath(*module.split("."))
        return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)

    def _read(self, module: str) -> dict[str, _Definition | tuple[str, str]]:
        """What a module defines, and from where it imports the rest."""
        if (file := self._file(module)) is None:
            return {}
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        names: dict[str, _Definition | tuple[str, str]] = {}
        for node in _statements(ast.parse(file.read_text(encoding="utf-8")).body):
            if isinstance(node, ast.ImportFrom):
                parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
                origin = ".".join(filter(None, [parent, node.module]))
                for alias in node.names:
                    names[alias.asname or alias.name] = (origin, alias.name)
            else:
                names |= dict.fromkeys(_defines(node), node)
        return names


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body and of its branches."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))


def _defines(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        overload = any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)
        return [] if overload else [node.name]
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    parts = [part for target in targets for part in ast.walk(target)]
    return [part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]


@functools.cache
def _members(node: ast.ClassDef) -> dict[str, ast.AST]:
    """What a class defines in its body, and the attributes that its methods set."""
    members: dict[str, ast.AST] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            if isinstance(inner.value, ast.Name) and inner.value.id == "self":
                members[inner.attr] = inner
    for statement in _statements(node.body):
        members |= dict.fromkeys(_defines(statement), statement)
    return members


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _is_property(node: ast.AST) -> bool:
    return any("property" in ast.unparse(d) or ".setter" in ast.unparse(d) for d in node.decorator_list)


def _signature(node: ast.AST) -> str:
    arguments = node.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    elided = ast.Constant(...)
    arguments.defaults = [elided] * len(arguments.defaults)
    arguments.kw_defaults = [default and elided for default in arguments.kw_defaults]
    return f"({ast.unparse(arguments)})"


def _fields(node: ast.ClassDef) -> str:
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    return f"({', '.join(['self', *(f.target.id + ('=...' if f.value else '') for f in fields)])})"
