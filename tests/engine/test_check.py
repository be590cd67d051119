"""`vllm-kvcompress check` says what a started engine then does: what it compacts, how much its pool holds."""

import argparse
import json
import shlex
from dataclasses import dataclass, field

import pytest
from harness import BLOCK_SIZE, STATEFUL, Engine, sampling
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

from vllm_kvcompress.config import METHODS, KVCompressionError
from vllm_kvcompress.evaluation import check
from vllm_kvcompress.evaluation.weightless import EngineWithoutWeights

SNAPKV = {"method": "snapkv", "budget": 0.25, "min_freed_tokens": 1}
OUTPUT = 40
CONNECTOR = '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'


@dataclass(frozen=True)
class Case:
    """A fixture's model, or one of several, and a pool of so many blocks for prompts of so many tokens."""

    fixture: str
    name: str | None = None
    pool: int = 40
    prompt: int = 320
    compression: dict = field(default_factory=lambda: SNAPKV)
    options: dict = field(default_factory=dict)


CASES = {
    "full attention": Case("random_model"),
    "a format, again and again": Case(
        "random_model",
        pool=36,
        prompt=600,
        compression=SNAPKV | {"format": "kivi8", "recompact_every": 16},
        options={"block_size": 64},
    ),
    "streaming": Case(
        "random_model",
        pool=42,
        prompt=600,
        compression=SNAPKV | {"when": "streaming", "recompact_every": 128},
    ),
    "windows": Case("hybrids", "gemma3", pool=90),
    "chunks": Case("hybrids", "llama4", pool=90),
    "several groups": Case("hybrids", "padded", pool=150),
    "states": Case("stateful", "lfm2", prompt=600, options=STATEFUL["lfm2"]),
    "latents": Case("deepseek", pool=80, options={"block_size": 16}),
}


@pytest.fixture(autouse=True)
def nothing_kept():
    """vLLM keeps rotary embeddings for the next model of a process; those of `check` have no content."""
    yield
    _ROPE_DICT.clear()


def arguments(model, compression, options) -> list[str]:
    given = ["--model", str(model), "--kv-compression", json.dumps(compression)]
    for name, value in options.items():
        given += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    return given


def bytes_of(engine: Engine) -> int:
    """What the caches of all layers take, looked up where they are."""
    context = engine.worker.compilation_config.static_forward_context
    caches = [layer.kv_cache for layer in context.values() if hasattr(layer, "kv_cache")]
    tensors = [
        tensor for cache in caches for tensor in (cache if isinstance(cache, list | tuple) else [cache])
    ]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@dataclass
class Seen:
    """What an engine did with requests that came together.

    Attributes:
        at_once: how many ran at a time.
        peak: blocks that they held at most.
        held: blocks held when the first of them ended.
        preemptions: of them.
    """

    at_once: int = 0
    peak: int = 0
    held: int = 0
    preemptions: int = 0


def serve(engine: Engine, prompts, compression, output: int = OUTPUT) -> Seen:
    engine.forget_prefixes()
    engine.preemptions, seen, ended = 0, Seen(), len(engine.outputs)
    names = [engine.add(prompt, sampling(output, compression, logprobs=None)) for prompt in prompts]
    while engine.llm.llm_engine.has_unfinished_requests():
        held = len(engine.pool.blocks) - 1 - engine.free
        engine.step()
        if len(engine.outputs) > ended and not seen.held:
            seen.held = held
        seen.at_once = max(seen.at_once, len(engine.scheduler.running))
        seen.peak = max(seen.peak, held)
    assert all(len(engine.outputs.pop(name).outputs[0].token_ids) == output for name in names)
    seen.preemptions = engine.preemptions
    return seen


@pytest.mark.parametrize("name", CASES)
def test_figures_are_those_of_a_started_engine(name, request, engines, long_ids):
    case = CASES[name]
    model = request.getfixturevalue(case.fixture)
    model = model if case.name is None else model[case.name]
    options = dict(max_model_len=768, max_num_batched_tokens=512, block_size=BLOCK_SIZE, dtype="float32")
    options |= case.options
    engine = engines(model, json.dumps(case.compression), **options, num_gpu_blocks_override=case.pool)
    given = arguments(model, case.compression, options)
    found = EngineWithoutWeights(given, bytes_of(engine)).look(case.prompt, OUTPUT)
    assert found.blocks == engine.free == case.pool - 1
    layers = [layer.index for layer in engine.worker.compactor.layers]
    assert [group.layers for group in found.groups if group.becomes == "compacted"] == [layers]
    prompts = [long_ids(case.prompt, seed=index) for index in range(found.compressed.requests + 1)]
    for held, option in ((found.raw, "off"), (found.compressed, None)):
        assert held.blocks == serve(engine, prompts[:1], option).held
        assert held.tokens == held.requests * (case.prompt + OUTPUT)
        together = serve(engine, prompts[: held.requests], option)
        assert (together.at_once, together.preemptions) == (held.requests, 0)
        # Beside them another prompt would not fit; while it is computed it is raw, unless it streams.
        alone = serve(engine, prompts[:1], option, output=2)
        assert case.pool - 1 - together.held < alone.peak
    assert 1 <= found.raw.requests < found.compressed.requests


def looked_at(model, *vllm: str, as_json: bool = True, **changes) -> None:
    given = dict(
        model=str(model),
        kv_compression="snapkv:budget=0.25",
        memory=0.125,
        prompt_tokens=600,
        output_tokens=40,
        json=as_json,
        vllm=shlex.join(["--max-model-len", "1024", *vllm]),
    )
    check.run(argparse.Namespace(**given | changes))


def test_every_layer_and_every_method_is_accounted_for(hybrids, capsys):
    looked_at(hybrids["gemma4"])
    printed = capsys.readouterr().out
    found = json.loads(
        printed[printed.index("{\n") :]
    )  # behind what vLLM logs, which the command keeps quiet
    by_kind = {
        (group["becomes"], group["what"].partition(",")[0]): group["layers"] for group in found["groups"]
    }
    assert by_kind == {
        ("compacted", "full attention"): [2, 5],
        ("left", "a window of 128 tokens"): [0, 1, 3, 4],
        ("shared", "no cache of their own"): [6, 7],
    }
    told = {*found["refused"], *found["untold"]}
    assert not {*found["refused"]} & {*found["untold"]} and told < {*METHODS}
    assert "needs a scorer of this model" in found["refused"]["foresight"]
    assert {*found["untold"]} == {"criticalkv", "expected_attention"}


def test_it_is_said_in_words(deepseek, capsys):
    looked_at(deepseek, as_json=False)
    name = "random-deepseek (DeepseekV2ForCausalLM), snapkv:budget=0.25"
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index(name) :]
    assert lines[1] == "  compacted  layers 0-2: latents of 576 channels, blocks of 16 tokens"
    assert any(line.startswith("  refused    knorm: ") and "normalised latents" in line for line in lines)
    assert any(line.startswith("a pool of 0.125 GiB, ") for line in lines)


@pytest.mark.parametrize(
    ("vllm", "changes", "message"),
    [
        (["--block-size", "40"], {}, "does not support --block-size 40 on CPU; use a multiple of 32"),
        (
            ["--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'],
            {},
            "does not support the KV connector ExampleConnector, with which .*; remove --kv-tr",
        ),
        ([], {"kv_compression": "snapkw"}, "snapkw"),
        (["--blocksize", "40"], {}, r"unrecognized arguments: .*\(of `vllm serve`\)"),
        (["-tp", "2"], {}, "check looks at one worker"),
        ([], {"memory": 0.001}, "vLLM does not start so: "),
        ([], {"prompt_tokens": 1000}, r"1000 \+ 40 tokens exceed --max-model-len 1024; lower"),
    ],
)
def test_what_cannot_be_served_is_one_line(random_model, vllm, changes, message):
    with pytest.raises(KVCompressionError, match=message) as error:
        looked_at(random_model, *vllm, **changes)
    assert "\n" not in str(error.value)
