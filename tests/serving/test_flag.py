"""The command-line flag, through vLLM's own parser and argument classes; no engine is started."""

import json
import re

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.engine.input_processor import InputProcessor

from vllm_kvcompress import KVCompressionConfig
from vllm_kvcompress.plugin import KEY, configure, register


def parser_of_engine_args() -> FlexibleArgumentParser:
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm", usage="vllm [options]"))


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    return parser_of_engine_args()  # loads vLLM's general plugins, as every vLLM command does


@pytest.fixture
def engine_args(parser, tmp_path):
    """`engine_args(*flags)`: what vLLM makes of a command line."""
    return lambda *flags: AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(tmp_path), *flags]))


@pytest.fixture
def error_line(parser, capsys):
    """`error_line(*flags)`: the one line with which vLLM refuses a command line."""

    def refused(*flags: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(list(flags))
        assert stopped.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("usage:")]
        assert len(lines) == 1, lines
        return lines[0]

    return refused


# ---------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("flags", "meaning"),
    [
        (["--kv-compression", "snapkv:budget=0.125"], {"method": "snapkv", "budget": 0.125}),
        (["--kv-compression=snapkv:budget=0.125"], {"method": "snapkv", "budget": 0.125}),
        (["--kv_compression", "streaming_llm"], {"method": "streaming_llm"}),
        (
            ["--kv-compression", '{"method": "kv_compress", "budget": 0.5, "sink_tokens": 8}'],
            {"method": "kv_compress", "budget": 0.5, "sink_tokens": 8},
        ),
        (["--kv-compression.budget", "0.125"], {"budget": 0.125}),
        (["--kv_compression.sink_tokens=8"], {"sink_tokens": 8}),
        (
            ["--kv-compression.budget", "0.5", "--kv-compression.method", "kv_compress"],
            {"method": "kv_compress", "budget": 0.5},
        ),
        (
            ["--kv-compression", "snapkv:allocation=global,budget=0.5"],
            {"method": "snapkv", "allocation": "global", "budget": 0.5},
        ),
        (["--kv-compression", "off"], {"enabled": False}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_form_reaches_additional_config(engine_args, flags, meaning):
    value = engine_args(*flags).additional_config[KEY]
    assert value == KVCompressionConfig(**meaning).to_dict()
    json.dumps(value)  # vLLM hashes additional_config as JSON


def test_a_config_file_works_and_the_command_line_wins(engine_args, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("kv-compression:\n  method: kv_compress\n  budget: 0.5\n")
    value = engine_args("--config", str(file)).additional_config[KEY]
    assert (value["method"], value["budget"]) == ("kv_compress", 0.5)
    made = engine_args("--config", str(file), "--kv-compression", "snapkv:budget=0.125")
    value = made.additional_config[KEY]
    assert (value["method"], value["budget"]) == ("snapkv", 0.125)


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-compression", "kv_compress", "--kv-compression.budget", "0.25"],
        ["--kv-compression.budget", "0.25", "--kv-compression", "kv_compress"],
        ["--kv-compression", '{"method": "kv_compress"}', "--kv-compression.budget", "0.25"],
        ["--kv-compression", "kv_compress:window=8", "--kv-compression.method", "snapkv"],
    ],
    ids=" ".join,
)
def test_dotted_options_beside_another_form_are_refused(error_line, flags):
    # vLLM's parser lets the dotted part replace everything else: the method would be lost without a word.
    line = error_line(*flags)
    assert "argument --kv-compression: " in line and "in one form" in line


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--kv-compression", "snapkv:budget=7"], "budget"),
        (["--kv-compression", "snapkv:budget=often"], "budget"),
        (["--kv-compression.budget", "0"], "budget"),
        (["--kv-compression", "snapvk"], "did you mean 'snapkv'"),
        (["--kv-compression", "snapkv:budgte=0.5"], "did you mean 'budget'"),
        (["--kv-compression", "snapkv:budget"], "'budget' has no value"),
        (["--kv-compression", "snapkv:allocation=fair"], "allocation 'fair'"),
        (["--kv-compression", '{"method": "snapkv",}'], "not valid JSON"),
        (["--kv-compression", '{"method": 3}'], "method"),
        (["--kv-compression", '{"budget": [0.5]}'], "budget"),
        (["--kv-compression.window", "-1"], "window"),
        (["--kv-compression", ""], "method"),
        (["--kv-compression"], "expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_exits_with_one_line_that_names_the_option(error_line, flags, named):
    line = error_line(*flags)
    assert line.startswith("vllm: error: argument --kv-compression: ") and named in line


# ---------------------------------------------------------------------- what else is touched


def test_other_additional_config_is_kept(engine_args):
    made = engine_args("--additional-config", '{"other": [1, 2]}', "--kv-compression", "snapkv:budget=0.25")
    assert made.additional_config["other"] == [1, 2]
    assert made.additional_config[KEY]["budget"] == 0.25


def test_the_flag_changes_nothing_but_additional_config(engine_args):
    made, stock = engine_args("--kv-compression", "snapkv"), engine_args()
    made.additional_config.pop(KEY)
    assert made == stock


def test_another_process_that_reads_the_same_arguments_needs_no_shim(parser, tmp_path):
    """Of several API servers each begins with vLLM's own `from_cli_args`, during which plugins are loaded."""
    namespace = parser.parse_args(["--model", str(tmp_path), "--kv-compression", "snapkv:budget=0.3"])
    first = AsyncEngineArgs.from_cli_args(namespace)
    plain = EngineArgs.from_cli_args.__func__.__wrapped__(AsyncEngineArgs, namespace)
    assert plain.additional_config == first.additional_config
    assert plain.additional_config[KEY]["budget"] == 0.3


def test_without_the_flag_engine_args_are_what_vllm_alone_makes(engine_args, parser, tmp_path):
    namespace = parser.parse_args(["--model", str(tmp_path)])
    stock = EngineArgs.from_cli_args.__func__.__wrapped__(AsyncEngineArgs, namespace)
    assert engine_args() == stock
    assert stock.additional_config == {}


def test_without_the_flag_the_engine_configuration_is_stock(engine_args, smollm2):
    made = engine_args("--model", str(smollm2), "--max-model-len", "1024").create_engine_config()
    assert made.scheduler_config.scheduler_cls is None
    assert made.parallel_config.worker_cls.startswith("vllm.")
    assert made.additional_config == {}


@pytest.mark.parametrize(
    ("asynchronous", "scheduler"), [(False, "CompressionScheduler"), (True, "AsyncCompressionScheduler")]
)
def test_with_the_flag_the_engine_configuration_names_our_classes(
    engine_args, smollm2, asynchronous, scheduler
):
    made = engine_args("--model", str(smollm2), "--max-model-len", "1024").create_engine_config()
    made.scheduler_config.async_scheduling = asynchronous  # vLLM itself turns it off on CPU
    made.additional_config.update(engine_args("--kv-compression", "snapkv").additional_config)
    assert configure(made) is made
    assert made.scheduler_config.get_scheduler_cls().__name__ == scheduler
    worker = resolve_obj_by_qualname(made.parallel_config.worker_cls)
    assert worker.__module__.startswith("vllm_kvcompress.")


def test_the_flag_alone_configures_the_engine(engine_args, smollm2):
    made = engine_args("--model", str(smollm2), "--max-model-len", "1024", "--kv-compression", "snapkv")
    made = made.create_engine_config()
    assert made.scheduler_config.scheduler_cls.startswith("vllm_kvcompress.")
    assert made.parallel_config.worker_cls.startswith("vllm_kvcompress.")


def test_off_leaves_the_engine_configuration_stock(engine_args, smollm2):
    made = engine_args("--model", str(smollm2), "--max-model-len", "1024", "--kv-compression", "off")
    made = made.create_engine_config()
    assert made.scheduler_config.scheduler_cls is None
    assert made.parallel_config.worker_cls.startswith("vllm.")


def test_register_again_changes_nothing(parser):
    def touched():
        return (
            EngineArgs.add_cli_args,
            EngineArgs.from_cli_args.__func__,
            EngineArgs.create_engine_config,
            InputProcessor._validate_params,
        )

    before = touched()
    register()
    register()
    assert touched() == before
    again = parser_of_engine_args()  # a second flag of the same name would be an error here
    assert len([a for a in again._actions if "--kv-compression" in a.option_strings]) == 1


# ---------------------------------------------------------------------- help


@pytest.fixture
def serve_help(capsys, monkeypatch):
    """`serve_help(flag)`: what `vllm serve <flag>` prints."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", None)
    monkeypatch.setenv("COLUMNS", "200")

    def printed(flag: str) -> str:
        command = FlexibleArgumentParser(prog="vllm")
        ServeSubcommand().subparser_init(command.add_subparsers(dest="subparser"))
        with pytest.raises(SystemExit) as stopped:
            command.parse_args(["serve", flag])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return printed


def test_serve_help_lists_our_group_as_it_lists_its_own(serve_help):
    shown = serve_help("--help")
    for group in ("ModelConfig", "KVCompression"):  # vLLM's own, ours
        assert re.search(rf"^\s*{group} +\S.*$", shown, re.MULTILINE), shown


@pytest.mark.parametrize(
    "search", ["KVCompression", "kvcompression", "kv-compression", "kv_compression", "all"]
)
def test_serve_help_explains_the_flag(serve_help, search):
    shown = serve_help(f"--help={search}")
    flag = "".join(shown[shown.index("  --kv-compression ") :].split())  # however the terminal wraps it
    assert "snapkv:budget=0.25" in flag and "`vllm-kvcompressmethods`" in flag
