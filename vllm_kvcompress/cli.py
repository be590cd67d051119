"""The `vllm-kvcompress` command."""

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vllm_kvcompress.allocation import ALLOCATIONS
from vllm_kvcompress.config import (
    AUTO,
    AUTO_UNDER_PRESSURE,
    AUTO_WITHOUT_SCORER,
    DEFAULT_BUDGET,
    METHODS,
    KVCompressionConfig,
    KVCompressionError,
    Method,
)
from vllm_kvcompress.evaluation.host import engine_environment
from vllm_kvcompress.formats import FORMATS
from vllm_kvcompress.models import ModelUnavailable
from vllm_kvcompress.policies import POLICIES, Policy


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _Parser(prog="vllm-kvcompress", description="KV-cache compression for vLLM.")
    commands = parser.add_subparsers(dest="command", required=True)
    methods = commands.add_parser("methods", help="list methods, their options, papers and costs")
    methods.add_argument("--json", action="store_true", help="print JSON instead of text")
    methods.set_defaults(run=_methods)
    _add_measuring(commands)
    arguments = parser.parse_args(argv)
    run = vars(arguments).pop("run")
    try:
        run(arguments)
    except (KVCompressionError, ModelUnavailable, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _end(number: int, frame: object) -> NoReturn:
    """End as any other end: what the command has started is ended first."""
    sys.exit(128 + number)


def _add_measuring(commands: Any) -> None:
    """The commands that run models; what they need is imported only once one of them runs."""
    from vllm_kvcompress.evaluation import check
    from vllm_kvcompress.evaluation.quality import calibrate, evaluate, inspection
    from vllm_kvcompress.evaluation.speed import bench

    for name, module, summary in (
        ("check", check, "what of a model is compacted, and what a pool then holds"),
        ("eval", evaluate, "quality of every method and budget against the full cache"),
        ("bench", bench, "memory and speed, stock vLLM against compressed"),
        ("inspect", inspection, "which heads keep how much of a prompt"),
        ("calibrate", calibrate, "measure a model's heads for the allocation `profile`"),
    ):
        parser = commands.add_parser(name, help=summary, description=module.__doc__.partition("\n\n")[0])
        module.add_arguments(parser)
        parser.set_defaults(run=_in_engine_environment(module.run))


def _in_engine_environment(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """Start this command again where it has every core and the right OpenMP library, unless it has them."""

    def wrapped(arguments: argparse.Namespace) -> None:
        environment = engine_environment()
        if environment != dict(os.environ):
            os.execve(
                sys.executable, [sys.executable, "-m", "vllm_kvcompress.cli", *sys.argv[1:]], environment
            )
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _end)
        run(arguments)

    return wrapped


def _methods(arguments: argparse.Namespace) -> None:
    listing = describe_methods()
    if arguments.json:
        print(json.dumps(listing, indent=2))
        return
    for method in listing["methods"]:
        print(f"{method['name']}: {method['summary']}")
        for label in ("paper", "allocation", "cost"):
            print(f"    {label:<11}{method[label]}")
        print(f"    {'options':<11}{_assignments(method['options']) or '-'}")
    print(
        f"{AUTO}: foresight where a scorer of the model is found, {AUTO_WITHOUT_SCORER} where none is, "
        f"{AUTO_UNDER_PRESSURE} under pressure"
    )
    print("\nallocations (any method takes any of them: METHOD:allocation=NAME)")
    for allocation in listing["allocations"]:
        print(f"    {allocation['usage']:<14}{allocation['summary']}")
        if allocation["options"]:
            print(f"    {'':<14}options {_assignments(allocation['options'])}")
    print(
        "\nformats (METHOD+FORMAT; attention_matching not auto, mixed_dim; with a budget fewer tokens stay)"
    )
    for format in listing["formats"]:
        print(f"    {format['name']:<14}{format['summary']}")
    print(f"\noptions of every method: {_assignments(listing['common_options'])}")
    print("    a prompt whose first compaction would free fewer than min_freed_tokens is left alone")


def _presets() -> dict[str, Method]:
    """Presets, and policies that user code has registered."""
    known = {preset.policy for preset in METHODS.values()}
    others = {name: KVCompressionConfig(name).preset for name in POLICIES if name not in known}
    return METHODS | others


def describe_methods() -> dict[str, Any]:
    """Methods, allocations, formats and common options as plain data."""
    return {
        "methods": [
            {
                "name": name,
                "summary": preset.summary,
                "allocation": preset.allocation,
                "paper": preset.paper,
                "cost": preset.cost,
                "options": _defaults(POLICIES[preset.policy]),
            }
            for name, preset in _presets().items()
        ],
        "allocations": [
            {
                "name": name,
                "usage": f"{name}:{cls.argument.upper()}" if cls.argument else name,
                "summary": (cls.__doc__ or "").splitlines()[0],
                "paper": cls.paper,
                "options": {key: value for key, value in _defaults(cls).items() if key != cls.argument},
            }
            for name, cls in ALLOCATIONS.items()
        ],
        "formats": [
            {
                "name": name,
                "summary": (type(format).__doc__ or "").splitlines()[0],
                "paper": format.paper,
                "bytes_of_32_tokens": {
                    size: [part.record_bytes(size) for part in format.parts] for size in (64, 128)
                },
            }
            for name, format in FORMATS.items()
        ],
        "common_options": {
            name: value
            for name, value in (_defaults(KVCompressionConfig) | {"budget": DEFAULT_BUDGET}).items()
            if name not in ("method", "allocation", "format", "options", "enabled")
        },
    }


def _defaults(cls: type) -> dict[str, Any]:
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    return {name: value.name if isinstance(value, Policy) else value for name, value in defaults.items()}


def _assignments(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={'none' if value is None else value}" for name, value in options.items())


if __name__ == "__main__":
    sys.exit(main())
