"""Images in the context, and rotary embeddings of three dimensions: as `test_oracle.py` has it of text alone.

A random PaddleOCR-VL, with transformers' image processor: an image is 80 tokens of a prompt.
"""

import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import BLOCK_SIZE, NUM_BLOCKS, ROTATES, WINDOW, Engine, same_kept, sampling, tokens
from PIL import Image
from test_oracle import (  # noqa: F401  (tests, which run here with the fixture below)
    ATTENTION,
    CASES,
    NUM_TOKENS,
    Case,
    Prompt,
    eager_attention,
    scores_of,
    selecting_scores,
    test_kept_tokens_are_the_best_of_each_head,
    test_logits_after_compaction_are_those_of_attention_over_the_kept_tokens,
    test_page_counts_are_those_of_the_allocation,
    test_the_oracle_tells_compacted_from_full_attention,
)
from transformers import AttentionInterface
from vllm.exceptions import VLLMValidationError

IMAGE, IMAGE_TOKENS = (280, 224), 80  # pixels, and patches of 28 by 28
BEGIN, PLACE, END = "<reponame>", "<file_sep>", "<gh_stars>"  # of SmolLM2's tokens


@pytest.fixture(scope="module")
def pictured(smollm2, tmp_path_factory) -> Path:
    """A checkpoint with an image processor that needs Pillow alone."""
    from transformers import (
        AutoTokenizer,
        PaddleOCRVLConfig,
        PaddleOCRVLForConditionalGeneration,
        PaddleOCRVLProcessor,
    )
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import (
        PaddleOCRVLImageProcessorPil,
    )

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(smollm2, extra_special_tokens={"image_token": PLACE})
    place, video, begin, end = tokenizer.convert_tokens_to_ids([PLACE, "<repo_name>", BEGIN, END])
    config = PaddleOCRVLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6]),
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        ),
        vision_config=dict(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56
        ),
        image_token_id=place,
        video_token_id=video,
        vision_start_token_id=begin,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("models") / "random-paddleocr-vl"
    PaddleOCRVLForConditionalGeneration(config).save_pretrained(folder)
    PaddleOCRVLProcessor(PaddleOCRVLImageProcessorPil(min_pixels=28 * 28), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(pictured):
    from transformers import PaddleOCRVLForConditionalGeneration

    AttentionInterface.register("oracle", eager_attention)
    ways = {"text_config": "oracle", "vision_config": "eager"}
    model = PaddleOCRVLForConditionalGeneration.from_pretrained(pictured, dtype=torch.float32).eval()
    model.set_attn_implementation(ways)
    return model


def picture(seed: int) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 256, (*reversed(IMAGE), 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def given(long_texts, num_words: int, seed: int) -> dict:
    text = long_texts(num_words, seed=7)
    prompt = f"{text[:200]}{BEGIN}{PLACE}{END}{text[200:]}"
    return {"prompt": prompt, "multi_modal_data": {"image": picture(seed)}}


@pytest.fixture(scope="module")
def served(engines, pictured) -> Engine:
    return engines(pictured, "snapkv:budget=0.25", limit_mm_per_prompt={"image": 1}, **ROTATES)


def ask(engine: Engine, name: str, prompt: dict, compression: str) -> None:
    engine.llm.llm_engine.add_request(name, prompt, sampling(NUM_TOKENS, compression, logprobs=5))
    engine.finish()


@pytest.fixture(scope="module")
@torch.inference_mode()
def prompt(reference, served, pictured, long_texts) -> Prompt:
    """Run once by transformers, on what vLLM's vision tower makes of the image, which is nearly the same."""
    from transformers import AutoProcessor

    asked, processor = given(long_texts, 560, seed=1), AutoProcessor.from_pretrained(pictured)
    inputs = processor(asked["multi_modal_data"]["image"], asked["prompt"], return_tensors="pt")
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    features = served.worker.get_model().embed_multimodal(pixel_values=pixels[None], image_grid_thw=grid)
    (own,) = reference.model.get_image_features(pixels, grid).pooler_output
    assert float((features[0] - own).abs().max()) < float(own.abs().max()) / 50
    with pytest.MonkeyPatch.context() as patch:
        seen = SimpleNamespace(pooler_output=tuple(features))
        patch.setattr(reference.model, "get_image_features", lambda *_, **__: seen)
        return run(reference, inputs)


def run(reference, inputs) -> Prompt:
    ATTENTION.bias = None
    for of_another_model in (ATTENTION.queries, ATTENTION.keys, ATTENTION.values, ATTENTION.sinks):
        of_another_model.clear()
    out = reference(**inputs, use_cache=True, logits_to_keep=1)
    return Prompt(
        inputs["input_ids"][0].tolist(),
        dict(ATTENTION.queries),
        dict(ATTENTION.keys),
        dict(ATTENTION.values),
        {},
        ATTENTION.scale,
        None,
        out.past_key_values,
        out.logits[0, -1],
    )


@pytest.fixture(params=["snapkv", "adakv", "kv_compress", "keydiff", "tova", "h2o, adaptive"], scope="module")
def case(request, served, reference, prompt, long_texts, tokenizer) -> Case:
    method, allocation, budget, _, options = CASES[request.param]
    served.forget_prefixes()
    ask(served, "case", given(long_texts, 560, seed=1), options)
    output, compaction = served.outputs.pop("case"), served.compaction_of("case")
    assert output.prompt_token_ids == prompt.ids
    boundary = (len(prompt.ids) - WINDOW) // BLOCK_SIZE * BLOCK_SIZE
    blocks = math.ceil(Fraction(str(budget)) * (boundary // BLOCK_SIZE))
    scores = scores_of(method, prompt, boundary, reference, tokenizer, {})
    chosen = selecting_scores(method, options, reference, prompt, scores, compaction.counts)
    return Case(reference, prompt, scores, chosen, allocation, blocks, blocks, compaction, output, parts=1)


def test_an_image_is_part_of_what_is_kept_and_of_what_is_dropped(case, reference):
    image = [index for index, id in enumerate(case.prompt.ids) if id == reference.config.image_token_id]
    assert len(image) == IMAGE_TOKENS and image[-1] < case.compaction.job.boundary
    kept = [len({*image} & {*head}) for layer in case.compaction.positions() for head in layer]
    assert 0 < sum(kept) < len(kept) * IMAGE_TOKENS


def test_a_cached_prefix_is_of_its_image(served, long_texts):
    served.forget_prefixes()
    found = []
    for seed in (1, 2, 1):
        ask(served, "asked", given(long_texts, 560, seed), "snapkv:budget=0.25")
        found.append((served.outputs.pop("asked"), served.compaction_of("asked")))
    (first, kept), (other, its), (again, own) = found
    assert first.num_cached_tokens == 0 and other.num_cached_tokens == 32  # before the image
    assert again.num_cached_tokens == (len(first.prompt_token_ids) - WINDOW) // BLOCK_SIZE * BLOCK_SIZE
    assert same_kept(own, kept) and not same_kept(its, kept)
    assert tokens(again) == tokens(first) != tokens(other)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("kvzip", "repeats the prompt, which must be text; use another method"),
        ("attention_matching", "repeats the prompt, which must be text; use another method"),
        ("expected_attention", "needs one-dimensional rotary position embeddings, which this model has not"),
    ],
)
def test_what_needs_text_or_one_dimension_is_refused_with_one_line(served, long_texts, method, reason):
    with pytest.raises(VLLMValidationError, match=reason) as error:
        ask(served, "asked", given(long_texts, 560, 1), method)
    assert "\n" not in str(error.value)


def test_every_block_comes_back(served, long_texts):
    ask(served, "asked", given(long_texts, 560, 1), "kivi:recompact_every=16")
    assert served.compaction_of("asked") is not None
    served.check_nothing_left()
    assert served.free == NUM_BLOCKS - 1
