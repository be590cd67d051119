"""Wrong values of the measuring commands' options: one line, before anything is loaded or started."""

import pytest

from vllm_kvcompress import cli

POSITIVE = {
    "eval": ["repetitions", "kl-tokens", "limit", "block-size", "lengths"],
    "bench": [
        "batch", "rounds", "steps", "prompt", "short", "output-tokens", "requests", "server-rounds",
        "long-output", "long-prompt", "block-size", "contexts", "keys", "room", "talks", "turns",
        "begun", "said",
    ],
    "inspect": ["tokens", "block-size"],
    "calibrate": ["documents", "tokens", "continuation", "batch", "scorer-documents", "width", "epochs"],
}  # fmt: skip
UNBOUNDED = {"seed"}


@pytest.fixture
def refused(capsys):
    """`refused(command, *options)`: the one line with which a command is refused; nothing may be started."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert not printed.out and line.startswith("error: ")
        return line

    return run


def parsed(monkeypatch, *command: str) -> dict:
    """What a command makes of its options."""
    seen = {}

    def keep(arguments) -> None:
        seen.update(vars(arguments))

    monkeypatch.setattr(cli, "_in_engine_environment", lambda run: keep)
    cli.main(command)
    return seen


@pytest.mark.parametrize("given", ["0", "-3", "many", "1.5", ""])
@pytest.mark.parametrize(("command", "option"), [(c, o) for c, names in POSITIVE.items() for o in names])
def test_numbers_that_cannot_be_measured_are_refused(refused, command, option, given):
    line = refused(command, f"--{option}={given}")
    assert f"--{option}: must be" in line


@pytest.mark.parametrize("command", POSITIVE)
def test_every_numeric_option_is_among_the_tested(command, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        cli, "_in_engine_environment", lambda run: lambda arguments: seen.update(vars(arguments))
    )
    cli.main([command])
    numeric = {
        name.replace("_", "-")
        for name, value in seen.items()
        if type(value) is int or (isinstance(value, list) and all(type(v) is int for v in value))
    }
    assert numeric - UNBOUNDED == set(POSITIVE[command])


@pytest.mark.parametrize("given", ["", "0", "-0.5", "1.5", "0.5,", "nan", "half"])
def test_budgets_that_are_no_fractions_are_refused(refused, given):
    assert "--budgets: must be" in refused("eval", f"--budgets={given}")


@pytest.mark.parametrize("given", ["", "0", "-1", "0.5,", "nan", "inf", "fast"])
def test_rates_that_are_none_are_refused(refused, given):
    assert "--rates: must be" in refused("bench", f"--rates={given}")


def test_rates_ascend(monkeypatch):
    assert parsed(monkeypatch, "bench", "--rates", "2,0.5,2")["rates"] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("command", "option"), [("eval", "text"), ("inspect", "prompt"), ("calibrate", "data")]
)
def test_texts_that_cannot_be_read_are_refused(refused, tmp_path, command, option):
    binary, empty = tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.write_text(" \n")
    for path, why in (
        (tmp_path / "absent", "No such file"),
        (tmp_path, "Is a directory"),
        (binary, "not text"),
        (empty, "is empty"),
    ):
        line = refused(command, f"--{option}", str(path))
        assert f"--{option}: " in line and why in line


def test_a_folder_of_data_must_be_there(refused, tmp_path):
    assert "there is no folder" in refused("eval", "--data", str(tmp_path / "absent"))


@pytest.mark.parametrize("command", POSITIVE)
def test_a_place_for_results_that_is_a_file_is_refused(refused, tmp_path, command):
    (tmp_path / "file").touch()
    assert "cannot make the folder" in refused(command, "--output", str(tmp_path / "file"))
    assert "cannot make the folder" in refused(command, "--output", str(tmp_path / "file" / "below"))


def test_repeated_numbers_are_measured_once(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        cli, "_in_engine_environment", lambda run: lambda arguments: seen.update(vars(arguments))
    )
    cli.main(["bench", "--contexts", "512,256,512"])
    assert seen["contexts"] == [512, 256]


# ---------------------------------------------------------------------- what only the model shows


@pytest.fixture
def said(smollm2, monkeypatch, capsys, tmp_path):
    """`said(command, *options)`: the one line with which a command ends before any engine starts."""
    from vllm_kvcompress.evaluation import engine
    from vllm_kvcompress.evaluation.speed import held, served, stepped

    def no_engine(*_, **__):
        pytest.fail("an engine was started")

    monkeypatch.setattr(cli, "_in_engine_environment", lambda run: run)
    monkeypatch.setattr(engine, "Engine", no_engine)
    monkeypatch.setattr(stepped, "_engines", no_engine)
    monkeypatch.setattr(served, "Server", no_engine)
    monkeypatch.setattr(held, "LLM", no_engine, raising=False)

    def run(command: str, *options: str) -> str:
        assert cli.main([command, str(smollm2), *options, "--output", str(tmp_path / "results")]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["eval", "--tasks", ""], "--tasks names none"),
        (["eval", "--tasks", ","], "--tasks names none"),
        (["eval", "--lengths", "16"], "no room for its facts"),
        (["eval", "--lengths", "16000", "--repetitions", "1"], "nothing remains: lower --lengths"),
        (["eval", "--baselines", "fp9"], "fp9"),
        (["bench", "--parts", ""], "--parts takes"),
        (["bench", "--contexts", "64"], "leaves a prompt of 64 tokens as it is"),
        (["bench", "--contexts", "9000"], "the model has 8192"),
        (["bench", "--parts", "serve", "--prompt", "9000"], "the model has 8192"),
        (["bench", "--parts", "rates", "--prompt", "9000"], "the model has 8192"),
        (["bench", "--parts", "serve", "--short", "200", "--prompt", "100"], "exceeds --prompt 100"),
        (["bench", "--parts", "blocks", "--long-output", "9000"], "the model has 8192"),
        (["bench", "--parts", "blocks", "--long-prompt", "700"], "use at least 2592"),
        (["inspect", "--tokens", "9000"], "exceed the model's context of 8192"),
        (["inspect", "--tokens", "60"], "no room for its facts"),
        (["inspect", "--compression", "adakv:budget=1"], "as it is"),
        (["calibrate", "--tokens", "16"], "no room for its facts"),
        (["calibrate", "--fractions", ""], "not a comma-separated list"),
        (["calibrate", "--budgets", "0,0.5"], "between 0 and 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_model_cannot_do_is_one_line_before_an_engine_starts(said, arguments, named):
    assert named in said(*arguments)


def test_the_least_long_prompt_is_enough(smollm2):
    from vllm_kvcompress.evaluation.speed import held

    seen = {"long_prompt": 2592, "long_output": 24, "block_size": 32, "compression": "snapkv:budget=0.25"}
    held.check_pool(type("Arguments", (), seen))


@pytest.mark.parametrize("given", ["", "before", "inside,before", "inside;after"])
def test_modes_that_there_are_not_are_refused(refused, given):
    assert refused("eval", f"--modes={given}").endswith(f"must be of inside, after, got {given!r}")


@pytest.mark.parametrize(
    ("given", "modes"), [((), ["inside", "after"]), (("--modes=after,after",), ["after"])]
)
def test_questions_are_asked_in_the_modes_that_are_given(monkeypatch, given, modes):
    assert parsed(monkeypatch, "eval", *given)["modes"] == modes
