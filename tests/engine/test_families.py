"""Every kind of model that vLLM builds here: each method is served, or refused with one line.

Tiny models with random weights. What a family's layers do to positions is stated beside it, from its paper
and configuration, and compared with what the worker found by trying.
"""

import functools
import gc
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drawn import draw_scorer
from harness import BLOCK_SIZE, Engine, sampling, tokens
from vllm import LLM
from vllm.distributed import parallel_state
from vllm.envs import disable_envs_cache
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.model_loader import dummy_loader

from vllm_kvcompress import KVCompressionConfig, plugin
from vllm_kvcompress.config import METHODS, KVCompressionError
from vllm_kvcompress.evaluation.host import model_config
from vllm_kvcompress.paging.groups import block_size, blocks_beside
from vllm_kvcompress.support import LACKS

VOCABULARY = 256
LONGEST = 512
NEOX, PAIRWISE = True, False  # channel i rotated with i + R/2, or 2i with 2i + 1
NONE = (0, NEOX, 0)  # a layer without position embedding

NO_ROTARY = dict.fromkeys(
    ("expected_attention", "foresight"), "do not follow a one-dimensional rotary embedding"
)
NARROW_VALUES = {
    "criticalkv": "the output projection of .* cannot be used",
    **dict.fromkeys(
        ("foresight", "kivi", "turboquant", "mixed_dim_kv", "attention_matching"),
        "its layers have 4 KV heads of 32 channels, and its configuration says 4 of 16",
    ),
}
ROUNDED = dict.fromkeys(
    ("kivi", "turboquant", "mixed_dim_kv", "attention_matching"),
    "writes what --kv-cache-dtype fp8 has rounded; use one",
)
OF_LATENTS = {
    **dict.fromkeys(("expected_attention", "foresight"), r"share latents \(MLA\), which have no keys before"),
    "criticalkv": r"share latents \(MLA\), which are not its projection's values; use another method",
    "knorm": r"knorm cannot serve this model: its keys are normalised latents \(MLA\); use another method",
    **dict.fromkeys(
        ("kivi", "turboquant", "mixed_dim_kv", "attention_matching"),
        r"it caches latents \(MLA\), and formats are of keys and values; use another method",
    ),
}
LATENTS = dict(
    num_key_value_heads=4,
    kv_lora_rank=512,
    qk_nope_head_dim=16,
    qk_rope_head_dim=64,
    v_head_dim=24,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
)
NEEDS_PROFILE = {"mixed_dim_kv_h": "needs a head profile; write allocation=profile:PATH"}


@dataclass(frozen=True)
class Family:
    """A model.

    Attributes:
        config: of Hugging Face, on top of `COMMON`.
        rotary: of every layer that is compacted: rotated channels, pairing, first rotated channel; () if not
            by a rotation.
        refused: what is said to a request for a method; the others are served.
        options: of the engine.
    """

    config: dict
    rotary: tuple = ()
    refused: dict[str, str] = field(default_factory=dict)
    options: dict = field(default_factory=dict)


COMMON = dict(
    hidden_size=128,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=LONGEST,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=None,
)


def family(architecture, model_type, rotary=(), refused=None, options=None, **config) -> Family:
    config = {**COMMON, "architectures": [architecture], "model_type": model_type, **config}
    return Family(config, rotary, refused or {}, options or {})


FULL = ((32, NEOX, 0),) * 2
MAMBA2 = dict(
    mamba_n_heads=8,
    mamba_d_head=32,
    mamba_d_state=16,
    mamba_n_groups=1,
    mamba_d_conv=4,
    mamba_expand=2,
    mamba_chunk_size=64,
)
FP8_CACHE = dict(
    quant_method="compressed-tensors",
    format="float-quantized",
    config_groups={},
    kv_cache_scheme=dict(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False),
)
SERVED = {
    "llama": family("LlamaForCausalLM", "llama", FULL),
    "qwen2": family("Qwen2ForCausalLM", "qwen2", FULL),
    "qwen3": family("Qwen3ForCausalLM", "qwen3", FULL, head_dim=32),
    "mistral": family("MistralForCausalLM", "mistral", FULL, sliding_window=None),
    "phi3": family("Phi3ForCausalLM", "phi3", FULL, sliding_window=None),
    "phi3, long": family(
        "Phi3ForCausalLM",
        "phi3",
        FULL,
        sliding_window=None,
        original_max_position_embeddings=LONGEST // 2,
        rope_scaling=dict(type="longrope", short_factor=[1.0] * 16, long_factor=[1.0, 2.0] * 8),
    ),
    "llama, yarn": family(
        "LlamaForCausalLM",
        "llama",
        FULL,
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=LONGEST // 4),
    ),
    "gemma: one KV head of 256 channels": family(
        "GemmaForCausalLM", "gemma", ((256, NEOX, 0),) * 2, head_dim=256, num_key_value_heads=1
    ),
    "gemma2: soft cap, windows that nobody outgrows": family(
        "Gemma2ForCausalLM", "gemma2", FULL, sliding_window=LONGEST, query_pre_attn_scalar=32, head_dim=32
    ),
    "gemma3: another base in windows": family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        FULL,
        sliding_window=LONGEST,
        query_pre_attn_scalar=32,
        head_dim=32,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3: windows": family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        FULL[:1],
        sliding_window=64,
        query_pre_attn_scalar=32,
        head_dim=32,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma2: windows, soft cap": family(
        "Gemma2ForCausalLM",
        "gemma2",
        FULL[:1],
        sliding_window=64,
        query_pre_attn_scalar=32,
        head_dim=32,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "cohere2: windows, and full attention without position embedding": family(
        "Cohere2ForCausalLM",
        "cohere2",
        (NONE,) * 2,
        num_hidden_layers=8,
        sliding_window=64,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2,
    ),
    "olmo3: windows": family(
        "Olmo3ForCausalLM",
        "olmo3",
        FULL,
        num_hidden_layers=8,
        sliding_window=64,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2,
    ),
    "exaone4: windows, and full attention without position embedding": family(
        "Exaone4ForCausalLM",
        "exaone4",
        (NONE,),
        num_hidden_layers=4,
        sliding_window=64,
        sliding_window_pattern=4,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    ),
    "ministral: windows": family(
        "MistralForCausalLM",
        "mistral",
        FULL[:1],
        num_hidden_layers=4,
        sliding_window=64,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    ),
    "gemma3: more layers without a window, in three groups": family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        FULL[:1] * 3,
        num_hidden_layers=4,
        sliding_window=64,
        query_pre_attn_scalar=32,
        head_dim=32,
        layer_types=["full_attention"] * 3 + ["sliding_attention"],
    ),
    "gemma3n: windows, layers that read others' caches": family(
        "Gemma3nForCausalLM",
        "gemma3n_text",
        FULL[:1],
        num_hidden_layers=4,
        head_dim=32,
        intermediate_size=[64] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=64,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=VOCABULARY,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=16,
    ),
    "llama 4: chunks, and full attention without position embedding": family(
        "Llama4ForCausalLM",
        "llama4_text",
        (NONE,),
        num_hidden_layers=4,
        head_dim=32,
        intermediate_size_mlp=64,
        attention_chunk_size=64,
        no_rope_layers=[1, 1, 1, 0],
        layer_types=["chunked_attention"] * 3 + ["full_attention"],
        interleave_moe_layer_step=2,
        num_local_experts=4,
        num_experts_per_tok=1,
        use_qk_norm=True,
        attn_temperature_tuning=True,
        rope_scaling=None,
    ),
    "granite: sinks": family("GraniteForCausalLM", "granite", FULL, layer_types=["full_attention"] * 2),
    "gpt-oss: windows, sinks": family(
        "GptOssForCausalLM",
        "gpt_oss",
        FULL[:1],
        head_dim=32,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "gemma4: windows, wider heads of full attention in larger blocks, shared caches": family(
        "Gemma4ForCausalLM",
        "gemma4_text",
        ((64, NEOX, 0),),
        {"foresight": "its layers have 2 KV heads of 64 channels, and its configuration says 8 of 64"},
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        global_head_dim=64,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=0,
        sliding_window=64,
    ),
    "lfm2: convolutions with a state": family(
        "Lfm2ForCausalLM",
        "lfm2",
        FULL[:1],
        # vLLM's CPU kernel does not read what this model gives it, and leaves most tokens as they are. (An
        # embedding that it has made for another model before it would use again.)
        options=dict(compilation_config={"custom_ops": ["-rotary_embedding"]}),
        rope_theta=1e6,
        layer_types=["conv", "full_attention"],
        conv_L_cache=40,
        conv_dim=128,
        block_dim=128,
        block_ff_dim=64,
        block_multiple_of=32,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
    ),
    "granite 4: Mamba-2, and attention without position embedding": family(
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        (NONE,),
        options=dict(enable_prefix_caching=False),
        layer_types=["mamba", "attention"],
        position_embedding_type="nope",
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=64,
        **MAMBA2,
    ),
    "nemotron-h: Mamba-2, attention and MLPs in layers of their own": family(
        "NemotronHForCausalLM",
        "nemotron_h",
        (NONE,),
        options=dict(enable_prefix_caching=False),
        num_hidden_layers=3,
        layers_block_type=["mamba", "mlp", "attention"],
        head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=1,
        conv_kernel=4,
        chunk_size=64,
    ),
    "falcon-h1: Mamba-2 and attention side by side": family(
        "FalconH1ForCausalLM",
        "falcon_h1",
        FULL,
        options=dict(enable_prefix_caching=False),
        head_dim=32,
        mamba_d_ssm=256,
        **MAMBA2,
    ),
    "qwen3-next: gated delta networks, partial rotary": family(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        ((16, NEOX, 0),),
        options=dict(dtype="bfloat16"),  # vLLM's CPU kernel has no other
        layer_types=["linear_attention", "full_attention"],
        head_dim=64,
        partial_rotary_factor=0.25,
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "gpt-neox: partial rotary": family(
        "GPTNeoXForCausalLM", "gpt_neox", ((8, NEOX, 0),) * 2, rotary_pct=0.25
    ),
    "gpt-j: partial, pairwise": family(
        "GPTJForCausalLM",
        "gptj",
        ((8, PAIRWISE, 0),) * 2,
        {"foresight": "its layers have 4 KV heads of 32 channels, and its configuration says 2 of 32"},
        n_embd=128,
        n_layer=2,
        n_head=4,
        n_positions=LONGEST,
        rotary_dim=8,
        n_inner=64,
    ),
    "phi": family("PhiForCausalLM", "phi", ((16, NEOX, 0),) * 2, partial_rotary_factor=0.5),
    "stablelm": family("StableLmForCausalLM", "stablelm", ((8, NEOX, 0),) * 2, partial_rotary_factor=0.25),
    "glm4: partial, pairwise": family(
        "Glm4ForCausalLM", "glm4", ((16, PAIRWISE, 0),) * 2, partial_rotary_factor=0.5, head_dim=32
    ),
    "falcon": family(
        "FalconForCausalLM",
        "falcon",
        FULL,
        alibi=False,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        new_decoder_architecture=False,
    ),
    "cohere: pairwise": family("CohereForCausalLM", "cohere", ((32, PAIRWISE, 0),) * 2),
    "granite": family("GraniteForCausalLM", "granite", FULL),
    "starcoder2": family("Starcoder2ForCausalLM", "starcoder2", FULL),
    "nemotron": family("NemotronForCausalLM", "nemotron", FULL, partial_rotary_factor=1.0),
    "olmoe": family("OlmoeForCausalLM", "olmoe", FULL, num_experts=4, num_experts_per_tok=2),
    "olmo2: the model's own rotary": family("Olmo2ForCausalLM", "olmo2", FULL),
    "smollm3: a layer without position embedding": family(
        "SmolLM3ForCausalLM", "smollm3", ((32, NEOX, 0), NONE), no_rope_layers=[1, 0]
    ),
    "exaone4": family(
        "Exaone4ForCausalLM", "exaone4", FULL, sliding_window=None, layer_types=["full_attention"] * 2
    ),
    "minicpm3: the last channels are rotated, values narrower than keys": family(
        "MiniCPM3ForCausalLM",
        "minicpm3",
        ((16, NEOX, 16),) * 2,
        NARROW_VALUES,
        num_key_value_heads=4,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        q_lora_rank=32,
        kv_lora_rank=32,
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=128,
        hidden_act="silu",
        initializer_range=0.1,
        auto_map={},
    ),
    "deepseek v2: latents": family(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        refused=OF_LATENTS,
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        **LATENTS,
    ),
    "deepseek v3, kimi k2: latents of narrowed queries": family(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        refused=OF_LATENTS,
        q_lora_rank=48,
        n_group=2,
        topk_group=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        **LATENTS,
    ),
    "glm 4.7 flash: latents": family(
        "Glm4MoeLiteForCausalLM",
        "glm4_moe_lite",
        refused=OF_LATENTS,
        q_lora_rank=48,
        n_group=1,
        topk_group=1,
        topk_method="noaux_tc",
        norm_topk_prob=True,
        **LATENTS,
    ),
    "opt: learned positions": family(
        "OPTForCausalLM",
        "opt",
        refused=NO_ROTARY,
        ffn_dim=64,
        word_embed_proj_dim=128,
        do_layer_norm_before=True,
    ),
    "gpt2: learned positions": family(
        "GPT2LMHeadModel", "gpt2", refused=NO_ROTARY, n_embd=128, n_layer=2, n_head=4, n_positions=LONGEST
    ),
    "llama with adapters": family("LlamaForCausalLM", "llama", FULL, options=dict(enable_lora=True)),
    **(
        {"llama, fp8 cache": family("LlamaForCausalLM", "llama", FULL, ROUNDED, dict(kv_cache_dtype="fp8"))}
        if torch.cpu._is_avx512_supported()  # which vLLM's CPU kernel takes for it
        else {}
    ),
    "llama whose quantized cache is turned down": family(
        "LlamaForCausalLM",
        "llama",
        FULL,
        options=dict(dtype="bfloat16", kv_cache_dtype="bfloat16"),
        quantization_config=FP8_CACHE,
    ),
}

REFUSED = {
    "a checkpoint that quantizes the cache": (
        family("LlamaForCausalLM", "llama", quantization_config=FP8_CACHE, options=dict(dtype="bfloat16")),
        r"the quantized cache that the checkpoint asks for .*; use --kv-cache-dtype bfloat16$",
    ),
    "windows": (
        family("MistralForCausalLM", "mistral", sliding_window=LONGEST - 1),
        rf"sliding-window attention over fewer tokens \({LONGEST - 1}\).*; use --max-model-len {LONGEST - 1}",
    ),
    "windows of all layers, by their types": (
        family(
            "Gemma3ForCausalLM",
            "gemma3_text",
            sliding_window=128,
            query_pre_attn_scalar=32,
            head_dim=32,
            layer_types=["sliding_attention"] * 2,
        ),
        r"sliding-window attention over fewer tokens \(128\) than --max-model-len in every layer",
    ),
    "windows without vLLM's hybrid manager": (
        family(
            "Gemma3ForCausalLM",
            "gemma3_text",
            sliding_window=128,
            query_pre_attn_scalar=32,
            head_dim=32,
            layer_types=["sliding_attention", "full_attention"],
            options=dict(disable_hybrid_kv_cache_manager=True),
        ),
        "chunks or states in one cache group with full attention; remove --disable-hybrid-kv-cache-manager",
    ),
    "states without vLLM's hybrid manager": (
        family(
            "GraniteMoeHybridForCausalLM",
            "granitemoehybrid",
            layer_types=["mamba", "attention"],
            options=dict(disable_hybrid_kv_cache_manager=True),
            **MAMBA2,
        ),
        "chunks or states in one cache group with full attention; remove --disable-hybrid-kv-cache-manager",
    ),
    "drafts for a model that keeps states": (
        family(
            "GraniteMoeHybridForCausalLM",
            "granitemoehybrid",
            layer_types=["mamba", "attention"],
            options=dict(
                speculative_config=dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=4)
            ),
            **MAMBA2,
        ),
        "speculative decoding of a model that keeps states; remove --speculative-config",
    ),
    "deepseek v3.2: sparse latents": (
        family(
            "DeepseekV32ForCausalLM",
            "deepseek_v32",
            index_topk=128,
            index_n_heads=4,
            index_head_dim=128,
            q_lora_rank=48,
            **LATENTS,
        ),
        r"sparse multi-head latent attention \(MLA\), whose indexer chooses tokens .* \(DSA\); serve",
    ),
    "bloom": (
        family("BloomForCausalLM", "bloom", n_layer=2, n_head=4),
        "ALiBi; serve this model without --kv-compression",
    ),
    "falcon with alibi": (family("FalconForCausalLM", "falcon", alibi=True), "ALiBi; serve"),
}

PROMPT = [(7 * i * i + 3 * i) % (VOCABULARY - 8) + 4 for i in range(LONGEST // 2)]


def write(folder: Path, config: dict) -> Path:
    """A checkpoint's configuration and a tokenizer of bytes; the weights are vLLM's dummies."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts an engine for a family; weights large enough for attention to prefer some tokens."""
    usual = dummy_loader.initialize_single_dummy_weight
    monkeypatch.setattr(
        dummy_loader, "initialize_single_dummy_weight", functools.partial(usual, low=-0.3, high=0.3)
    )

    def started(family: Family, compression: str = "snapkv:budget=0.25,window=16", **options) -> LLM:
        options = {
            **dict(
                load_format="dummy",
                dtype="float32",
                enforce_eager=True,
                max_model_len=LONGEST,
                block_size=BLOCK_SIZE,
                num_gpu_blocks_override=640,  # room for all requests and a repetition, and for windows
                max_num_seqs=32,
                kv_cache_memory_bytes=1 << 26,
            ),
            **family.options,
            **options,
        }
        if parallel_state._EP is None:  # an engine before had no experts, for which ranks are grouped too
            parallel_state._EP = parallel_state._TP
        folder = write(tmp_path, family.config)
        model = model_config(str(folder))  # as vLLM reads it
        shape = model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size()
        draw_scorer(folder, model.hf_text_config, *shape)
        return LLM(
            str(folder),
            **KVCompressionConfig(min_freed_tokens=1).for_request(compression).engine_kwargs(),
            **options,
        )

    yield started
    gc.collect()


def rotation(layer) -> tuple:
    """What the worker found a layer to do to positions."""
    rotary = layer.rotary
    if not bool(rotary.cos_sin[:, rotary.cos_sin.shape[1] // 2 :].any()):
        return NONE
    return rotary.cos_sin.shape[1], rotary.is_neox, rotary.first


@pytest.mark.parametrize("name", SERVED)
def test_every_method_is_served_or_refused_with_one_line(name, start):
    family = SERVED[name]
    engine = Engine(start(family))
    layers = engine.worker.compactor.layers
    found = tuple(rotation(layer) for layer in layers if layer.rotary is not None)
    assert found == family.rotary, engine.worker.lacks
    served = []
    for method in METHODS:
        options = f"{method}:budget=0.5" + ",waits=true" * (method == "attention_matching")  # or it ends raw
        params = sampling(4, options, logprobs=None)
        if (reason := (family.refused | NEEDS_PROFILE).get(method)) is not None:
            with pytest.raises(VLLMValidationError, match=reason) as error:
                engine.add(PROMPT, params)
            assert "\n" not in str(error.value)
        else:
            served.append(engine.add(PROMPT, params, method))
    engine.finish()
    for request in served:
        assert len(engine.outputs[request].outputs[0].token_ids) == 4
        assert engine.compaction_of(request) is not None, request
    engine.check_nothing_left()


@pytest.mark.skipif("llama, fp8 cache" not in SERVED, reason="needs AVX-512")
def test_a_quantized_cache_is_stocks_own(start, tmp_path):
    engine = Engine(start(SERVED["llama, fp8 cache"]))
    stock = Engine(
        LLM(
            str(tmp_path),
            load_format="dummy",
            dtype="float32",
            enforce_eager=True,
            max_model_len=LONGEST,
            block_size=BLOCK_SIZE,
            num_gpu_blocks_override=160,
            kv_cache_dtype="fp8",
            kv_cache_memory_bytes=1 << 24,
        )
    )
    plain = tokens(stock.run(PROMPT, sampling(12, None)))
    assert tokens(engine.run(PROMPT, sampling(12, "off"))) == plain
    assert tokens(engine.run(PROMPT, sampling(12, "streaming_llm:budget=0.3"))) != plain
    assert len(engine.compactions) == 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_method_can_serve_is_refused_before_anything_is_loaded(name, start, monkeypatch):
    family, message = REFUSED[name]
    monkeypatch.setattr("vllm.v1.engine.llm_engine.LLMEngine.__init__", None)  # it does not get so far
    with pytest.raises(KVCompressionError, match=message) as error:
        start(family)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["expected_attention", "criticalkv:base=expected_attention"])
def test_the_engines_own_method_is_refused_at_start(method, start):
    with pytest.raises(
        KVCompressionError, match="cannot serve this model: the queries of .*; use another"
    ) as error:
        start(SERVED["gpt2: learned positions"], method)
    assert "\n" not in str(error.value)


@pytest.fixture
def own_process(monkeypatch):
    """Engines in a process of their own, as servers have them; nothing is compiled there either."""
    disable_envs_cache()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    yield
    disable_envs_cache()


MINICPM3 = SERVED["minicpm3: the last channels are rotated, values narrower than keys"]


def test_a_front_end_knows_what_the_workers_found(own_process, start):
    llm = start(MINICPM3)
    for method in ("criticalkv", "criticalkv:base=knorm"):
        with pytest.raises(VLLMValidationError, match=NARROW_VALUES["criticalkv"]):
            llm.generate({"prompt_token_ids": PROMPT}, sampling(4, method), use_tqdm=False)
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, sampling(4, "expected_attention"), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
    llm.llm_engine.engine_core.shutdown()


def test_a_front_end_knows_the_blocks_of_the_compacted_group(own_process, start):
    name = "gemma4: windows, wider heads of full attention in larger blocks, shared caches"
    llm = start(SERVED[name], "snapkv:budget=0.25,window=16,when=streaming,recompact_every=64")
    config = llm.llm_engine.vllm_config
    # Full attention has half the channels of windows. Those hold 64 tokens, and a step's, at most.
    assert config.cache_config.block_size == BLOCK_SIZE and block_size(config) == 2 * BLOCK_SIZE
    beside = -(-min(64 + config.max_in_flight_tokens, LONGEST) // BLOCK_SIZE)
    assert beside <= blocks_beside(config) <= beside + 1
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, sampling(4, None), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
    llm.llm_engine.engine_core.shutdown()


def test_a_front_end_refuses_the_engines_own_method(own_process, start):
    with pytest.raises(
        KVCompressionError, match="criticalkv cannot serve this model: .*; use another"
    ) as error:
        start(MINICPM3, "criticalkv")
    assert "\n" not in str(error.value)


def test_what_one_rank_lacks_the_model_lacks():
    config = SimpleNamespace(additional_config={"kv_compression": "snapkv"})
    plugin._note_lacks(config, {})
    assert config.additional_config[LACKS] == {}
    for lacks in ({"needs_rotary": "first"}, {"needs_rotary": "second", "needs_output_projection": "third"}):
        plugin._note_lacks(config, lacks)
    assert config.additional_config[LACKS] == {"needs_rotary": "first", "needs_output_projection": "third"}


@pytest.fixture
def embedding(start):
    """An engine that takes prompt embeddings, and a prompt of them, all or every other one."""
    engine = Engine(start(SERVED["llama"], enable_prompt_embeds=True))
    embeds = torch.randn(len(PROMPT), 128, generator=torch.Generator().manual_seed(0))
    given = [index % 2 == 0 for index in range(len(PROMPT))]
    ids = [token if known else VOCABULARY * 2 for token, known in zip(PROMPT, given, strict=True)]
    mixed = {"prompt_embeds": embeds, "prompt_token_ids": ids, "prompt_is_token_ids": given}
    return engine, {"embeddings alone": {"prompt_embeds": embeds}, "mixed": mixed}


def test_a_prompt_that_is_not_text_is_not_repeated_but_compacted_by_other_methods(embedding):
    engine, prompts = embedding
    for name, prompt in prompts.items():
        for method in ("kvzip", "attention_matching", "attention_matching:queries=self-study"):
            with pytest.raises(
                VLLMValidationError, match="repeats the prompt, which must be text; use another"
            ):
                engine.llm.llm_engine.add_request(f"{method} {name}", prompt, sampling(4, method))
        for method in ("snapkv", "h2o"):
            engine.llm.llm_engine.add_request(f"{method} {name}", prompt, sampling(4, method, logprobs=None))
    engine.finish()
    for request in (f"{method} {name}" for method in ("snapkv", "h2o") for name in prompts):
        assert len(engine.outputs[request].outputs[0].token_ids) == 4
        assert engine.compaction_of(request) is not None
    engine.check_nothing_left()
