"""`vllm-kvcompress methods` lists what can be asked for."""

import json

import pytest

from vllm_kvcompress.allocation import ALLOCATIONS
from vllm_kvcompress.cli import describe_methods, main
from vllm_kvcompress.config import METHODS


def test_methods_lists_options_paper_and_cost(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for name in (*METHODS, *ALLOCATIONS):
        assert name in text
    assert "arXiv 2404.14469" in text and "kernel_size=7" in text and "cost" in text
    assert "min_freed_tokens=256" in text and "fewer than min_freed_tokens is left alone" in text


def test_methods_as_json_can_be_parsed(capsys):
    main(["methods", "--json"])
    listing = json.loads(capsys.readouterr().out)
    names = [method["name"] for method in listing["methods"]]
    assert names[: len(METHODS)] == list(METHODS)  # then those that user code may have registered
    assert listing["common_options"]["budget"] == 0.25


def test_policies_of_user_code_are_methods_too(monkeypatch, capsys):
    from vllm_kvcompress.policies import POLICIES
    from vllm_kvcompress.policies.knorm import Knorm

    monkeypatch.setitem(POLICIES, "mine", type("Mine", (Knorm,), {"name": "mine", "paper": "none"}))
    assert main(["methods"]) == 0
    assert "mine: " in capsys.readouterr().out
    names = [method["name"] for method in describe_methods()["methods"]]
    assert len(names) == len({*names}) and "mine" in names


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate"])
    assert "invalid choice" in capsys.readouterr().err
