"""What every test shares: a core of its own, vLLM's environment, models, and long prompts of real prose."""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared_machine", deadline=None)  # the first example also pays for imports
settings.load_profile("shared_machine")

if _worker := os.environ.get("PYTEST_XDIST_WORKER"):  # one of several processes: "gw0", "gw1", ...
    _cores = sorted(os.sched_getaffinity(0))
    _core = _cores[int(_worker.removeprefix("gw")) % len(_cores)]
    # Its engines and every command that its tests start stay on this core.
    os.sched_setaffinity(0, {_core})
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND=str(_core), OMP_NUM_THREADS="1")

# Read by vLLM and its libraries when they are first imported, so set before any test module imports them.
# What the caller has set stays.
for _name, _value in {
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine and worker in the test's process, open to white-box tests
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

# What takes longest starts first, so that all processes end at about the same time; the rest comes in
# alphabetical order.
LONGEST = [
    "engine/test_runner_v2.py",
    "evaluation/test_commands.py",
    "serving/test_server.py",
    "serving/test_documented.py",
    "engine/test_oracle.py",
    "engine/test_parallel.py",
    "kernels/test_interpreted.py",
    "kernels/test_record_compilation.py",
    "kernels/test_float8_compilation.py",
    "kernels/test_kernel_compilation.py",
    "engine/test_families.py",
    "engine/test_hybrids.py",
    "engine/test_states.py",
    "engine/test_pressure.py",
    "engine/test_latents_parallel.py",
    "engine/test_hybrids_parallel.py",
    "engine/test_latents.py",
    "engine/test_formats.py",
    "engine/test_matching.py",
    "engine/test_compacted_prefixes.py",
    "engine/test_prefixes_beside.py",
    "engine/test_recompaction.py",
    "engine/test_randomised.py",
    "engine/test_repetition.py",
    "engine/test_check.py",
    "engine/test_features.py",
    "engine/test_images.py",
    "engine/test_drafts.py",
    "engine/test_blocks.py",
    "engine/test_invariants.py",
    "engine/test_speculation.py",
    "serving/test_flag.py",
    "attention/test_gpu_backend.py",
    "evaluation/test_engine.py",
]
GIB_PER_PROCESS = 5

NOVEL = Path(__file__).parents[1] / "examples" / "pride_and_prejudice.txt"

LongText = Callable[..., str]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per core that memory suffices for; 0, this process alone, for one core or one file."""
    if len(config.args) == 1 and not Path(config.args[0].partition("::")[0]).is_dir():
        return 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processes = min(len(os.sched_getaffinity(0)), int(memory / GIB_PER_PROCESS))
    return processes if processes > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    rank = {here / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(autouse=True)
def registered_policies():
    """What a test registers is gone after it: which test comes next in a process is nobody's choice."""
    from vllm_kvcompress.policies import POLICIES

    before = dict(POLICIES)
    yield
    POLICIES.clear()
    POLICIES.update(before)


@pytest.fixture(autouse=True)
def read_environment():
    """What a test sets in the environment is read: an engine before it has vLLM keep what was there."""
    if envs := sys.modules.get("vllm.envs"):
        envs.disable_envs_cache()


@pytest.fixture
def blocked(monkeypatch):
    """No prefix is written to its file before `set()`."""
    import threading

    from vllm_kvcompress.requests import saved

    go_on, write = threading.Event(), saved.write

    def waiting(*args):
        assert go_on.wait(60)
        return write(*args)

    monkeypatch.setattr(saved, "write", waiting)
    yield go_on
    go_on.set()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a bfloat16 Hugging Face checkpoint; made on the first use, some 40 s."""
    from vllm_kvcompress.models import smollm2

    return smollm2()


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def random_model(tokenizer, tmp_path_factory) -> Path:
    """A Llama with random weights and SmolLM2's tokenizer: 4 layers, 3 KV heads, groups of 2, head size 32.

    A step takes it a twentieth of SmolLM2's time. Its attention is far from uniform, and of another sharpness
    in every head of a layer, so that heads differ in what and how much they keep and it shows in the answer.
    A random scorer lies beside it.
    """
    import torch
    from drawn import draw_scorer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        initializer_range=0.15,
    )
    folder = tmp_path_factory.mktemp("models") / "random-llama"
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        sharpness = torch.tensor([0.3, 1.0, 2.0])[torch.randperm(3)]
        layer.self_attn.k_proj.weight.data *= sharpness.repeat_interleave(32)[:, None]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    draw_scorer(folder, config, 4, 3, 32)
    return folder


@pytest.fixture(scope="session")
def hybrids(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Random models some of whose layers slide a window over 128 tokens, with SmolLM2's tokenizer.

    Those like gpt-oss have sinks and those of Gemma 2 a cap of their logits; those of Llama 4 attend within
    chunks of 128 tokens. Of "mostly-full" and "padded" vLLM has the layers that attend to all tokens in
    several groups, of the latter unlike many.
    """
    import torch
    from drawn import draw_scorer
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        GptOssConfig,
        GptOssForCausalLM,
        Llama4ForCausalLM,
        Llama4TextConfig,
    )

    common = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        sliding_window=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )

    def like_gemma3(layer_types: list[str]) -> Gemma3ForCausalLM:
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **common,
                num_hidden_layers=len(layer_types),
                layer_types=layer_types,
                query_pre_attn_scalar=32,
                initializer_range=0.15,
            )
        )
        full = (layer for layer in model.model.layers if layer.self_attn.layer_type == "full_attention")
        for index, layer in enumerate(full):
            layer.self_attn.k_norm.weight.data.fill_(index % 2)
        return model

    sliding, attends = "sliding_attention", "full_attention"
    mostly_full = like_gemma3([attends, sliding, attends, attends, sliding, attends])
    padded = like_gemma3([attends, sliding, attends, attends, attends, sliding, attends])
    gemma3 = like_gemma3([sliding, sliding, attends] * 2)
    gpt_oss = GptOssForCausalLM(
        GptOssConfig(
            **common,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_local_experts=4,
            num_experts_per_tok=2,
            initializer_range=0.15,
        )
    )
    for layer in gpt_oss.model.layers:  # from a little to most of a softmax, in every query head another part
        layer.self_attn.k_proj.weight.data *= 0.4
        layer.self_attn.sinks.data = 6.0 + 4 * torch.rand(4)
    # Heads of full attention are twice as wide, so windows have twice the tokens in a block. Two layers
    # read the caches of others.
    gemma4 = Gemma4ForCausalLM(
        Gemma4TextConfig(
            **common,
            global_head_dim=64,
            num_hidden_layers=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2
            + ["sliding_attention", "full_attention"],
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=0,
            initializer_range=0.15,
        )
    )
    for layer, sharpness in zip(gemma4.model.layers[2::3], (0.3, 0.6), strict=False):
        layer.self_attn.k_norm.weight.data.fill_(sharpness)
    llama4 = Llama4ForCausalLM(
        Llama4TextConfig(
            **common,
            intermediate_size_mlp=128,
            num_hidden_layers=6,
            layer_types=["chunked_attention", "chunked_attention", "full_attention"] * 2,
            no_rope_layers=[1, 1, 0] * 2,
            attention_chunk_size=128,
            interleave_moe_layer_step=2,
            num_local_experts=4,
            num_experts_per_tok=1,
            tie_word_embeddings=True,
            initializer_range=0.15,
        )
    )
    gemma2 = Gemma2ForCausalLM(
        Gemma2Config(
            **common,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            query_pre_attn_scalar=32,
            attn_logit_softcapping=6.0,
            initializer_range=0.15,
        )
    )
    for layer in gemma2.model.layers:
        layer.self_attn.k_proj.weight.data *= torch.tensor([0.4, 1.0]).repeat_interleave(32)[:, None]
    made = {}
    models = {"gemma3": gemma3, "gemma4": gemma4, "gpt-oss": gpt_oss, "llama4": llama4}
    models |= {"mostly-full": mostly_full, "padded": padded, "gemma2": gemma2}
    for name, model in models.items():
        made[name] = tmp_path_factory.mktemp("models") / f"random-{name}"
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
        if name != "gemma4":  # a scorer's heads are alike
            draw_scorer(made[name], model.config, model.config.num_hidden_layers, 2, 32)
    return made


@pytest.fixture(scope="session")
def deepseek(tokenizer, tmp_path_factory) -> Path:
    """A DeepSeek-V2 with random weights and SmolLM2's tokenizer: 3 layers of 4 query heads over latents.

    Latents have as many channels as vLLM's CPU kernel reads.
    """
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=24,
        n_routed_experts=4,
        first_k_dense_replace=3,
        max_position_embeddings=8192,
        initializer_range=0.15,
    )
    folder = tmp_path_factory.mktemp("models") / "random-deepseek"
    DeepseekV2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stateful(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Random models four of whose six layers keep a state, with SmolLM2's tokenizer.

    Like LFM2, with a convolution so wide that its state is as large as 96 tokens of attention; like Granite
    4, of Mamba-2; like Qwen3-Next, of gated delta networks.
    """
    import torch
    from transformers import (
        GraniteMoeHybridConfig,
        GraniteMoeHybridForCausalLM,
        Lfm2Config,
        Lfm2ForCausalLM,
        Qwen3NextConfig,
        Qwen3NextForCausalLM,
    )

    common = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    lfm2 = Lfm2ForCausalLM(
        Lfm2Config(
            **common,
            layer_types=["conv", "conv", "full_attention"] * 2,
            conv_L_cache=70,
            conv_dim=128,
            block_dim=128,
            block_ff_dim=128,
            block_multiple_of=32,
            block_ffn_dim_multiplier=1.0,
            block_auto_adjust_ff_dim=False,
        )
    )
    granite = GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **common,
            layer_types=["mamba", "mamba", "attention"] * 2,
            position_embedding_type="rope",
            attention_multiplier=32**-0.5,
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=128,
            mamba_n_heads=8,
            mamba_d_head=32,
            mamba_d_state=32,
            mamba_n_groups=1,
            mamba_chunk_size=64,
        )
    )
    for layer, sharpness in zip(granite.model.layers[2::3], (0.3, 1.0), strict=True):
        layer.self_attn.k_proj.weight.data *= sharpness
    qwen3_next = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **common,
            layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
            head_dim=32,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        )
    )
    made = {}
    for name, model in {"lfm2": lfm2, "granite": granite, "qwen3-next": qwen3_next}.items():
        made[name] = tmp_path_factory.mktemp("models") / f"random-{name}"
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture(scope="session")
def long_ids(tokenizer) -> Callable[..., list[int]]:
    """`long_ids(num_tokens, seed=0)`: exactly that many token ids of real prose.

    The paragraphs of the novel's first chapters in an order that depends on the seed alone, so that two seeds
    share no prefix and one seed's shorter text is a prefix of its longer one. Past about 15,000 tokens the
    paragraphs come again, in another order.
    """
    paragraphs = NOVEL.read_text(encoding="utf-8").splitlines()
    encoded = [tokenizer.encode(text + "\n", add_special_tokens=False) for text in paragraphs]

    def make(num_tokens: int, seed: int = 0) -> list[int]:
        order, ids = random.Random(seed), []
        while len(ids) < num_tokens:
            for paragraph in order.sample(encoded, len(encoded)):
                ids += paragraph
        return ids[:num_tokens]

    return make


@pytest.fixture(scope="session")
def long_texts(tokenizer, long_ids) -> LongText:
    """`long_texts(num_tokens, seed=0)`: the same as a string of that many tokens."""

    def make(num_tokens: int, seed: int = 0) -> str:
        # A cut inside a word or before a line break may be tokenized differently when read back: then cut a
        # little earlier or later and fill up with one-token words.
        for cut in range(num_tokens, num_tokens - 16, -1):
            text = tokenizer.decode(long_ids(cut, seed)) + " the" * (num_tokens - cut)
            if len(tokenizer.encode(text, add_special_tokens=False)) == num_tokens:
                return text
        raise AssertionError(f"no cut of seed {seed} gives exactly {num_tokens} tokens")

    return make
