"""What requests ask for beside compression: adapters, embeddings, grammars, log-probabilities, samples.

One engine of each kind of model with all of it, so that they meet in its batches. Oracles: the adapter merged
into the weights, the tokens whose embeddings were given, the stock engine, the same request by itself.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from harness import STATEFUL, Engine, chosen_logprobs, exact, first_difference, same_kept, sampling, tokens
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

RANK, ALPHA = 4, 8
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")
OPTIONS = dict(
    enable_lora=True,
    max_loras=3,  # one more than there are: vLLM's CPU build takes no adapter for the one in the last place
    max_lora_rank=8,
    enable_prompt_embeds=True,
    max_num_batched_tokens=2048,  # vLLM's CPU build fails on a seed where a prompt is computed in parts
)
METHODS = ["snapkv:budget=0.25", "h2o:budget=0.3", "kvzip:budget=0.3,chunk=128", "kivi:budget=0.2"]
ADAPTERS = ("one", "other")
KINDS = {"full": {}, "gemma3": {}, "lfm2": STATEFUL["lfm2"]}  # windows, states beside full attention


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


def of_kinds(name: str, values, of_others: int):
    """Parameters of a test: all values for full attention, the first ones for the other kinds."""
    full, *others = KINDS
    own = [(full, value) for value in values]
    own += [(kind, value) for kind in others for value in values[:of_others]]
    return pytest.mark.parametrize(("kind", name), own, indirect=["kind"], scope="module")


@pytest.fixture(scope="module")
def model(kind, random_model, hybrids, stateful) -> Path:
    return ({"full": random_model} | hybrids | stateful)[kind]


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> dict[str, tuple[LoRARequest, Path]]:
    """By name: an adapter, and the checkpoint that it is merged into."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = {}
    for number, name in enumerate(ADAPTERS, 1):
        generator = torch.Generator().manual_seed(number)
        merged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        weights = {}
        for place, module in merged.named_modules():
            if ".self_attn." in place and place.endswith(PROJECTIONS):
                weight = module.weight
                down = torch.randn(RANK, weight.shape[1], generator=generator) * 0.1
                up = torch.randn(weight.shape[0], RANK, generator=generator) * 0.1
                weight.data += ALPHA / RANK * up @ down
                own = f"base_model.model.{place}"
                weights |= {f"{own}.lora_A.weight": down, f"{own}.lora_B.weight": up}
        folder = tmp_path_factory.mktemp("adapters") / name
        folder.mkdir()
        save_file(weights, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(
            json.dumps(
                dict(peft_type="LORA", r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS, bias="none")
            )
        )
        path = tmp_path_factory.mktemp("models") / f"merged-{name}"
        merged.save_pretrained(path)
        AutoTokenizer.from_pretrained(model).save_pretrained(path)
        made[name] = LoRARequest(name, number, str(folder)), path
    return made


@pytest.fixture(scope="module")
def shared(engines, model, kind) -> Engine:
    return engines(model, "snapkv:budget=0.25", **KINDS[kind] | OPTIONS)


@pytest.fixture
def engine(shared):
    """With an empty prefix cache; afterwards nothing may be left in it."""
    shared.forget_prefixes()
    shared.compactions.clear(), shared.outputs.clear()
    free = shared.free
    yield shared
    shared.check_nothing_left()
    assert shared.free == free


def ask(engine: Engine, name: str, prompt, params, adapter: LoRARequest | None = None) -> str:
    given = {"prompt_token_ids": prompt} if isinstance(prompt, list) else {"prompt_embeds": prompt}
    engine.llm.llm_engine.add_request(name, given, params, lora_request=adapter)
    return name


def alone(engine: Engine, prompt, params, adapter: LoRARequest | None = None):
    """A request's answer and its compaction, by itself on an empty prefix cache."""
    engine.forget_prefixes()
    engine.compactions.clear()
    name = ask(engine, "alone", prompt, params, adapter)
    engine.finish()
    return engine.outputs.pop(name), engine.compaction_of(name)


def same_answer(one, other) -> bool:
    """Whether greedy answers are the same; the model like Gemma 3 says one word, whatever it reads.

    Two float32 models may write a number that lies between two codes either way.
    """
    return first_difference(one, other) is None and chosen_logprobs(one) == pytest.approx(
        chosen_logprobs(other), abs=2e-2
    )


# ---------------------------------------------------------------------- adapters


@of_kinds("name", ADAPTERS, of_others=1)
def test_with_an_adapter_is_kept_what_is_kept_with_it_merged(engine, engines, adapters, kind, name, long_ids):
    adapter, merged_model = adapters[name]
    merged = engines(merged_model, "snapkv:budget=0.25", **KINDS[kind])
    prompt = long_ids(500, seed=3)
    plain, without = alone(engine, prompt, sampling(16))
    for method in METHODS:
        expected, kept = alone(merged, prompt, sampling(16, method))
        answer, own = alone(engine, prompt, sampling(16, method), adapter)
        assert same_kept(own, kept), method
        assert same_answer(answer, expected), method
        if method == METHODS[0]:
            assert not same_kept(own, without) and exact(answer) != exact(plain)


def test_a_batch_of_adapters_and_none_is_as_each_alone(engine, adapters, long_ids):
    asked = {}
    for index, name in enumerate((None, *ADAPTERS)):
        for method in METHODS:
            adapter = None if name is None else adapters[name][0]
            asked[f"{name} {method}"] = long_ids(400 + 10 * index, seed=4), sampling(16, method), adapter
    expected = {name: alone(engine, *request) for name, request in asked.items()}
    engine.forget_prefixes()
    engine.compactions.clear()
    for name, request in asked.items():
        ask(engine, name, *request)
    engine.finish()
    for name, (answer, kept) in expected.items():
        assert same_kept(engine.compaction_of(name), kept), name
        assert same_answer(engine.outputs.pop(name), answer), name


def test_a_cached_prefix_is_of_its_adapter(engine, adapters, long_ids):
    prompt, params = long_ids(500, seed=5), sampling(12)
    expected = {name: alone(engine, prompt, params, adapters[name][0]) for name in ADAPTERS}
    engine.forget_prefixes()
    cached = {}
    for turn in range(2):
        for name in ADAPTERS:
            request = ask(engine, f"{name} {turn}", prompt, params, adapters[name][0])
            engine.finish()
            answer, kept = engine.outputs.pop(request), expected[name]
            cached[request] = answer.num_cached_tokens
            assert same_kept(engine.compaction_of(request), kept[1])
            assert same_answer(answer, kept[0])
    size = engine.manager.block_size
    hit = (500 - 32) // size * size  # but for the window, whose queries score
    assert cached == {"one 0": 0, "other 0": 0, "one 1": hit, "other 1": hit}


# ---------------------------------------------------------------------- embeddings


@of_kinds("method", ["snapkv:budget=0.25", "h2o:budget=0.3", "kivi:budget=0.2"], of_others=1)
def test_embeddings_of_tokens_are_those_tokens(engine, model, adapters, long_ids, method):
    from transformers import AutoModelForCausalLM

    prompt, params = long_ids(420, seed=6), sampling(16, method)
    table = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).get_input_embeddings()
    embeds = table(torch.tensor(prompt)).detach()
    for adapter in (None, adapters["one"][0]):
        expected, kept = alone(engine, prompt, params, adapter)
        answer, own = alone(engine, embeds, params, adapter)
        assert same_kept(own, kept) and same_answer(answer, expected)


# ---------------------------------------------------------------------- grammars

YEAR = r"(19|20)[0-9]{2}(, (19|20)[0-9]{2}){8}"


@of_kinds("method", ["snapkv:budget=0.25,recompact_every=8", *METHODS], of_others=1)
def test_a_grammar_holds_across_compactions(engine, long_ids, method):
    prompt = long_ids(420, seed=7)
    grammar = dict(structured_outputs=StructuredOutputsParams(regex=YEAR), ignore_eos=False)
    free, _ = alone(engine, prompt, sampling(60, method))
    answer, kept = alone(engine, prompt, sampling(60, method, **grammar))
    assert kept is not None
    assert re.fullmatch(YEAR, answer.outputs[0].text)
    assert not re.match(YEAR, free.outputs[0].text)
    # Beside one that is free, both are as they were.
    engine.forget_prefixes()
    (
        ask(engine, "bound", prompt, sampling(60, method, **grammar)),
        ask(engine, "free", prompt, sampling(60, method)),
    )
    engine.finish()
    assert tokens(engine.outputs.pop("bound")) == tokens(answer)
    assert same_answer(engine.outputs.pop("free"), free)


# ---------------------------------------------------------------------- log-probabilities and samples


def test_log_probabilities_of_a_prompt_are_stocks(engine, engines, model, kind, long_ids):
    stock, prompt = engines(model, **KINDS[kind]), long_ids(420, seed=8)
    params = sampling(12, prompt_logprobs=2)
    expected, got = stock.run_fresh(prompt, params), engine.run_fresh(prompt, params)
    assert engine.compactions
    assert len(got.prompt_logprobs) == len(prompt) and got.prompt_logprobs[0] is None
    for one, other in zip(got.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert one.keys() == other.keys()
        assert all(abs(one[token].logprob - other[token].logprob) < 1e-4 for token in one)


@of_kinds("method", METHODS, of_others=2)
def test_samples_of_a_request_are_each_as_by_itself(engine, kind, long_ids, method):
    prompt = long_ids(420, seed=9)
    drawn = dict(temperature=1.0, top_p=0.9, seed=5)
    if kind == "lfm2":  # with states prompts are computed in parts; the likeliest token alone to sample from
        drawn = dict(temperature=1.0, top_k=1)
    name = ask(engine, "all", prompt, sampling(16, method, n=3, **drawn))
    engine.finish()
    together, kept = engine.outputs.pop(name), list(engine.compactions)
    assert len(kept) == 3 and all(same_kept(one, kept[0]) for one in kept)
    assert len({tuple(tokens(together, sample)) for sample in range(3)}) == (3 if "seed" in drawn else 1)
    for sample in range(3):
        if "seed" in drawn:  # vLLM gives each sample the next seed
            drawn["seed"] = 5 + sample
        answer, own = alone(engine, prompt, sampling(16, method, **drawn))
        assert same_kept(own, kept[sample])
        assert tokens(answer) == tokens(together, sample)


# ---------------------------------------------------------------------- quantized weights

GROUP = 32  # input channels that share a scale


def quantized(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight `[out, in]` in 4 bits as GPTQ stores it, and what that stands for."""
    groups = weight.T.unflatten(0, (-1, GROUP))  # [groups, GROUP, out]
    scales = (groups.abs().amax(1, keepdim=True) / 7).bfloat16().float()
    codes = (groups / scales).round().clamp(-8, 7)
    plain = (codes * scales).flatten(0, 1).T
    nibbles = (codes + 8).to(torch.int64).flatten(0, 1).unflatten(0, (-1, 8))  # [in / 8, 8, out]
    shifts = torch.arange(0, 32, 4)[:, None]
    packed = (nibbles << shifts).sum(1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    zeros = torch.full((len(groups), weight.shape[0] // 8), 0x77777777, dtype=torch.int32)
    order = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    return dict(qweight=packed, qzeros=zeros, scales=scales[:, 0].bfloat16(), g_idx=order), plain


@pytest.fixture(scope="module")
def in_four_bits(random_model, tmp_path_factory) -> tuple[Path, Path]:
    """The random model with weights of 4 bits, and one with the numbers that these stand for."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    content = {}
    for name, parameter in model.named_parameters():
        if "_proj." not in name:
            parameter.data = parameter.data.bfloat16().float()
            content[name] = parameter.data.bfloat16()
            continue
        parts, plain = quantized(parameter.data)
        content |= {name.replace("weight", part): value.contiguous() for part, value in parts.items()}
        parameter.data = plain.contiguous()
    folders = [tmp_path_factory.mktemp("models") / name for name in ("four-bits", "plain")]
    for folder in folders:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(random_model).save_pretrained(folder)
    config = json.loads((folders[0] / "config.json").read_text())
    config["quantization_config"] = dict(
        quant_method="gptq", bits=4, group_size=GROUP, desc_act=False, sym=True, lm_head=False
    )
    (folders[0] / "config.json").write_text(json.dumps(config))
    save_file(content, folders[0] / "model.safetensors", metadata={"format": "pt"})
    return folders[0], folders[1]


def test_over_quantized_weights_is_kept_what_is_kept_over_the_numbers_they_stand_for(
    engines, in_four_bits, long_ids
):
    packed, plain = (engines(model, "snapkv:budget=0.25", dtype="bfloat16") for model in in_four_bits)
    assert "qweight" in {name.rpartition(".")[2] for name, _ in packed.worker.get_model().named_parameters()}
    prompt = long_ids(480, seed=10)
    for method in [*METHODS, "criticalkv:budget=0.25"]:
        expected, kept = alone(plain, prompt, sampling(12, method))
        answer, own = alone(packed, prompt, sampling(12, method))
        assert (own.counts - kept.counts).abs().sum() <= kept.counts.sum() / 20, method
        exchanged = total = 0  # both round to bfloat16, otherwise
        for mine, its in zip(own.positions(), kept.positions(), strict=True):
            for one, other in zip(mine, its, strict=True):
                exchanged, total = exchanged + len({*one} - {*other}), total + len(one)
        assert exchanged < total / 20, method
        first_difference(answer, expected, gap=0.2)
    packed.check_nothing_left()
